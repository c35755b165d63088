"""The training script of the bundled generator, run on a few rendered images.

Tests interrupt and resume it, and train the discrete generator after its autoencoder.
"""

import argparse
import importlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support import tiny_models
from support.scripts import load_script
from support.tiny_domain import COLOURS, SHAPES, drawn
from torch import nn

from model.configs import TransformerConfig
from model.networks.build import config_of_network
from model.networks.image_tokens import takes_images
from model.pipeline import KNNDiffusionPipeline

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "model" / "pretrained" / "sticker-generator" / "train.py"


class Done(NamedTuple):
    """Exit code of a command, and what it wrote to standard error."""

    returncode: int
    output: str


Run = Callable[..., Done]


def write_style(path: Path, colours: tuple[str, ...], side: int = 32) -> None:
    encoded = []
    for colour in colours:
        for shape in SHAPES:
            buffer = io.BytesIO()
            drawn(colour, shape, side).save(buffer, "WEBP", lossless=True)
            encoded.append(buffer.getvalue())
    pq.write_table(pa.table({"webp": encoded}), path)


SIZE = ["--size", "16", "--width", "16", "--head", "16", "--layers", "1", "--batch", "4", "--watch", "2"]


def command(name: str, stickers: Path, out: Path, images: int) -> list[str]:
    folders = ["--stickers", str(stickers), "--out", str(out)]
    return [sys.executable, str(SCRIPT), name, *folders, "--images", str(images), "--channels", "8", "8", "8", *SIZE]


def part(name: str) -> Any:
    """Import a module of the folder beside the script."""
    return importlib.import_module(f"sticker_recipe.{name}")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture
def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Run]:
    """Return a function that runs a command in this process, and returns its exit message, or its log if it ends well.

    The command replaces the handler of SIGTERM, which the fixture restores. Until then the signal has no effect.
    """
    caplog.set_level(logging.INFO)
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def command(*words: str) -> Done:
        caplog.clear()
        monkeypatch.setattr(sys, "argv", list(words[1:]))
        try:
            script.main()
        except SystemExit as end:
            return Done(1, str(end.code))
        return Done(0, caplog.text)

    yield command
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def stickers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stickers")
    for name, colours in (("one", COLOURS[:2]), ("two", COLOURS[2:4]), ("openmoji", COLOURS[4:6])):
        write_style(folder / f"{name}.parquet", colours)
    return folder


def test_nearest_leaves_out_the_row_and_its_exact_copies(script: ModuleType) -> None:
    rows = tiny_models.unit_rows(8)
    rows[5] = rows[2]
    near = part("data").nearest(rows, 3, "cpu")
    for row in range(8):
        copies = {row} | ({2, 5} if row in (2, 5) else set())
        assert not copies & set(near[row].tolist())
    scores = (rows.astype("float32") @ rows[0].astype("float32"))[1:]
    assert rows[near[0]].astype("float32") @ rows[0].astype("float32") == pytest.approx(sorted(scores)[::-1][:3])


def test_nearest_with_styles_returns_the_own_style_first(script: ModuleType) -> None:
    rows, styles = tiny_models.unit_rows(12), np.arange(12) % 3
    near = part("data").nearest(rows, 5, "cpu", styles)
    assert (styles[near[:, :3]] == styles[:, None]).all(), "a style has three other rows"
    assert (styles[near[:, 3:]] != styles[:, None]).all(), "other styles follow"
    assert (near != np.arange(12)[:, None]).all()


def test_training_set_options_choose_the_neighbours_and_the_weights(script: ModuleType) -> None:
    rows = tiny_models.unit_rows(8)
    data = {
        "pixels": np.arange(8 * 12, dtype=np.uint8).reshape(8, 2, 2, 3),
        "styles": np.zeros(8, np.int64),
        "rows": rows,
        "neighbours": np.zeros((8, 2), np.int64),
        "own_style_neighbours": np.ones((8, 2), np.int64),
        "weights": np.full(8, 2),
        "near_duplicates": np.array([1, 1, 1, 1, 4, 4, 4, 4]),
    }

    def trained_on(**changes: Any) -> tuple[list[int], float]:
        """Return how often each image is used, and the share of samples with neighbours of their style."""
        defaults = {"balanced": False, "own_style_share": 0.0, "image_tokens": 0, "device": "cpu"}
        options = argparse.Namespace(**defaults | changes)
        dataset = part("data").training_set(data, options)
        batch = dataset.batch(0, seed=0, size=len(dataset))
        used = (batch.query[:, None] == torch.from_numpy(rows).float()).all(2).sum(0)
        own = (batch.neighbours == torch.from_numpy(rows[1]).float()).all(2).all(1)
        return used.tolist(), own.float().mean().item()

    assert trained_on() == ([2] * 8, 0)
    balanced, _ = trained_on(balanced=True)
    assert balanced[:4] == [2] * 4
    assert sum(balanced[4:]) == 2, "four near-duplicates count as one image"
    assert trained_on(own_style_share=1.0)[1] == 1
    assert 0 < trained_on(own_style_share=0.5)[1] < 1


