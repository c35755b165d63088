"""Training batches as a function of seed and step only.

Legend: ``n`` images of a shard, ``M`` database rows, ``P`` neighbours of each image, ``D`` embedding width, ``S`` side,
``C s s`` latent.

An epoch visits the shards in random order, grouped into windows of up to ``window_rows`` rows. The rows of a window are
shuffled. The order depends on the seed only. A resumed run therefore needs no state, and the order of images does not
depend on the number of workers.

A set that fits into one window is shuffled as a whole and stays on the device. A larger set is streamed: the next
window is read while batches come from the current one. With several workers, each reads only the rows of its own parts
of the batches.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import ModelError
from model.images import to_model_range
from model.step_random import mix_seeds
from model.training.batch import Batch, concatenate
from model.training.neighbour_rows import NeighbourImages, NeighbourRows, RowArray

WINDOW_ROWS = 1 << 18
_SHARDS, _ROWS = 1, 2  # random streams


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRows:
    """Arrays (n, …) with one entry per training image.

    Attributes:
        images: Images uint8 (n, S, S, 3), float16 latents (n, C, s, s) or integer codes (n, tokens).
        embeddings: (n, D) float16.
        neighbours: (n, P) int64 row ids of the database, nearest first.
        reference: Aligned neighbours uint8 (n, S, S, 3), or None.
        read: Function of the stored images (or references) on the device and the numbers (b,) of training images. It
            returns the images (b, …) of these numbers. With it, several training images can be computed from one of
            ``images``. Default: None, the images of the same numbers.
    """

    images: NDArray[Any]
    embeddings: NDArray[np.float16]
    neighbours: NDArray[np.int64]
    reference: NDArray[np.uint8] | None = None
    read: Callable[[Tensor, Tensor], Tensor] | None = None

    def __len__(self) -> int:
        """Return the number of training images, n."""
        return len(self.embeddings)

    def __post_init__(self) -> None:
        """Raise ``ModelError`` if the arrays are empty or differ in length."""
        images = len(self) if self.read is not None else len(self.images)
        if not images == len(self.embeddings) == len(self.neighbours) > 0:
            counts = f"{len(self.images)} images, {len(self.embeddings)} embeddings"
            raise ModelError(
                f"training rows are empty or differ in number: {counts}, {len(self.neighbours)} neighbour lists; "
                "run the stage again that has too few"
            )
        if self.reference is not None and len(self.reference) != len(self.images):
            raise ModelError(
                f"numbers of references and images differ: {len(self.reference)}, {len(self.images)}; align every image"
            )


class Source(Protocol):
    """Interface of a shard of the training set."""

    @property
    def rows(self) -> int:
        """Number of rows of the shard."""
        ...

    def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
        """Read and decode the shard, or only the ``chosen`` rows (ascending)."""
        ...


class TrainingSet:
    """The training set: images, embeddings and neighbours, loaded window by window."""

    def __init__(
        self,
        shards: Sequence[Source] | TrainingRows,
        database_rows: RowArray,
        *,
        window_rows: int = WINDOW_ROWS,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        database_images: RowArray | None = None,
    ) -> None:
        """Create a training set.

        Args:
            shards: Sources of rows, or the rows themselves.
            database_rows: Embeddings of the database (M, D) float16, memory-mapped if large. The ids of neighbours
                index them.
            window_rows: Maximum number of rows shuffled together; a larger shard is a window of its own. A streamed set
                has two windows in memory. Default: 262,144.
            device: Device of the windows and batches. Default: "cpu".
            rank: Rank of this worker. Default: 0.
            world: Number of workers. Each loads only its own rows of a streamed set. Default: 1.
            database_images: Images of the database (M, S, S, 3) uint8, memory-mapped if large, for a network that takes
                the images of neighbours. Default: None.

        Raises:
            ModelError: There are no shards or no database rows, or the database has more or fewer images than rows.
        """
        self._shards = [_InMemorySource(shards)] if isinstance(shards, TrainingRows) else list(shards)
        if not self._shards or not len(database_rows):
            raise ModelError("the training set is empty; embed at least one image")
        if database_images is not None and len(database_images) != len(database_rows):
            raise ModelError(
                f"numbers of images and rows of the database differ: {len(database_images)}, {len(database_rows)}; "
                "give the image of every row"
            )
        self._database = NeighbourRows(database_rows, device)
        self._database_images = None if database_images is None else NeighbourRows(database_images, device)
        self._device, self._window_rows = torch.device(device), window_rows
        self._rank, self._world = rank, world
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="training-set")
        self._pending: dict[_WindowKey, Future[tuple[TrainingRows, NDArray[np.int64] | None]]] = {}
        self._windows: dict[_WindowKey, _Window] = {}
        self._plans: dict[tuple[int, int], list[_EpochWindow]] = {}
        self._orders: dict[tuple[int, _EpochWindow], Tensor] = {}

    def __len__(self) -> int:
        """Return the number of images, N."""
        return sum(shard.rows for shard in self._shards)

    def batch(self, step: int, *, seed: int, size: int, part: int = 0, parts: int = 1) -> Batch:
        """Return part ``part`` of ``parts`` of the global batch of ``size`` images at ``step``.

        Raises:
            ModelError: The part belongs to another worker, neighbours are out of range, or memory is exhausted.
        """
        if parts % self._world or part * self._world // parts != self._rank:
            raise ModelError(
                f"part {part} of {parts} does not belong to worker {self._rank} of {self._world}; use the training set "
                "of the worker that it belongs to"
            )
        count = size // parts
        pieces = list(self._pieces(step * size + part * count, count, seed, size))
        return pieces[0] if len(pieces) == 1 else concatenate(pieces)

    def _pieces(self, start: int, count: int, seed: int, size: int) -> Iterator[Batch]:
        """Yield batches, usually one, for ``count`` global sample positions from ``start``: one per window."""
        while count:
            window = self._window_at(seed, start)
            available = min(count, window.end - start)
            chosen = self._order(seed, window)[start - window.start :][:available]
            yield self._window(seed, window, size).gather(chosen, self._database, self._database_images)
            start, count = start + available, count - available

    def _window_at(self, seed: int, position: int) -> "_EpochWindow":
        return next(window for window in self._plan(seed, position // len(self)) if position < window.end)

    def _plan(self, seed: int, epoch: int) -> list["_EpochWindow"]:
        if (seed, epoch) not in self._plans:
            self._plans = dict([*self._plans.items()][-1:]) | {(seed, epoch): self._new_plan(seed, epoch)}
        return self._plans[seed, epoch]

    def _new_plan(self, seed: int, epoch: int) -> list["_EpochWindow"]:
        """Return the windows of an epoch. The shards of a window are sorted, so equal sets of shards are equal keys."""
        order = np.random.default_rng(mix_seeds(seed, epoch, _SHARDS)).permutation(len(self._shards))
        windows: list[list[int]] = [[]]
        filled = 0
        for shard in order.tolist():
            rows = self._shards[shard].rows
            if windows[-1] and filled + rows > self._window_rows:
                windows.append([])
                filled = 0
            windows[-1].append(shard)
            filled += rows
        plan, start = [], epoch * len(self)
        for number, window in enumerate(windows):
            rows = sum(self._shards[shard].rows for shard in window)
            plan.append(_EpochWindow(epoch, number, tuple(sorted(window)), start, start + rows))
            start += rows
        return plan

    def _order(self, seed: int, window: "_EpochWindow") -> Tensor:
        """Return the rows of a window in training order, cached on the device."""
        if (seed, window) not in self._orders:
            # Cache two orders, because a step can span two windows.
            self._orders = dict([*self._orders.items()][-1:]) | {(seed, window): window.order(seed).to(self._device)}
        return self._orders[seed, window]

    def _window(self, seed: int, window: "_EpochWindow", size: int) -> "_Window":
        key = self._window_key(seed, window, size)
        if key not in self._windows:
            reading = self._reading(key)
            self._pending.clear()  # a failed read, too, so that a retry reads again
            try:
                rows, own_rows = reading.result()
                self._windows = {key: _Window(rows, own_rows, len(self._database), self._device)}
            except torch.OutOfMemoryError as error:  # a smaller batch would not help
                message = f"out of memory for a window of images: {self._device}"
                raise ModelError(
                    f"{message}; choose a smaller window, batch or network, or a device with more memory"
                ) from error
            following = self._window_key(seed, self._window_at(seed, window.end), size)
            if following != key:
                self._reading(following)
        return self._windows[key]

    def _window_key(self, seed: int, window: "_EpochWindow", size: int) -> "_WindowKey":
        """Return the key of the rows of a window to load: all rows, or this worker's rows of a streamed set.

        A key of all rows is equal in every epoch. A worker's rows depend on seed, window and batch size.
        """
        streams = len(self._plan(seed, window.epoch)) > 1
        return _WindowKey(window.shards, (seed, window, size) if streams and self._world > 1 else None)

    def _reading(self, key: "_WindowKey") -> "Future[tuple[TrainingRows, NDArray[np.int64] | None]]":
        if key not in self._pending:
            self._pending[key] = self._reader.submit(self._load, key)
        return self._pending[key]

    def _load(self, key: "_WindowKey") -> tuple[TrainingRows, NDArray[np.int64] | None]:
        """Load rows. Return them and their positions in the window, ascending, or None for all rows."""
        shards = [self._shards[number] for number in key.shards]
        own_rows = None if key.share is None else self._own_rows(*key.share)
        requests = [(shard, None) for shard in shards] if own_rows is None else _split(own_rows, shards)
        # Each worker starts at another shard, so that workers of one machine fetch different files into its cache.
        first = len(requests) * self._rank // self._world
        loaded = [shard.load(rows) for shard, rows in (*requests[first:], *requests[:first])]
        return _join([*loaded[len(requests) - first :], *loaded[: len(requests) - first]]), own_rows

    def _own_rows(self, seed: int, window: "_EpochWindow", size: int) -> NDArray[np.int64]:
        """Return the rows of the window in this worker's parts of the batches, ascending."""
        worker = np.arange(window.start, window.end) % size * self._world // size
        return np.sort(window.order(seed).numpy()[worker == self._rank])


