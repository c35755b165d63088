from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from model.errors import ModelError
from model.training.data import TrainingSet, picture_to_array, step_generator, to_model_range

N = 12


def training_set() -> TrainingSet:
    """Picture i is the flat grey 20·i, its embedding row i, its neighbours the database's rows i + 1 and 2·i."""
    pixels = np.repeat(np.arange(N, dtype=np.uint8) * 20, 4 * 4 * 3).reshape(N, 4, 4, 3)
    neighbours = np.stack([np.arange(N) + 1, np.arange(N) * 2], axis=1)
    return TrainingSet(pixels, tiny.unit_rows(N), neighbours, tiny.unit_rows(2 * N, seed=1))


def chosen(images: Tensor) -> list[int]:
    """Which pictures a batch holds."""
    return ((images[:, 0, 0, 0] + 1) * 127.5 / 20).round().int().tolist()


def batches(data: TrainingSet, steps: int, size: int, **options: Any) -> list[int]:
    return [i for step in range(steps) for i in chosen(data.batch(step, size=size, **{"seed": 0} | options).images)]


def test_pixels_become_the_range_of_the_model() -> None:
    pixels = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    scaled = to_model_range(pixels)
    assert scaled.shape == (1, 3, 1, 1)
    assert scaled.flatten().tolist() == pytest.approx([-1, -0.6, 1])


def test_a_picture_is_its_centre_square() -> None:
    wide = Image.new("RGB", (120, 40), "red")
    wide.paste((0, 0, 255), (40, 0, 80, 40))
    array = picture_to_array(wide, 8)
    assert (array.shape, array.dtype) == ((8, 8, 3), np.uint8)
    assert np.abs(array.astype(int) - [0, 0, 255]).max() < 20, "no more red than the filter takes from beside the crop"


def test_picture_embedding_and_neighbours_stay_together() -> None:
    data = training_set()
    batch = data.batch(3, seed=5, size=6)
    own = np.array(chosen(batch.images))
    assert (batch.images.shape, batch.query.dtype, batch.neighbours.dtype) == (
        (6, 3, 4, 4),
        torch.float32,
        torch.float32,
    )
    np.testing.assert_array_equal(batch.query, tiny.unit_rows(N)[own])
    np.testing.assert_array_equal(batch.neighbours[:, 0], tiny.unit_rows(2 * N, seed=1)[own + 1])
    np.testing.assert_array_equal(batch.neighbours[:, 1], tiny.unit_rows(2 * N, seed=1)[own * 2])


@pytest.mark.parametrize("size", [1, 4, 5, 8, 30])
def test_every_picture_comes_once_an_epoch(size: int) -> None:
    seen = batches(training_set(), 120 // size, size)
    epochs = [seen[start : start + N] for start in range(0, 120, N)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(N))] * 10
    assert len({tuple(epoch) for epoch in epochs}) == 10, "every epoch has an order of its own"


def test_the_order_follows_from_the_seed() -> None:
    data = training_set()
    assert batches(data, 6, 4) == batches(training_set(), 6, 4)
    assert batches(data, 6, 4) != batches(data, 6, 4, seed=1)


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_workers_slices_make_up_the_global_batch(world: int) -> None:
    data = training_set()
    for step in range(7):
        parts = [data.batch(step, seed=0, size=18, rank=rank, world=world) for rank in range(world)]
        whole = data.batch(step, seed=0, size=18)
        for name in ("images", "query", "neighbours"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), (name, step)
        assert {len(part.images) for part in parts} == {18 // world}


@pytest.mark.parametrize(("pictures", "embeddings", "neighbours"), [(2, 3, 3), (3, 2, 3), (3, 3, 2), (0, 0, 0)])
def test_what_does_not_belong_together_is_refused(pictures: int, embeddings: int, neighbours: int) -> None:
    message = f"{pictures} pictures, {embeddings} embeddings and {neighbours} neighbour lists.*rebuild"
    with pytest.raises(ModelError, match=message):
        TrainingSet(
            np.zeros((pictures, 4, 4, 3), np.uint8),
            tiny.unit_rows(embeddings),
            np.zeros((neighbours, 2), np.int64),
            tiny.unit_rows(5),
        )


def test_neighbours_of_another_database_are_refused() -> None:
    pixels, rows = np.zeros((2, 4, 4, 3), np.uint8), tiny.unit_rows(2)
    assert len(TrainingSet(pixels, rows, np.array([[0, 4], [1, 2]]), tiny.unit_rows(5))) == 2
    with pytest.raises(ModelError, match=r"past the database.*another version"):
        TrainingSet(pixels, rows, np.array([[0, 5], [1, 2]]), tiny.unit_rows(5))


def test_every_step_and_stream_has_randomness_of_its_own() -> None:
    keys = [(seed, step, stream) for seed in (0, 1) for step in (0, 1, 2, 1_000_000) for stream in (1, 2)]
    draws = [torch.rand(4, generator=step_generator(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    assert draws == [torch.rand(4, generator=step_generator(*key)).tolist() for key in keys]