def test_variants_are_computed_when_they_are_read(script: ModuleType) -> None:
    variants = part("variants")
    pixels = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    styles = np.arange(7) % 6
    orders = np.array([(1, 2, 0), (2, 0, 1), (2, 1, 0), (0, 2, 1), (1, 0, 2)])[styles % 5]
    expected = np.concatenate([
        pixels, pixels[:, :, ::-1], np.take_along_axis(pixels, orders[:, None, None], axis=3)
    ])  # fmt: skip
    images = variants.AllVariants(pixels, styles, 21)
    assert (len(images), images.nbytes) == (21, expected.nbytes)
    assert (images[:] == expected).all()
    ids = np.array([[20, 0], [8, 15]])
    assert (images[ids] == expected[ids]).all()
    for number in range(3):
        assert (variants.variant(pixels, styles, number) == expected[7 * number : 7 * number + 7]).all()
    chosen = np.array([3, 3, 9, 20, 14])
    read = variants.reader(styles, chosen, "cpu")
    assert (read(torch.from_numpy(pixels), torch.tensor([4, 1, 2])).numpy() == expected[chosen[[4, 1, 2]]]).all()


def test_style_files_skips_unseen_styles_and_refuses_their_editions(script: ModuleType, tmp_path: Path) -> None:
    data = part("data")
    for name in ("noto", "openmoji", "twemoji", "emojione"):
        write_style(tmp_path / f"{name}.parquet", COLOURS[:1])
    training, unseen = data.style_files(tmp_path)
    assert (list(training), list(unseen)) == (["noto"], ["emojione", "openmoji", "twemoji"])
    renamed = pa.table({"style": ["twemoji"], "webp": [b""]})
    pq.write_table(renamed, tmp_path / "mine.parquet")
    with pytest.raises(SystemExit, match=r"mine\.parquet has other styles than its name: \['twemoji'\]"):
        data.style_files(tmp_path)
    (tmp_path / "mine.parquet").unlink()
    write_style(tmp_path / "svgmoji-openmoji.parquet", COLOURS[:1])
    with pytest.raises(SystemExit, match="editions of unseen ones: svgmoji-openmoji"):
        data.style_files(tmp_path)