class _EpochWindow(NamedTuple):
    """A shuffle window of an epoch: its shards, and its range of global sample positions."""

    epoch: int
    number: int
    shards: tuple[int, ...]
    start: int
    end: int

    def order(self, seed: int) -> Tensor:
        """Return the rows of the window in training order."""
        generator = torch.Generator().manual_seed(mix_seeds(seed, self.epoch, _ROWS, self.number))
        return torch.randperm(self.end - self.start, generator=generator)


class _WindowKey(NamedTuple):
    """Key of the loaded rows of a window: all, or one worker's share of (seed, window, global batch size)."""

    shards: tuple[int, ...]
    share: tuple[int, _EpochWindow, int] | None


@dataclasses.dataclass(frozen=True, slots=True)
class _InMemorySource:
    """Rows in memory as a shard."""

    content: TrainingRows

    @property
    def rows(self) -> int:
        return len(self.content)

    def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
        assert chosen is None, "a single shard is never streamed"  # noqa: S101
        return self.content


class _Window:
    """The loaded rows of a window, on the device."""

    def __init__(
        self, rows: TrainingRows, own_rows: NDArray[np.int64] | None, database_rows: int, device: torch.device
    ) -> None:
        if rows.neighbours.min() < 0 or rows.neighbours.max() >= database_rows:
            raise ModelError(
                f"neighbour ids are out of range: {rows.neighbours.min()} to {rows.neighbours.max()} for "
                f"{database_rows} database rows; search the neighbours again in this version of the database"
            )
        self._images = torch.from_numpy(rows.images).to(device)
        self._embeddings = torch.from_numpy(rows.embeddings).to(device)
        self._neighbours = torch.from_numpy(rows.neighbours).to(device)
        self._reference = None if rows.reference is None else torch.from_numpy(rows.reference).to(device)
        self._own_rows = None if own_rows is None else torch.from_numpy(own_rows).to(device)
        self._read = rows.read or (lambda stored, chosen: stored[chosen])

    def gather(self, chosen: Tensor, database: NeighbourRows, images: NeighbourRows | None) -> Batch:
        """Return a batch of the ``chosen`` rows, which are positions in the whole window."""
        if self._own_rows is not None:
            chosen = torch.searchsorted(self._own_rows, chosen)
        ids = self._neighbours[chosen]
        return Batch(
            images=_to_target(self._read(self._images, chosen)),
            query=self._embeddings[chosen].float(),
            neighbours=database.lookup(ids).float(),
            reference=None if self._reference is None else to_model_range(self._read(self._reference, chosen)),
            neighbour_images=None if images is None else NeighbourImages(ids=ids, rows=images),
        )


