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
from support.tiny_training import COUNT, POOL, SIZES, nearest, picture, small_kl

from infra.errors import InputError, StageError
from infra.formats import tables
from model.images import image_to_array, to_model_range
from model.networks.latents import encode_latents
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder, encode_codes
from model.training.alignment import align_all
from model.training.data import TrainingRows, TrainingSet
from tasks.train import data
from tasks.train.data import (
    ImageProcessing,
    TrainingInputs,
    cached_array,
    load_training_set,
    read_pixels,
    training_shards,
)

SIDE = 16
PIXELS = np.stack([image_to_array(picture(number), SIDE) for number in range(COUNT)])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    return tiny_training.stored_inputs(tmp_path_factory.mktemp("stored"))


def loaded(inputs: TrainingInputs, cache: Path, **treatment: Any) -> list[TrainingRows]:
    return [shard.load() for shard in training_shards(inputs, ImageProcessing(**{"side": SIDE} | treatment), cache)]


def test_a_shard_holds_images_embeddings_and_neighbours_of_the_same_rows(
    inputs: TrainingInputs, tmp_path: Path
) -> None:
    parts = loaded(inputs, tmp_path)
    assert [len(part.pictures) for part in parts] == list(SIZES)
    np.testing.assert_array_equal(np.concatenate([part.pictures for part in parts]), PIXELS)
    np.testing.assert_array_equal(np.concatenate([part.embeddings for part in parts]), tiny_models.unit_rows(COUNT))
    np.testing.assert_array_equal(np.concatenate([part.neighbours for part in parts]), nearest())
    assert all(part.reference is None for part in parts)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"verified"}, "pictures are not kept twice"


def test_images_are_brought_to_the_side_asked_for(inputs: TrainingInputs, tmp_path: Path) -> None:
    assert loaded(inputs, tmp_path, side=8)[0].pictures.shape == (SIZES[0], 8, 8, 3)


def test_streamed_windows_hold_what_one_held_set_does(inputs: TrainingInputs, tmp_path: Path) -> None:
    treatment = ImageProcessing(side=SIDE)
    row_bytes = treatment.row_bytes() + 2 * tiny_models.WIDTH + 8 * POOL
    database = tiny_models.unit_rows(COUNT)
    whole = load_training_set(inputs, treatment, tmp_path, window_bytes=row_bytes * COUNT)
    held = TrainingRows(pictures=PIXELS, embeddings=database, neighbours=nearest())
    expected = TrainingSet(held, database)
    for step in range(6):
        one, other = (data.batch(step, seed=3, size=5) for data in (whole, expected))
        for name in ("images", "query", "neighbours"):
            assert torch.equal(getattr(one, name), getattr(other, name)), (name, step)
    streamed = load_training_set(inputs, treatment, tmp_path, window_bytes=row_bytes * (COUNT - 1))
    queries = streamed.batch(0, seed=0, size=COUNT).query
    assert len(queries.unique(dim=0)) == COUNT, "every row once an epoch"
    firsts = [streamed.batch(epoch * COUNT, seed=0, size=1).query for epoch in range(4)]
    assert len(firsts) == 4
    shard = [set(map(tuple, database[start : start + size].tolist())) for start, size in ((0, 5), (5, 7))]
    first_five = {tuple(row) for row in streamed.batch(0, seed=1, size=COUNT).query[:5].half().numpy().tolist()}
    assert any(first_five <= rows for rows in shard), "a window is a shard here"


@pytest.mark.parametrize("kind", ["pixels", "editing", "latents"])
def test_chosen_rows_are_those_of_the_whole_shard(inputs: TrainingInputs, tmp_path: Path, kind: str) -> None:
    encoded = {"autoencoder": small_kl(), "autoencoder_digest": kind}
    treatment = ImageProcessing(side=SIDE, editing=kind == "editing", **encoded if kind == "latents" else {})
    chosen = np.array([0, 2, 3])
    apart = [shard.load(chosen) for shard in training_shards(inputs, treatment, tmp_path)]
    for part, whole in zip(apart, [s.load() for s in training_shards(inputs, treatment, tmp_path)], strict=True):
        for field in dataclasses.fields(TrainingRows):
            one, all_rows = getattr(part, field.name), getattr(whole, field.name)
            assert (one is None) == (all_rows is None) == (field.name == "reference" and kind != "editing")
            if one is not None:
                np.testing.assert_array_equal(one, all_rows[chosen])