def test_pack_writes_larger_images_as_sheets_that_load_reads(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "stickers", tmp_path / "out"
    folder.mkdir()
    for name, colours in (("one", COLOURS[:2]), ("openmoji", COLOURS[:1])):
        write_style(folder / f"{name}.parquet", colours, side=128)
    monkeypatch.setattr(part("pack"), "UNSEEN_IMAGES", 2)
    monkeypatch.setattr(part("sheets"), "SHEET_IMAGES", 4)
    monkeypatch.setattr(part("sheets"), "ROW_IMAGES", 2)
    words = ["train.py", "pack", "--stickers", str(folder), "--out", str(out), "--size", "128"]
    packing = run("python", *words)
    assert packing.returncode == 0, packing.output
    with tarfile.open(out / "sticker-generator.tar.gz") as tar:
        tar.extractall(tmp_path / "packed", filter="data")
    assert "--size 128 --patch 8 --rotary" in (tmp_path / "packed" / "run.sh").read_text()

    load = part("data").load
    images = load(folder / "one.parquet", None, 128)
    packed = load(tmp_path / "packed" / "stickers" / "one.parquet", None, 128)
    assert packed.shape == images.shape == (2 * len(SHAPES), 128, 128, 3)
    assert np.abs(packed.astype(int) - images).mean() < 2
    assert len(load(tmp_path / "packed" / "stickers" / "one.parquet", 3, 128)) == 3
    paths, unseen = part("data").style_files(tmp_path / "packed" / "stickers")
    pixels, styles = part("data").load_all(paths, None, 128)
    assert (pixels == packed).all() and styles.tolist() == [0] * len(packed)
    assert len(load(unseen["openmoji"], None, 128)) == -(-len(SHAPES) // (len(SHAPES) // 2))


def test_load_refuses_images_smaller_than_the_size(script: ModuleType, tmp_path: Path) -> None:
    write_style(tmp_path / "small.parquet", COLOURS[:1])
    with pytest.raises(SystemExit, match=r"small\.parquet are smaller than --size: 32 px; run make_stickers\.py"):
        part("data").load(tmp_path / "small.parquet", None, 128)


def test_near_duplicates_counts_rows_of_at_least_the_threshold(script: ModuleType) -> None:
    rows = np.eye(4, 16, dtype=np.float16)
    rows[1] = rows[0] * 0.97 + rows[2] * 0.1
    assert part("data").near_duplicates(rows, "cpu").tolist() == [2, 2, 1, 1]


def test_snapshots_choose_another_only_if_it_is_clearly_better(script: ModuleType, tmp_path: Path) -> None:
    results, losses = part("results"), part("monitoring").ConditionLosses
    network = nn.Linear(1, 1)

    def measured(gap: float) -> Any:
        noise = torch.randn(1, 100, generator=torch.Generator().manual_seed(0)) * 0.1
        return losses((0.5,), noise + gap, torch.zeros(1, 100))

    snapshots = results.Snapshots(tmp_path / "best.pt")
    assert snapshots.choose(40, network, measured(0.0)) == 40, "without a snapshot the last weights are chosen"
    for images, weight, gap in ((10, 1.0, -0.1), (20, 2.0, -0.5), (30, 3.0, 0.2)):
        nn.init.constant_(network.weight, weight)
        snapshots.offer(images, network, measured(gap))
    assert snapshots.choose(40, network, measured(-0.5)) == 40, "an equal one is not better"
    assert network.weight.item() == 3
    assert results.Snapshots(tmp_path / "best.pt").choose(40, network, measured(-0.3)) == 20
    assert network.weight.item() == 2


def test_authenticity_counts_samples_closer_to_their_image_than_its_nearest_distinct_one(script: ModuleType) -> None:
    training = tiny_models.unit_rows(50, 32).astype(np.float32)
    slightly = tiny_models.unit(training + 0.1 * tiny_models.unit_rows(50, 32, seed=1)).astype(np.float32)
    other = tiny_models.unit_rows(50, 32, seed=2).astype(np.float32)
    authenticity = part("results").authenticity
    assert authenticity(slightly, training) == 0
    assert authenticity(other, training) > 0.3
    variants = np.concatenate([training, slightly])
    assert authenticity(slightly, variants) == 0, "a near-duplicate is not the nearest distinct image"


def test_sticker_script_sigterm_saves_a_checkpoint_and_resumes(stickers: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    state = out / "base" / "checkpoint.pt"

    def terminate() -> None:
        """Send SIGTERM to this process, whose handler is then that of the command, after the first checkpoint."""
        deadline = time.monotonic() + 120
        while not state.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        terminated = pool.submit(terminate)
        stopped = run(*command("base", stickers, out, 400_000))
        terminated.result()
    step = torch.load(state, weights_only=True)["step"]
    assert stopped == Done(1, f"base: stopped after {4 * step} images; run again to resume")

    other = run(*command("base", stickers, out, 400_000), "--rate", "0.1")
    assert other.returncode == 1
    assert (
        f"settings differ from those of the run in {out / 'base'}: rate 0.0015, now 0.1; use another --out"
        in other.output
    )

    done = run(*command("base", stickers, out, 4 * (step + 2)))
    assert done.returncode == 0, done.output[-2000:]
    pipeline = KNNDiffusionPipeline.open(out / "base" / "pipeline")
    assert (pipeline.side, pipeline.transformer.config.in_channels) == (16, 6)


def test_sticker_script_minutes_saves_the_weights_so_far_and_adds_up(stickers: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = []
    for _ in range(2):
        done = run(*command("base", stickers, out, 400_000), "--minutes", "1e-9")
        assert done.returncode == 0, done.output[-2000:]
        assert "--minutes 1e-09: stopped after" in done.output
        steps.append(torch.load(out / "base" / "checkpoint.pt", weights_only=True)["step"])
        pipeline = KNNDiffusionPipeline.open(out / "base" / "pipeline")
        assert pipeline.side == 16
        assert (out / "base" / f"samples-{4 * steps[-1]:09d}.png").exists()
    assert steps == [1, 2]


def test_sticker_script_128_px_with_large_patches_and_clean_images_trains_and_generates(
    run: Run, tmp_path: Path
) -> None:
    (stickers := tmp_path / "stickers").mkdir()
    for name, colours in (("one", COLOURS[:2]), ("openmoji", COLOURS[4:5])):
        write_style(stickers / f"{name}.parquet", colours, side=128)
    words = [*command("base", stickers, tmp_path, 8), "--size", "128", "--patch", "32", "--prediction", "sample"]
    done = run(*words, "--image-tokens", "1", "--rotary")
    assert done.returncode == 0, done.output[-2000:]
    with np.load(next(tmp_path.glob("data-*.npz"))) as data:
        assert data["pixels"].shape[1:] == data["references"].shape[1:] == (128, 128, 3)
    saved = tmp_path / "base" / "pipeline"
    pipeline = KNNDiffusionPipeline.open(saved)
    size = config_of_network(pipeline.transformer, pipeline.config.prediction)
    assert size == TransformerConfig(
        image_size=128, patch_size=32, layers=1, heads=1, head_width=16, prediction="sample",
        neighbour_images=1, neighbour_patch=64, rotary=True,
    )  # fmt: skip
    (image,) = pipeline("a red circle", retrieve=False, query="text", num_inference_steps=2, candidates=1).images
    assert image.size == (128, 128)
    other = [*command("base", stickers, tmp_path / "other", 4), "--size", "128", "--patch", "32", "--image-tokens", "1"]
    assert "prediction='sample'" in run(*other, "--start-from", str(saved)).output


def test_load_reads_images_at_the_given_side(script: ModuleType, tmp_path: Path) -> None:
    checks = np.repeat(np.indices((128, 128)).sum(0)[..., None] % 2 * 255, 3, axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(checks).save(buffer, "WEBP", lossless=True)
    pq.write_table(pa.table({"webp": [buffer.getvalue()]}), tmp_path / "style.parquet")
    full, small = (part("data").load(tmp_path / "style.parquet", None, side) for side in (128, 64))
    assert np.array_equal(full, checks[None]), "details finer than the encoder's input remain"
    assert small.shape == (1, 64, 64, 3)
    assert part("data").resized(full, 64).std() < 1


def test_sticker_script_distil_learns_from_a_guided_generator_and_resumes(
    stickers: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run(*command("base", stickers, out, 16), "--guide-share", "0.5")
    assert done.returncode == 0, done.output[-2000:]
    assert "the average after 8 images is the guide" in done.output
    teacher = out / "base" / "pipeline"
    guided = KNNDiffusionPipeline.open(teacher)
    assert not torch.equal(guided.guide.pos_embed.proj.weight, guided.transformer.pos_embed.proj.weight)

    words = [*command("distil", stickers, out, 400_000), "--start-from", str(teacher), "--steps", "2"]
    for images in (4, 8):
        done = run(*words, "--minutes", "1e-9", "--export", str(tmp_path / "returned"))
        assert done.returncode == 0, done.output[-2000:]
        figures = json.loads((tmp_path / "returned" / "figures.json").read_text())
        assert figures["images"] == images, "a repeated run resumes"
        assert 0 < figures["distance"] < 4
    assert (tmp_path / "returned" / "unseen-openmoji.png").exists()
    student = KNNDiffusionPipeline.open(out / "distil" / "pipeline")
    assert student.guide is None
    config = student.config
    assert (config.num_inference_steps, config.guidance_scale, config.noise_levels) == (2, 1.0, [1.0, 2 / 3])
    assert (config.neighbours, config.candidates, config.query) == (3, 2, "mean")
    assert student(student.embed(["a"]), retrieve=False, candidates=1).images[0].size == (16, 16)

    other = run(*words[:-1], "4")
    assert f"settings differ from those of the run in {out / 'distil'}: steps 2, now 4; use another" in other.output
    for name, wrong in (("distil", []), ("base", ["--steps", "2"])):
        assert run(*command(name, stickers, out, 4), *wrong) == Done(1, "2"), "the parser rejects it"


def test_sticker_script_discrete_generator_trains_on_the_codes_of_its_autoencoder(
    stickers: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    codes, discrete = (run(*command(name, stickers, out, 16)) for name in ("codes", "discrete"))
    assert codes.returncode == 0, codes.output[-2000:]
    assert " codes used, PSNR " in codes.output
    assert discrete.returncode == 0, discrete.output[-2000:]
    pipeline = KNNDiffusionPipeline.open(out / "discrete" / "pipeline")
    assert (pipeline.side, pipeline.transformer.config.tokens) == (16, 16)
    assert len(list((out / "discrete").glob("samples-*.png"))) == 2
    assert len(list(out.glob("data-*.npz"))) == 1, "the data are prepared once"
    assert run(*command("codes", stickers, out, 24)).returncode == 0, "a longer run resumes"
    other = run(*command("discrete", stickers, out, 24))
    assert other.returncode == 1
    assert ": codes " in other.output, "its autoencoder has changed"


def test_sticker_script_wsd_decays_in_a_copy_and_resumes_from_before_the_decay(
    stickers: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [*command("base", stickers, out, 40), "--schedule", "wsd", "--mean-query", "0.3", "--fewer-neighbours", "1"]
    weights = []
    for _ in range(2):
        done = run(*words, "--own-style-share", "0.5", "--balanced", "--sigma-mean", "0.8")
        assert done.returncode == 0, done.output[-2000:]
        assert "the learning rate fell to 0 in 2 of 10 steps; the next run resumes at step 8" in done.output
        assert torch.load(out / "base" / "checkpoint.pt", weights_only=True)["step"] == 8
        assert json.loads((out / "base" / "figures.json").read_text())["images"] == 40
        assert not (out / "base" / "decay").exists()
        weights.append(KNNDiffusionPipeline.open(out / "base" / "pipeline").transformer.state_dict())
    assert all(torch.equal(part, weights[1][name]) for name, part in weights[0].items()), "the same decay from step 8"
    assert run(*words).returncode == 1, "other data options need another folder"

    words = [*command("base", stickers, tmp_path / "new", 4), "--image-tokens", "2"]
    new = run(*words, "--start-from", str(out / "base" / "pipeline"))
    assert new.returncode == 0, new.output[-2000:]
    other = [*command("base", stickers, tmp_path / "other", 4), "--width", "32"]
    assert "another network" in run(*other, "--start-from", str(out / "base" / "pipeline")).output


def test_sticker_script_pack_trains_elsewhere_resumes_and_exports_small_files(
    stickers: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, elsewhere, out = tmp_path / "packed", tmp_path / "elsewhere", tmp_path / "returned"
    assert run(*command("pack", stickers, packed, 4)).returncode == 0
    with tarfile.open(packed / "sticker-generator.tar.gz") as tar:
        tar.extractall(elsewhere, filter="data")
    environment = {**os.environ, "PYTHON": sys.executable}
    words = ["0.01", str(out), "--device", "cpu", *SIZE]
    first = subprocess.run([elsewhere / "run.sh", *words], env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    before = json.loads((out / "figures.json").read_text())
    assert (before["images"], before["new_images"]) == (8, 8), "one step before the decay, and one of the decay"

    monkeypatch.setattr(part("runs"), "SHARD_SIZE", "20KB")
    monkeypatch.setattr(part("results"), "PART_BYTES", 20_000)
    folders = ["--stickers", elsewhere / "stickers", "--encoder", elsewhere / "encoder", "--out", elsewhere / "state"]
    resume = ["train.py", "base", *map(str, folders), *SIZE, "--export", str(out), "--minutes", "1e-9"]
    second = run("python", *resume, "--schedule", "wsd", "--choose", "gap", "--image-tokens", "1", "--rotary")
    assert second.returncode == 0, second.output[-2000:]
    figures = json.loads((out / "figures.json").read_text())
    assert (figures["images"], figures["new_images"]) == (12, 8), "it resumes from before the decay"
    assert 0 <= figures["authenticity"]["openmoji"] <= 1
    assert figures["unseen"]["openmoji"]["0.7"].keys() == {"shown", "hidden", "gap", "gap_error"}
    assert (out / "unseen-openmoji.png").exists()

    parts = sorted(out.glob("pipeline.tar.*"))
    assert len(parts) > 1
    assert max(path.stat().st_size for path in out.iterdir()) <= 20_000
    with tarfile.open(fileobj=io.BytesIO(b"".join(path.read_bytes() for path in parts))) as tar:
        tar.extractall(tmp_path, filter="data")
    pipeline = KNNDiffusionPipeline.open(tmp_path / "pipeline")
    assert takes_images(pipeline.transformer)
    assert len(list((tmp_path / "pipeline").rglob("*.safetensors"))) > 1, "shards"
    assert pipeline.identity == pipeline.encoder.identity, "that of the whole encoder"

    monkeypatch.setattr(part("pack"), "LARGEST_BYTES", 1_000)
    large = run(*command("pack", stickers, tmp_path / "large", 4))
    assert "the archive is too large: " in large.output
    assert not list((tmp_path / "large").iterdir())
