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
from model.retrieval.concatenated_rows import ConcatenatedRows
from model.training.batch import Batch
from model.training.data import TrainingRows, TrainingSet
from model.training.neighbour_rows import NeighbourRows

N = 12
DATABASE = tiny_models.unit_rows(2 * N, seed=1)


def rows(first: int = 0, last: int = N) -> TrainingRows:
    """Return rows: image i is constant grey 20·i, its embedding is row i, its neighbours are rows i + 1 and 2·i."""
    own = np.arange(first, last)
    pixels = np.repeat(own.astype(np.uint8) * 20, 4 * 4 * 3).reshape(len(own), 4, 4, 3)
    neighbours = np.stack([own + 1, own * 2], axis=1)
    return TrainingRows(
        images=pixels, embeddings=tiny_models.unit_rows(N)[first:last], neighbours=neighbours, reference=255 - pixels
    )


class Shard:
    """Source that counts its loads and the loaded rows."""

    def __init__(self, first: int, last: int) -> None:
        self._content, self.rows, self.loads, self.loaded = rows(first, last), last - first, 0, 0

    def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
        self.loads += 1
        self.loaded += self.rows if chosen is None else len(chosen)
        if chosen is None:
            return self._content
        assert (np.diff(chosen) > 0).all()
        arrays = {field.name: getattr(self._content, field.name) for field in dataclasses.fields(TrainingRows)}
        return TrainingRows(**{name: array[chosen] for name, array in arrays.items() if array is not None})