def test_images_are_decoded_by_several_threads_in_their_order(
    inputs: TrainingInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    together = threading.Barrier(2)

    def fitted(image: Any, side: int) -> Any:
        if threading.get_ident() not in seen and len(seen) < 2:
            seen.add(threading.get_ident())
            together.wait(10)
        return image_to_array(image, side)

    monkeypatch.setattr(data, "image_to_array", fitted)
    monkeypatch.setattr(data, "DECODED_AT_ONCE", 3)
    tar = sorted(Path(inputs.images.uri).glob("*.tar"))[0]
    keys = sorted(key for key, _ in tables.iter_images(tar))
    np.testing.assert_array_equal(read_pixels(tar, keys[::-1], SIDE, threads=2), PIXELS[: len(keys)][::-1])
    assert len(seen) == 2


def test_references_are_the_aligned_first_neighbours_wherever_they_are_stored(
    inputs: TrainingInputs, tmp_path: Path
) -> None:
    parts = loaded(inputs, tmp_path, editing=True)
    expected = align_all(PIXELS, nearest()).pixels
    np.testing.assert_array_equal(
        np.concatenate([part.reference for part in parts if part.reference is not None]), expected
    )
    assert (expected != PIXELS).any(axis=(1, 2, 3)).all()


def test_what_is_dear_is_made_once(inputs: TrainingInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loaded(inputs, tmp_path, editing=True)
    monkeypatch.setattr(data, "align_all", None)
    again = loaded(inputs, tmp_path, editing=True)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.reference, other.reference)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        loaded(inputs, tmp_path, editing=True, side=8)


@pytest.mark.parametrize("kind", ["latents", "codes"])
def test_an_autoencoder_encodes_each_shard_once(
    inputs: TrainingInputs, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = to_model_range(torch.from_numpy(PIXELS))
    if kind == "latents":
        autoencoder: Any = small_kl()
        expected = encode_latents(autoencoder, pictures).half().numpy()
    else:
        config = AutoencoderConfig(image_size=SIDE, downscale=4, codes=16, code_width=4, channels=(8, 8, 8))
        autoencoder = build_autoencoder(config, seed=0).eval()
        expected = encode_codes(autoencoder, pictures).numpy()
    settings: dict[str, Any] = {
        "autoencoder": autoencoder, "autoencoder_digest": kind, "codes": kind == "codes",
    }  # fmt: skip
    made = np.concatenate([part.pictures for part in loaded(inputs, tmp_path, **settings)])
    np.testing.assert_allclose(made.astype(np.float32), expected.astype(np.float32), atol=5e-3)
    assert made.dtype == (np.float16 if kind == "latents" else np.int32)
    monkeypatch.setattr(data, "read_pixels", None)
    again = np.concatenate([part.pictures for part in loaded(inputs, tmp_path, **settings)])
    np.testing.assert_array_equal(made, again)
    with pytest.raises(TypeError):
        loaded(inputs, tmp_path, **settings | {"autoencoder_digest": "another"})


def test_latents_and_codes_of_one_autoencoder_are_kept_apart(inputs: TrainingInputs, tmp_path: Path) -> None:
    config = AutoencoderConfig(image_size=SIDE, downscale=4, codes=16, code_width=4, channels=(8, 8, 8))
    one: dict[str, Any] = {"autoencoder": build_autoencoder(config, seed=0).eval(), "autoencoder_digest": "one"}
    shapes = [loaded(inputs, tmp_path, codes=codes, **one)[0].pictures.shape for codes in (True, False)]
    assert shapes == [(SIZES[0], 16), (SIZES[0], 4, 4, 4)]


def test_a_tar_without_an_embedded_image_is_refused(inputs: TrainingInputs) -> None:
    (tar, _) = sorted(Path(inputs.images.uri).glob("*.tar"))
    with pytest.raises(InputError, match=r"lacks 1 pictures that were embedded, 000000009 first; embed again"):
        read_pixels(tar, ["000000001", "000000009"], SIDE)


def test_what_is_kept_is_whole_or_not_there(tmp_path: Path) -> None:
    def broken() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_array(tmp_path, "deep", "rows", broken)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    np.testing.assert_array_equal(cached_array(tmp_path, "deep", "rows", lambda: np.arange(3)), [0, 1, 2])
    np.testing.assert_array_equal(cached_array(tmp_path, "deep", "rows", broken), [0, 1, 2])
    assert isinstance(cached_array(tmp_path, "deep", "rows", broken), np.memmap)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["rows.npy"]


def test_what_is_kept_is_made_once_however_many_ask(tmp_path: Path) -> None:
    made, together = [], threading.Barrier(3)

    def make() -> NDArray[Any]:
        made.append(threading.get_ident())
        time.sleep(0.1)
        return np.arange(3)

    def ask(_: int) -> NDArray[Any]:
        together.wait(10)
        return cached_array(tmp_path, "deep", "rows", make)

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(ask, range(3)):
            np.testing.assert_array_equal(found, [0, 1, 2])
    assert len(made) == 1


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    def full() -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StageError, match="full"):
        cached_array(tmp_path, "deep", "rows", full)
