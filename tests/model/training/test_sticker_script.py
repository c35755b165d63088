"""The training script of the bundled generator, run on a few rendered images.

Tests interrupt and resume it, and train the discrete generator after its autoencoder.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support.sticker_recipe import SIZE, Done, Run, command, part, write_style
from support.tiny_domain import COLOURS
from torch import Tensor, nn

from model.configs import TransformerConfig
from model.networks.build import config_of_network
from model.networks.image_tokens import takes_images
from model.pipeline import KNNDiffusionPipeline
from model.step_random import StepRandom
from model.training.batch import Batch
from model.training.objectives.distillation import Distillation


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


def test_sticker_script_distil_learns_from_a_guided_generator_and_resumes(
    stickers: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, forward = list[int](), Distillation.forward

    def noting(self: Distillation, network: nn.Module, batch: Batch, rng: StepRandom) -> Tensor:
        sizes.append(len(batch.images))
        return forward(self, network, batch, rng)

    monkeypatch.setattr(Distillation, "forward", noting)
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
    assert sizes == 2 * [1, 2, 2], "the count of operations, and a piece for each level"
    assert (tmp_path / "returned" / "unseen-openmoji.png").exists()
    student = KNNDiffusionPipeline.open(out / "distil" / "pipeline")
    assert student.guide is None
    config = student.config
    assert (config.num_inference_steps, config.guidance_scale, config.noise_levels) == (2, 1.0, [1.0, 2 / 3])
    assert (config.neighbours, config.candidates, config.query) == (3, 2, "mean")
    assert student(student.embed(["a"]), retrieve=False, candidates=1).images[0].size == (16, 16)

    other = run(*words[:-1], "4")
    assert f"settings differ from those of the run in {out / 'distil'}: steps 2, now 4; use another" in other.output
    again = [*command("distil", stickers, tmp_path / "again", 4), "--start-from", str(out / "distil" / "pipeline")]
    assert "--start-from was distilled to few steps: " in run(*again).output
    assert "--start-from: cannot load a generator: " in run(*again[:-1], str(tmp_path)).output
    for name, wrong in (("distil", []), ("base", ["--steps", "2"]), ("base", ["--guide-share", "0.1"])):
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
    settings = json.loads((elsewhere / "state" / "base" / "settings.json").read_text())
    assert (settings["own_style_share"], settings["balanced"]) == (0.5, True)
    assert (settings["mean_query"], settings["fewer_neighbours"]) == (0.33, 0.5), "as at inference"

    monkeypatch.setattr(part("runs"), "SHARD_SIZE", "20KB")
    monkeypatch.setattr(part("results"), "PART_BYTES", 20_000)
    folders = ["--stickers", elsewhere / "stickers", "--encoder", elsewhere / "encoder", "--out", elsewhere / "state"]
    resume = ["train.py", "base", *map(str, folders), *SIZE, "--export", str(out), "--minutes", "1e-9"]
    resume += ["--own-style-share", "0.5", "--balanced", "--mean-query", "0.33", "--fewer-neighbours", "0.5"]
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