def shards(*sizes: int) -> list[Shard]:
    ends = np.cumsum(sizes).tolist()
    return [Shard(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def training_set(shards: Any = None, **options: Any) -> TrainingSet:
    return TrainingSet(rows() if shards is None else shards, DATABASE, **options)


def images_in(batch: Batch) -> list[int]:
    """Return the numbers of the images of a batch."""
    own: list[int] = ((batch.images[:, 0, 0, 0] + 1) * 127.5 / 20).round().int().tolist()
    return own


def images_of_steps(data: TrainingSet, steps: int, size: int, **options: Any) -> list[int]:
    return [i for step in range(steps) for i in images_in(data.batch(step, size=size, **{"seed": 0} | options))]


def require_consistent(batch: Batch) -> None:
    """Assert that images, embeddings, neighbours and references belong to the same rows."""
    own = np.array(images_in(batch))
    np.testing.assert_array_equal(batch.query, tiny_models.unit_rows(N)[own])
    np.testing.assert_array_equal(batch.neighbours[:, 0], DATABASE[own + 1])
    np.testing.assert_array_equal(batch.neighbours[:, 1], DATABASE[own * 2])
    assert batch.reference is not None
    np.testing.assert_allclose(batch.reference, -batch.images, atol=1e-6)


def test_to_model_range_scales_pixels() -> None:
    scaled = to_model_range(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8))
    assert scaled.shape == (1, 3, 1, 1)
    assert scaled.flatten().tolist() == pytest.approx([-1, -0.6, 1])


def test_image_to_array_crops_the_centre_square() -> None:
    wide = Image.new("RGB", (120, 40), "red")
    wide.paste((0, 0, 255), (40, 0, 80, 40))
    array = image_to_array(wide, 8)
    assert (array.shape, array.dtype) == ((8, 8, 3), np.uint8)
    assert np.abs(array.astype(int) - [0, 0, 255]).max() < 20, (
        "only as much red as the resize filter takes from outside the crop"
    )


def test_training_set_batch_is_consistent_float32() -> None:
    batch = training_set().batch(3, seed=5, size=6)
    assert batch.images.shape == (6, 3, 4, 4)
    assert {part.dtype for part in (batch.images, batch.query, batch.neighbours)} == {torch.float32}
    require_consistent(batch)


@pytest.mark.parametrize("size", [1, 4, 5, 8, 30])
@pytest.mark.parametrize("window_rows", [1, 5, 100])
def test_training_set_yields_every_image_once_per_epoch(size: int, window_rows: int) -> None:
    data = training_set(shards(3, 4, 1, 4), window_rows=window_rows)
    for step in range(4):
        require_consistent(data.batch(step, seed=0, size=size))
    images = images_of_steps(data, 120 // size, size)
    epochs = [images[start : start + N] for start in range(0, 120, N)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(N))] * 10
    assert len({tuple(epoch) for epoch in epochs}) == 10, "every epoch has another order"


def test_training_set_order_depends_only_on_the_seed() -> None:
    data = training_set()
    assert images_of_steps(data, 6, 4) == images_of_steps(training_set(), 6, 4)
    assert images_of_steps(data, 6, 4) != images_of_steps(data, 6, 4, seed=1)


def test_training_set_shards_of_one_window_are_shuffled_together_and_read_once() -> None:
    parts = shards(3, 4, 5)
    assert images_of_steps(training_set(parts, window_rows=N), 9, 4) == images_of_steps(training_set(), 9, 4)
    assert [part.loads for part in parts] == [1, 1, 1]


def test_training_set_large_set_is_streamed_in_windows() -> None:
    data = training_set(shards(*[3] * 4), window_rows=6)
    epochs = np.array(images_of_steps(data, 6, N)).reshape(6, 2, 6)  # two windows of two shards each
    window_shards = [[{i // 3 for i in window} for window in epoch] for epoch in epochs.tolist()]
    assert all(len(first) == len(second) == 2 for first, second in window_shards)
    assert len({frozenset(first) for first, _ in window_shards}) > 1, "epochs combine different shards"


def test_training_set_resumed_run_has_the_same_rows() -> None:
    uninterrupted = images_of_steps(training_set(shards(3, 4, 5), window_rows=5), 12, 5)
    resumed = training_set(shards(3, 4, 5), window_rows=5)
    assert [i for step in range(7, 12) for i in images_in(resumed.batch(step, seed=0, size=5))] == uninterrupted[
        7 * 5 :
    ]


def test_training_set_reads_the_next_window_during_the_current_one() -> None:
    reading, resume = threading.Event(), threading.Event()

    class Slow(Shard):
        def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
            self.loads += 1
            if self.loads == 1 and len(opened) == 1:
                reading.set()
                assert resume.wait(10)
            opened.append(self)
            return super().load(chosen)

    opened: list[Shard] = []
    data = training_set([Slow(0, 6), Slow(6, 12)], window_rows=6)
    data.batch(0, seed=0, size=2)
    assert reading.wait(10), "the first batch of the first window starts to read the second"
    assert len(data.batch(1, seed=0, size=2).images) == 2, "reading does not block batches"
    resume.set()
    assert sorted(images_of_steps(data, 3, 4)) == list(range(N))


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize("window_rows", [5, 100])
def test_training_set_parts_concatenate_to_the_global_batch(parts: int, window_rows: int) -> None:
    data = training_set(shards(3, 4, 5), window_rows=window_rows)
    for step in range(7):
        split = [data.batch(step, seed=0, size=18, part=part, parts=parts) for part in range(parts)]
        whole = data.batch(step, seed=0, size=18)
        for name in ("images", "query", "neighbours", "reference"):
            assert torch.equal(torch.cat([getattr(part, name) for part in split]), getattr(whole, name)), (name, step)
        assert {len(part.images) for part in split} == {18 // parts}


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_training_set_workers_of_a_streamed_set_get_their_parts(world: int, pieces: int) -> None:
    workers = [training_set(shards(3, 4, 1, 4), window_rows=5, rank=rank, world=world) for rank in range(world)]
    whole, parts = training_set(shards(3, 4, 1, 4), window_rows=5), world * pieces
    for step in (0, 1, 2, 5, 6):  # two epochs each; steps are skipped, as by a resumed run
        split = [workers[part // pieces].batch(step, seed=0, size=24, part=part, parts=parts) for part in range(parts)]
        expected = whole.batch(step, seed=0, size=24)
        for name in ("images", "query", "neighbours", "reference"):
            assert torch.equal(torch.cat([getattr(part, name) for part in split]), getattr(expected, name))


def test_training_set_workers_of_a_streamed_set_load_only_their_rows() -> None:
    sources = [shards(*[6] * 2) for _ in range(3)]
    for rank in range(3):
        data = training_set(sources[rank], window_rows=6, rank=rank, world=3)
        for step in range(12):  # three epochs of two windows
            data.batch(step, seed=0, size=3, part=rank, parts=3)
        data._reader.shutdown()  # wait for the window that is read ahead
    assert [sum(shard.loaded for shard in own) for own in sources] == [4 * 3 + 2 for _ in range(3)]


def test_training_set_workers_start_at_different_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Shard] = []
    load = Shard.load
    monkeypatch.setattr(Shard, "load", lambda self, chosen=None: opened.append(self) or load(self, chosen))
    for rank, order in enumerate(([0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [3, 4, 0, 1, 2])):
        sources = shards(3, 2, 4, 1, 2)
        batch = training_set(sources, rank=rank, world=3).batch(0, seed=0, size=N, part=rank, parts=3)
        assert [sources.index(shard) for shard in opened] == order
        require_consistent(batch)
        opened.clear()


def test_training_set_part_of_another_worker_raises() -> None:
    data = training_set(rank=1, world=2)
    for part, parts in ((0, 1), (0, 2), (1, 4), (2, 3)):
        with pytest.raises(ModelError, match=f"part {part} of {parts} does not belong to worker 1 of 2"):
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
def test_training_set_latents_and_codes_are_not_scaled(stored: NDArray[Any], expected: torch.dtype) -> None:
    content = TrainingRows(images=stored, embeddings=rows().embeddings, neighbours=rows().neighbours)
    batch = TrainingSet(content, DATABASE).batch(0, seed=0, size=N)
    assert batch.images.dtype == expected
    assert sorted(batch.images.flatten().tolist()) == list(range(N * 4))
    assert batch.reference is None


def test_training_rows_with_read_compute_several_images_from_a_stored_one() -> None:
    stored = rows(0, 4)

    def read(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return images[numbers // 3] + (numbers % 3)[:, None, None, None].byte()

    content = dataclasses.replace(rows(), images=stored.images, reference=stored.reference, read=read)
    assert len(content) == N
    batch = TrainingSet(content, DATABASE).batch(0, seed=0, size=N)
    assert batch.reference is not None
    levels = ((torch.stack([batch.images, batch.reference]) + 1) * 127.5).round()[:, :, 0, 0, 0].int()
    expected = [(20 * (i // 3) + i % 3, (255 - 20 * (i // 3) + i % 3) % 256) for i in range(N)]
    assert sorted(map(tuple, levels.T.tolist())) == sorted(expected)
    with pytest.raises(ModelError, match="belong to one shard"):
        TrainingSet([_Shard(content), _Shard(content)], DATABASE).batch(0, seed=0, size=2)


@dataclasses.dataclass
class _Shard:
    """Source of rows in memory."""

    content: TrainingRows
    rows: int = N

    def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
        assert chosen is None
        return self.content


@pytest.mark.parametrize(("images", "embeddings", "neighbours"), [(2, 3, 3), (3, 2, 3), (3, 3, 2), (0, 0, 0)])
def test_training_rows_different_lengths_raise(images: int, embeddings: int, neighbours: int) -> None:
    message = f"{images} images, {embeddings} embeddings, {neighbours} neighbour lists; run the stage again"
    with pytest.raises(ModelError, match=message):
        TrainingRows(
            images=np.zeros((images, 4, 4, 3), np.uint8),
            embeddings=tiny_models.unit_rows(embeddings),
            neighbours=np.zeros((neighbours, 2), np.int64),
        )
    with pytest.raises(ModelError, match="references and images differ: 11, 12"):
        TrainingRows(images=rows().images, embeddings=rows().embeddings, neighbours=rows().neighbours,
             reference=rows(0, 11).images)  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message"), [(torch.OutOfMemoryError(), "out of memory for a window"), (OSError("lost"), "lost")]
)
def test_training_set_failed_read_is_retried_at_the_next_call(error: Exception, message: str) -> None:
    class Failing(Shard):
        def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
            if not self.loads:
                self.loads += 1
                raise error
            return super().load(chosen)

    data = training_set([Failing(0, N)])
    with pytest.raises((ModelError, OSError), match=message):
        data.batch(0, seed=0, size=N)
    assert sorted(images_in(data.batch(0, seed=0, size=N))) == list(range(N))


def test_training_set_without_shards_raises() -> None:
    with pytest.raises(ModelError, match="training set is empty"):
        training_set([])


@pytest.mark.parametrize("beyond", [-1, 2 * N])
def test_training_set_neighbours_of_another_database_raise(beyond: int) -> None:
    own = rows()
    own.neighbours[3, 1] = beyond
    with pytest.raises(ModelError, match=r"neighbour ids are out of range: .*this version"):
        training_set(own).batch(0, seed=0, size=1)


def test_concatenated_rows_equal_one_array() -> None:
    joined = ConcatenatedRows([DATABASE[:5], DATABASE[5:6], DATABASE[6:]])
    ids = np.random.default_rng(0).integers(0, 2 * N, (3, 7))
    np.testing.assert_array_equal(joined[ids], DATABASE[ids])
    np.testing.assert_array_equal(joined[:], DATABASE)
    np.testing.assert_array_equal(joined[4:7], DATABASE[4:7])
    assert (len(joined), joined.nbytes) == (2 * N, DATABASE.nbytes)
    for outside in (-1, 2 * N):
        with pytest.raises(IndexError, match=f"there are {2 * N} rows"):
            joined[np.array([0, outside])]
    with pytest.raises(ModelError, match="cannot concatenate rows"):
        ConcatenatedRows([DATABASE, DATABASE[:, :4]])


def test_neighbour_rows_too_large_are_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, joined = torch.tensor([[0, 23], [5, 5]]), ConcatenatedRows([DATABASE[:5], DATABASE[5:]])
    resident = NeighbourRows(joined, "cpu")
    monkeypatch.setattr(NeighbourRows, "MAX_RESIDENT_BYTES", DATABASE.nbytes - 1)
    mapped = NeighbourRows(joined, "cpu")
    monkeypatch.setattr(ConcatenatedRows, "__getitem__", lambda *_: np.zeros((2, 2, 8), np.float16))
    np.testing.assert_array_equal(resident.lookup(ids), DATABASE[ids])
    assert not mapped.lookup(ids).any(), "the rows are read at every call"
