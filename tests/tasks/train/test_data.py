"""Training data: shard sources, shuffle windows and cached arrays."""

import dataclasses
import errno
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import tiny_models, tiny_training
from support.tiny_training import COUNT, POOL, SIZES, nearest, png_image, small_kl

from infra.errors import InputError, StageError
from infra.formats import webdataset
from model.images import image_to_array, to_model_range
from model.networks.latents import encode_latents
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder, encode_codes
from model.training.alignment import align_all
from model.training.data import TrainingRows, TrainingSet
from tasks.train import shard_source, stored_images
from tasks.train.data import load_training_set, training_shards
from tasks.train.inputs import TrainingInputs
from tasks.train.shard_source import ImageProcessing
from tasks.train.stored_images import cached_array, read_pixels

SIDE = 16
PIXELS = np.stack([image_to_array(png_image(number), SIDE) for number in range(COUNT)])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    return tiny_training.stored_inputs(tmp_path_factory.mktemp("stored"))


def load_shards(inputs: TrainingInputs, cache: Path, **processing: Any) -> list[TrainingRows]:
    return [shard.load() for shard in training_shards(inputs, ImageProcessing(**{"side": SIDE} | processing), cache)]


def test_load_returns_images_embeddings_and_neighbours_of_the_same_rows(inputs: TrainingInputs, tmp_path: Path) -> None:
    parts = load_shards(inputs, tmp_path)
    assert [len(part.images) for part in parts] == list(SIZES)
    np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), PIXELS)
    np.testing.assert_array_equal(np.concatenate([part.embeddings for part in parts]), tiny_models.unit_rows(COUNT))
    np.testing.assert_array_equal(np.concatenate([part.neighbours for part in parts]), nearest())
    assert all(part.reference is None for part in parts)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"verified"}, "images are not cached"


def test_load_resizes_images_to_side(inputs: TrainingInputs, tmp_path: Path) -> None:
    assert load_shards(inputs, tmp_path, side=8)[0].images.shape == (SIZES[0], 8, 8, 3)


def test_load_training_set_matches_training_set_in_memory(inputs: TrainingInputs, tmp_path: Path) -> None:
    processing = ImageProcessing(side=SIDE)
    row_bytes = processing.row_bytes() + 2 * tiny_models.WIDTH + 8 * POOL
    database = tiny_models.unit_rows(COUNT)
    whole = load_training_set(inputs, processing, tmp_path, window_bytes=row_bytes * COUNT)
    in_memory = TrainingRows(images=PIXELS, embeddings=database, neighbours=nearest())
    expected = TrainingSet(in_memory, database)
    for step in range(6):
        one, other = (data.batch(step, seed=3, size=5) for data in (whole, expected))
        for name in ("images", "query", "neighbours"):
            assert torch.equal(getattr(one, name), getattr(other, name)), (name, step)
    streamed = load_training_set(inputs, processing, tmp_path, window_bytes=row_bytes * (COUNT - 1))
    queries = streamed.batch(0, seed=0, size=COUNT).query
    assert len(queries.unique(dim=0)) == COUNT, "each row once per epoch"
    firsts = [streamed.batch(epoch * COUNT, seed=0, size=1).query for epoch in range(4)]
    assert len(firsts) == 4
    shard = [set(map(tuple, database[start : start + size].tolist())) for start, size in ((0, 5), (5, 7))]
    first_five = {tuple(row) for row in streamed.batch(0, seed=1, size=COUNT).query[:5].half().numpy().tolist()}
    assert any(first_five <= rows for rows in shard), "each window is one shard"


@pytest.mark.parametrize("kind", ["pixels", "editing", "latents"])
def test_load_with_chosen_rows_equals_rows_of_whole_shard(inputs: TrainingInputs, tmp_path: Path, kind: str) -> None:
    encoded = {"autoencoder": small_kl(), "autoencoder_digest": kind}
    processing = ImageProcessing(side=SIDE, editing=kind == "editing", **encoded if kind == "latents" else {})
    chosen, absent = np.array([0, 2, 3]), {"read"} if kind == "editing" else {"read", "reference"}
    parts = [shard.load(chosen) for shard in training_shards(inputs, processing, tmp_path)]
    for part, whole in zip(parts, [s.load() for s in training_shards(inputs, processing, tmp_path)], strict=True):
        for field in dataclasses.fields(TrainingRows):
            one, all_rows = getattr(part, field.name), getattr(whole, field.name)
            assert (one is None) == (all_rows is None) == (field.name in absent)
            if one is not None:
                np.testing.assert_array_equal(one, all_rows[chosen])