def _to_target(stored: Tensor) -> Tensor:
    """Convert stored images to targets: pixels to [−1, 1], latents to float32, codes to int64."""
    if stored.ndim == 2:
        return stored.long()
    return to_model_range(stored) if stored.dtype == torch.uint8 else stored.float()


def _split(rows: NDArray[np.int64], shards: list[Source]) -> list[tuple[Source, NDArray[np.int64] | None]]:
    """Split ascending rows (n,) of concatenated shards into rows of each shard, without shards that have none."""
    ends = np.cumsum([shard.rows for shard in shards])
    cuts = np.split(rows, np.searchsorted(rows, ends[:-1]))
    return [(shard, cut - (end - shard.rows)) for shard, cut, end in zip(shards, cuts, ends, strict=True) if len(cut)]


def _join(loaded: list[TrainingRows]) -> TrainingRows:
    if len(loaded) == 1:
        return loaded[0]
    if any(rows.read is not None for rows in loaded):
        raise ModelError("images that are computed when they are read belong to one shard; join them before")
    references = [rows.reference for rows in loaded if rows.reference is not None]
    return TrainingRows(
        images=np.concatenate([rows.images for rows in loaded]),
        embeddings=np.concatenate([rows.embeddings for rows in loaded]),
        neighbours=np.concatenate([rows.neighbours for rows in loaded]),
        reference=np.concatenate(references) if references else None,
    )
