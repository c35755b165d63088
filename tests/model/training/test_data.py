import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support import tiny_models

from model.errors import ModelError
from model.images import image_to_array, to_model_range
from model.training.batch import Batch
from model.training.data import TrainingRows, TrainingSet
from model.training.neighbour_rows import ConcatenatedRows, NeighbourEmbeddings

N = 12
DATABASE = tiny_models.unit_rows(2 * N, seed=1)


def rows(first: int = 0, last: int = N) -> TrainingRows:
    """Picture i is the flat grey 20·i, its embedding row i, its neighbours the database's rows i + 1 and 2·i."""
    own = np.arange(first, last)
    pixels = np.repeat(own.astype(np.uint8) * 20, 4 * 4 * 3).reshape(len(own), 4, 4, 3)
    neighbours = np.stack([own + 1, own * 2], axis=1)
    return TrainingRows(
        pictures=pixels, embeddings=tiny_models.unit_rows(N)[first:last], neighbours=neighbours, reference=255 - pixels
    )


class Shard:
    """Rows that are loaded when asked for, and count how often."""

    def __init__(self, first: int, last: int) -> None:
        self._held, self.rows, self.loads, self.loaded = rows(first, last), last - first, 0, 0

    def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
        self.loads += 1
        self.loaded += self.rows if chosen is None else len(chosen)
        if chosen is None:
            return self._held
        assert (np.diff(chosen) > 0).all()
        parts = {field.name: getattr(self._held, field.name)[chosen] for field in dataclasses.fields(TrainingRows)}
        return TrainingRows(**parts)