def test_read_pixels_with_threads_preserves_order(inputs: TrainingInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    barrier = threading.Barrier(2)

    def waiting(image: Any, side: int) -> Any:
        if threading.get_ident() not in threads and len(threads) < 2:
            threads.add(threading.get_ident())
            barrier.wait(10)
        return image_to_array(image, side)

    monkeypatch.setattr(stored_images, "image_to_array", waiting)
    monkeypatch.setattr(stored_images, "DECODING_BATCH", 3)
    tar = sorted(Path(inputs.images.uri).glob("*.tar"))[0]
    keys = sorted(key for key, _ in webdataset.iter_images(tar))
    np.testing.assert_array_equal(read_pixels(tar, keys[::-1], SIDE, threads=2), PIXELS[: len(keys)][::-1])
    assert len(threads) == 2


def test_load_for_editing_returns_aligned_first_neighbours(inputs: TrainingInputs, tmp_path: Path) -> None:
    parts = load_shards(inputs, tmp_path, editing=True)
    expected = align_all(PIXELS, nearest()).pixels
    np.testing.assert_array_equal(
        np.concatenate([part.reference for part in parts if part.reference is not None]), expected
    )
    assert (expected != PIXELS).any(axis=(1, 2, 3)).all()


def test_load_training_set_has_the_images_of_the_neighbours(inputs: TrainingInputs, tmp_path: Path) -> None:
    chosen, target = torch.tensor([[0, 2]]).expand(COUNT, -1), to_model_range(torch.from_numpy(PIXELS))
    for editing in (False, True):
        processing = ImageProcessing(side=SIDE, editing=editing, neighbour_images=True)
        batch = load_training_set(inputs, processing, tmp_path, window_bytes=1 << 20).batch(0, seed=0, size=COUNT)
        assert batch.neighbour_images is not None
        order = [int((target == image).all((1, 2, 3)).nonzero()) for image in batch.images]
        expected = to_model_range(torch.from_numpy(PIXELS[nearest()[order][:, [0, 2]]]).flatten(0, 1))
        assert torch.equal(batch.neighbour_images.choose(chosen).flatten(0, 1), expected)
    plain = load_training_set(inputs, ImageProcessing(side=SIDE), tmp_path, window_bytes=1 << 20)
    assert plain.batch(0, seed=0, size=2).neighbour_images is None


def test_load_for_editing_aligns_once_per_side(
    inputs: TrainingInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_shards(inputs, tmp_path, editing=True)
    monkeypatch.setattr(shard_source, "align_all", None)
    again = load_shards(inputs, tmp_path, editing=True)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.reference, other.reference)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        load_shards(inputs, tmp_path, editing=True, side=8)


@pytest.mark.parametrize("kind", ["latents", "codes"])
def test_load_with_autoencoder_encodes_each_shard_once(
    inputs: TrainingInputs, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = to_model_range(torch.from_numpy(PIXELS))
    if kind == "latents":
        autoencoder: Any = small_kl()
        expected = encode_latents(autoencoder, images).half().numpy()
    else:
        config = AutoencoderConfig(image_size=SIDE, downscale=4, codes=16, code_width=4, channels=(8, 8, 8))
        autoencoder = build_autoencoder(config, seed=0).eval()
        expected = encode_codes(autoencoder, images).numpy()
    settings: dict[str, Any] = {
        "autoencoder": autoencoder, "autoencoder_digest": kind, "codes": kind == "codes",
    }  # fmt: skip
    encoded = np.concatenate([part.images for part in load_shards(inputs, tmp_path, **settings)])
    np.testing.assert_allclose(encoded.astype(np.float32), expected.astype(np.float32), atol=5e-3)
    assert encoded.dtype == (np.float16 if kind == "latents" else np.int32)
    monkeypatch.setattr(stored_images, "read_pixels", None)
    again = np.concatenate([part.images for part in load_shards(inputs, tmp_path, **settings)])
    np.testing.assert_array_equal(encoded, again)
    with pytest.raises(TypeError):
        load_shards(inputs, tmp_path, **settings | {"autoencoder_digest": "another"})


def test_load_caches_latents_and_codes_of_one_autoencoder_separately(inputs: TrainingInputs, tmp_path: Path) -> None:
    config = AutoencoderConfig(image_size=SIDE, downscale=4, codes=16, code_width=4, channels=(8, 8, 8))
    one: dict[str, Any] = {"autoencoder": build_autoencoder(config, seed=0).eval(), "autoencoder_digest": "one"}
    shapes = [load_shards(inputs, tmp_path, codes=codes, **one)[0].images.shape for codes in (True, False)]
    assert shapes == [(SIZES[0], 16), (SIZES[0], 4, 4, 4)]


def test_read_pixels_raises_for_missing_image(inputs: TrainingInputs) -> None:
    (tar, _) = sorted(Path(inputs.images.uri).glob("*.tar"))
    with pytest.raises(InputError, match=r"images are missing from .*: 1, the first is 000000009; embed again"):
        read_pixels(tar, ["000000001", "000000009"], SIDE)


def test_cached_array_writes_nothing_after_interruption(tmp_path: Path) -> None:
    def broken() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_array(tmp_path, "deep", "rows", broken)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    np.testing.assert_array_equal(cached_array(tmp_path, "deep", "rows", lambda: np.arange(3)), [0, 1, 2])
    np.testing.assert_array_equal(cached_array(tmp_path, "deep", "rows", broken), [0, 1, 2])
    assert isinstance(cached_array(tmp_path, "deep", "rows", broken), np.memmap)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["rows.npy"]


def test_cached_array_with_concurrent_callers_computes_once(tmp_path: Path) -> None:
    calls, barrier = [], threading.Barrier(3)

    def make() -> NDArray[Any]:
        calls.append(threading.get_ident())
        time.sleep(0.1)
        return np.arange(3)

    def request(_: int) -> NDArray[Any]:
        barrier.wait(10)
        return cached_array(tmp_path, "deep", "rows", make)

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(request, range(3)):
            np.testing.assert_array_equal(found, [0, 1, 2])
    assert len(calls) == 1


def test_cached_array_raises_stage_error_for_full_disk(tmp_path: Path) -> None:
    def full() -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StageError, match="no space left for"):
        cached_array(tmp_path, "deep", "rows", full)
