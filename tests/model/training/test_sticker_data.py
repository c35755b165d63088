"""Data of the recipe of the bundled generator: neighbours, weights, variants, archives, and the choice of weights."""

import argparse
import io
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support import tiny_models
from support.sticker_recipe import Run, part, write_style
from support.tiny_domain import COLOURS, SHAPES
from torch import nn


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
    again = ["train.py", "pack", "--stickers", str(tmp_path / "packed" / "stickers"), "--out", str(tmp_path / "again")]
    assert "has sheets of images, from an archive; pack the files of make_stickers.py" in run("python", *again).output
    assert "--size is not a multiple of 12: 100; patches of 6 px" in run("python", *again, "--size", "100").output
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


def test_load_reads_images_at_the_given_side(script: ModuleType, tmp_path: Path) -> None:
    checks = np.repeat(np.indices((128, 128)).sum(0)[..., None] % 2 * 255, 3, axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(checks).save(buffer, "WEBP", lossless=True)
    pq.write_table(pa.table({"webp": [buffer.getvalue()]}), tmp_path / "style.parquet")
    full, small = (part("data").load(tmp_path / "style.parquet", None, side) for side in (128, 64))
    assert np.array_equal(full, checks[None]), "details finer than the encoder's input remain"
    assert small.shape == (1, 64, 64, 3)
    assert part("data").resized(full, 64).std() < 1