def shards(*sizes: int) -> list[Shard]:
    ends = np.cumsum(sizes).tolist()
    return [Shard(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def training_set(shards: Any = None, **options: Any) -> TrainingSet:
    return TrainingSet(rows() if shards is None else shards, DATABASE, **options)


def chosen(batch: Batch) -> list[int]:
    """Which pictures a batch holds."""
    own: list[int] = ((batch.images[:, 0, 0, 0] + 1) * 127.5 / 20).round().int().tolist()
    return own


def seen(data: TrainingSet, steps: int, size: int, **options: Any) -> list[int]:
    return [i for step in range(steps) for i in chosen(data.batch(step, size=size, **{"seed": 0} | options))]


def require_lockstep(batch: Batch) -> None:
    """Pictures, embeddings, neighbours and references are of the same rows."""
    own = np.array(chosen(batch))
    np.testing.assert_array_equal(batch.query, tiny_models.unit_rows(N)[own])
    np.testing.assert_array_equal(batch.neighbours[:, 0], DATABASE[own + 1])
    np.testing.assert_array_equal(batch.neighbours[:, 1], DATABASE[own * 2])
    assert batch.reference is not None
    np.testing.assert_allclose(batch.reference, -batch.images, atol=1e-6)


def test_pixels_become_the_range_of_the_model() -> None:
    scaled = to_model_range(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8))
    assert scaled.shape == (1, 3, 1, 1)
    assert scaled.flatten().tolist() == pytest.approx([-1, -0.6, 1])


def test_a_image_is_its_centre_square() -> None:
    wide = Image.new("RGB", (120, 40), "red")
    wide.paste((0, 0, 255), (40, 0, 80, 40))
    array = image_to_array(wide, 8)
    assert (array.shape, array.dtype) == ((8, 8, 3), np.uint8)
    assert np.abs(array.astype(int) - [0, 0, 255]).max() < 20, "no more red than the filter takes from beside the crop"


def test_the_parts_of_a_row_stay_together() -> None:
    batch = training_set().batch(3, seed=5, size=6)
    assert batch.images.shape == (6, 3, 4, 4)
    assert {part.dtype for part in (batch.images, batch.query, batch.neighbours)} == {torch.float32}
    require_lockstep(batch)


@pytest.mark.parametrize("size", [1, 4, 5, 8, 30])
@pytest.mark.parametrize("window_rows", [1, 5, 100])
def test_every_image_comes_once_an_epoch_and_in_lockstep(size: int, window_rows: int) -> None:
    data = training_set(shards(3, 4, 1, 4), window_rows=window_rows)
    for step in range(4):
        require_lockstep(data.batch(step, seed=0, size=size))
    pictures = seen(data, 120 // size, size)
    epochs = [pictures[start : start + N] for start in range(0, 120, N)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(N))] * 10
    assert len({tuple(epoch) for epoch in epochs}) == 10, "every epoch has an order of its own"


def test_the_order_follows_from_the_seed() -> None:
    data = training_set()
    assert seen(data, 6, 4) == seen(training_set(), 6, 4)
    assert seen(data, 6, 4) != seen(data, 6, 4, seed=1)


def test_shards_that_fit_in_one_window_are_shuffled_as_one_set_and_read_once() -> None:
    parts = shards(3, 4, 5)
    assert seen(training_set(parts, window_rows=N), 9, 4) == seen(training_set(), 9, 4)
    assert [part.loads for part in parts] == [1, 1, 1]


def test_a_large_set_comes_window_by_window() -> None:
    data = training_set(shards(*[3] * 4), window_rows=6)
    epochs = np.array(seen(data, 6, N)).reshape(6, 2, 6)  # of two windows each, of two shards each
    held = [[{i // 3 for i in window} for window in epoch] for epoch in epochs.tolist()]
    assert all(len(first) == len(second) == 2 for first, second in held)
    assert len({frozenset(first) for first, _ in held}) > 1, "other shards meet in another epoch"


def test_a_resumed_run_goes_on_with_the_same_rows() -> None:
    unbroken = seen(training_set(shards(3, 4, 5), window_rows=5), 12, 5)
    resumed = training_set(shards(3, 4, 5), window_rows=5)
    assert [i for step in range(7, 12) for i in chosen(resumed.batch(step, seed=0, size=5))] == unbroken[7 * 5 :]


def test_the_window_after_is_read_while_this_one_trains() -> None:
    reading, go = threading.Event(), threading.Event()

    class Slow(Shard):
        def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
            self.loads += 1
            if self.loads == 1 and len(opened) == 1:
                reading.set()
                assert go.wait(10)
            opened.append(self)
            return super().load(chosen)

    opened: list[Shard] = []
    data = training_set([Slow(0, 6), Slow(6, 12)], window_rows=6)
    data.batch(0, seed=0, size=2)
    assert reading.wait(10), "the second window is asked for by the first one's first batch"
    assert len(data.batch(1, seed=0, size=2).images) == 2, "and does not hold it up"
    go.set()
    assert sorted(seen(data, 3, 4)) == list(range(N))


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize("window_rows", [5, 100])
def test_the_parts_make_up_the_global_batch(parts: int, window_rows: int) -> None:
    data = training_set(shards(3, 4, 5), window_rows=window_rows)
    for step in range(7):
        split = [data.batch(step, seed=0, size=18, part=part, parts=parts) for part in range(parts)]
        whole = data.batch(step, seed=0, size=18)
        for name in ("images", "query", "neighbours", "reference"):
            assert torch.equal(torch.cat([getattr(part, name) for part in split]), getattr(whole, name)), (name, step)
        assert {len(part.images) for part in split} == {18 // parts}


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_each_of_several_workers_reads_its_own_rows_of_a_set_that_streams(world: int, pieces: int) -> None:
    workers = [training_set(shards(3, 4, 1, 4), window_rows=5, rank=rank, world=world) for rank in range(world)]
    whole, parts = training_set(shards(3, 4, 1, 4), window_rows=5), world * pieces
    for step in (0, 1, 2, 5, 6):  # of two epochs each; some are left out, as by a resumed run
        split = [workers[part // pieces].batch(step, seed=0, size=24, part=part, parts=parts) for part in range(parts)]
        expected = whole.batch(step, seed=0, size=24)
        for name in ("images", "query", "neighbours", "reference"):
            assert torch.equal(torch.cat([getattr(part, name) for part in split]), getattr(expected, name))


def test_workers_of_a_set_that_streams_share_the_reading() -> None:
    read = [shards(*[6] * 2) for _ in range(3)]
    for rank in range(3):
        data = training_set(read[rank], window_rows=6, rank=rank, world=3)
        for step in range(12):  # three epochs of two windows
            data.batch(step, seed=0, size=3, part=rank, parts=3)
        data._reader.shutdown()  # what is read ahead, too
    assert [sum(shard.loaded for shard in of) for of in read] == [4 * 3 + 2 for _ in range(3)]


def test_each_worker_begins_at_another_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Shard] = []
    load = Shard.load
    monkeypatch.setattr(Shard, "load", lambda self, chosen=None: opened.append(self) or load(self, chosen))
    for rank, order in enumerate(([0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [3, 4, 0, 1, 2])):
        read = shards(3, 2, 4, 1, 2)
        batch = training_set(read, rank=rank, world=3).batch(0, seed=0, size=N, part=rank, parts=3)
        assert [read.index(shard) for shard in opened] == order
        require_lockstep(batch)
        opened.clear()


def test_another_workers_part_is_refused() -> None:
    data = training_set(rank=1, world=2)
    for part, parts in ((0, 1), (0, 2), (1, 4), (2, 3)):
        with pytest.raises(ModelError, match=f"part {part} of {parts} is not of worker 1 of 2"):
            data.batch(0, seed=0, size=12, part=part, parts=parts)
    assert len(data.batch(0, seed=0, size=12, part=2, parts=4).images) == 3


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (np.arange(N * 4, dtype=np.float16).reshape(N, 1, 2, 2), torch.float32),
        (np.arange(N * 4, dtype=np.int32).reshape(N, 4), torch.int64),
    ],
    ids=["latents", "codes"],
)
def test_latents_and_codes_pass_unscaled(stored: NDArray[Any], expected: torch.dtype) -> None:
    made = TrainingRows(pictures=stored, embeddings=rows().embeddings, neighbours=rows().neighbours)
    batch = TrainingSet(made, DATABASE).batch(0, seed=0, size=N)
    assert batch.images.dtype == expected
    assert sorted(batch.images.flatten().tolist()) == list(range(N * 4))
    assert batch.reference is None


@pytest.mark.parametrize(("pictures", "embeddings", "neighbours"), [(2, 3, 3), (3, 2, 3), (3, 3, 2), (0, 0, 0)])
def test_what_does_not_belong_together_is_refused(pictures: int, embeddings: int, neighbours: int) -> None:
    message = f"{pictures} pictures, {embeddings} embeddings and {neighbours} neighbour lists.*rebuild"
    with pytest.raises(ModelError, match=message):
        TrainingRows(
            pictures=np.zeros((pictures, 4, 4, 3), np.uint8),
            embeddings=tiny_models.unit_rows(embeddings),
            neighbours=np.zeros((neighbours, 2), np.int64),
        )
    with pytest.raises(ModelError, match="11 references for 12 pictures"):
        TrainingRows(pictures=rows().pictures, embeddings=rows().embeddings, neighbours=rows().neighbours,
             reference=rows(0, 11).pictures)  # fmt: skip


@pytest.mark.parametrize(
    ("error", "told"), [(torch.OutOfMemoryError(), "out of memory for a window"), (OSError("lost"), "lost")]
)
def test_a_shard_that_could_not_be_read_is_read_again_when_asked_again(error: Exception, told: str) -> None:
    class Failing(Shard):
        def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
            if not self.loads:
                self.loads += 1
                raise error
            return super().load(chosen)

    data = training_set([Failing(0, N)])
    with pytest.raises((ModelError, OSError), match=told):
        data.batch(0, seed=0, size=N)
    assert sorted(chosen(data.batch(0, seed=0, size=N))) == list(range(N))


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing to train on"):
        training_set([])


@pytest.mark.parametrize("beyond", [-1, 2 * N])
def test_neighbours_of_another_database_are_refused(beyond: int) -> None:
    own = rows()
    own.neighbours[3, 1] = beyond
    with pytest.raises(ModelError, match=r"past the database.*another version"):
        training_set(own).batch(0, seed=0, size=1)


def test_joined_rows_are_one_array() -> None:
    joined = ConcatenatedRows([DATABASE[:5], DATABASE[5:6], DATABASE[6:]])
    ids = np.random.default_rng(0).integers(0, 2 * N, (3, 7))
    np.testing.assert_array_equal(joined[ids], DATABASE[ids])
    np.testing.assert_array_equal(joined[:], DATABASE)
    np.testing.assert_array_equal(joined[4:7], DATABASE[4:7])
    assert (len(joined), joined.nbytes) == (2 * N, DATABASE.nbytes)
    for outside in (-1, 2 * N):
        with pytest.raises(IndexError, match=f"asked of {2 * N}"):
            joined[np.array([0, outside])]
    with pytest.raises(ModelError, match="one shape"):
        ConcatenatedRows([DATABASE, DATABASE[:, :4]])


def test_rows_that_do_not_fit_are_read_from_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, joined = torch.tensor([[0, 23], [5, 5]]), ConcatenatedRows([DATABASE[:5], DATABASE[5:]])
    held = NeighbourEmbeddings(joined, "cpu")
    monkeypatch.setattr(NeighbourEmbeddings, "LARGEST", DATABASE.nbytes - 1)
    mapped = NeighbourEmbeddings(joined, "cpu")
    monkeypatch.setattr(ConcatenatedRows, "__getitem__", lambda *_: np.zeros((2, 2, 8), np.float16))
    np.testing.assert_array_equal(held.take(ids), DATABASE[ids].astype(np.float32))
    assert held.take(ids).dtype == torch.float32
    assert not mapped.take(ids).any(), "asked at every call"
