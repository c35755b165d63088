"""What the loop is fed: batches that depend on the seed and the step alone.

Legend: ``N`` pictures, ``M`` database rows, ``B`` global batch, ``b`` a part of it, ``P`` neighbours searched for each
picture, ``D`` embedding width, ``S`` side.

An epoch is the shards in a random order, cut into windows of as many rows as fit, each window's rows in a random order.
All of it follows from the seed, so a resumed run needs no state and another number of workers sees the same pictures in
the same order. A set that fits in one window is shuffled as a whole and stays where it is: in memory or on the device.
A larger one streams: pictures, embeddings and neighbours of the next window are read while this one trains, by each of
several workers those of its own parts alone.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import ModelError
from model.images import to_model_range
from model.step_random import mix_seeds
from model.training.batch import Batch
from model.training.neighbour_rows import NeighbourEmbeddings, RowArray

WINDOW_ROWS = 1 << 18
_SHARDS, _ROWS = 1, 2  # streams of randomness


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRows:
    """Rows in lockstep, each array (n, …).

    Attributes:
        pictures: uint8 (n, S, S, 3), float16 latents (n, C, s, s) or integer codes (n, tokens).
        embeddings: (n, D) float16.
        neighbours: (n, P) int64 rows of the database.
        reference: uint8 (n, S, S, 3) or None.
    """

    pictures: NDArray[Any]
    embeddings: NDArray[np.float16]
    neighbours: NDArray[np.int64]
    reference: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        """Refuse rows that do not belong together."""
        if not len(self.pictures) == len(self.embeddings) == len(self.neighbours) > 0:
            counts = f"{len(self.pictures)} pictures, {len(self.embeddings)} embeddings"
            raise ModelError(
                f"{counts} and {len(self.neighbours)} neighbour lists do not belong together; "
                "rebuild the stage that is shorter"
            )
        if self.reference is not None and len(self.reference) != len(self.pictures):
            raise ModelError(f"{len(self.reference)} references for {len(self.pictures)} pictures; align all of them")


class Source(Protocol):
    """A shard of the training set."""

    @property
    def rows(self) -> int:
        """How many rows ``load`` returns."""
        ...

    def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
        """Read and decode the shard, or those rows of it that are ``chosen``, ascending."""
        ...


class TrainingSet:
    """Pictures, their embeddings and their neighbours, window after window."""

    def __init__(
        self,
        shards: Sequence[Source] | TrainingRows,
        database_rows: RowArray,
        *,
        window_rows: int = WINDOW_ROWS,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Feed from ``shards``, with the database's rows (M, D) float16, memory-mapped if large.

        Args:
            shards: where rows come from, or the rows themselves.
            database_rows: what the neighbours point into.
            window_rows: rows that are shuffled together; two windows are in memory when there are several.
            device: where a window is held and batches are made.
            rank: this worker.
            world: workers; of a set that streams each holds only what its own parts of the batches need.
        """
        self._shards = [_Held(shards)] if isinstance(shards, TrainingRows) else list(shards)
        if not self._shards or not len(database_rows):
            raise ModelError("there is nothing to train on; embed at least one picture")
        self._database = NeighbourEmbeddings(database_rows, device)
        self._device, self._window_rows = torch.device(device), window_rows
        self._rank, self._world = rank, world
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="training-set")
        self._read: dict[_Wanted, Future[tuple[TrainingRows, NDArray[np.int64] | None]]] = {}
        self._windows: dict[_Wanted, _Window] = {}
        self._plans: dict[tuple[int, int], list[_Place]] = {}
        self._orders: dict[tuple[int, _Place], Tensor] = {}

    def __len__(self) -> int:
        """N."""
        return sum(shard.rows for shard in self._shards)

    def batch(self, step: int, *, seed: int, size: int, part: int = 0, parts: int = 1) -> Batch:
        """Part ``part`` of ``parts`` of the global batch of ``size`` pictures at ``step``.

        Raises ``ModelError`` for a part that is another worker's.
        """
        if parts % self._world or part * self._world // parts != self._rank:
            raise ModelError(f"part {part} of {parts} is not of worker {self._rank} of {self._world}; ask its own set")
        count = size // parts
        pieces = list(self._pieces(step * size + part * count, count, seed, size))
        return pieces[0] if len(pieces) == 1 else _concatenate(pieces)

    def _pieces(self, start: int, count: int, seed: int, size: int) -> Iterator[Batch]:
        """The batches, mostly one, that positions ``start`` … of an endless row of epochs fall into."""
        while count:
            place = self._place(seed, start)
            taken = min(count, place.end - start)
            chosen = self._order(seed, place)[start - place.start :][:taken]
            yield self._window(seed, place, size).take(chosen, self._database)
            start, count = start + taken, count - taken

    def _place(self, seed: int, position: int) -> "_Place":
        return next(place for place in self._plan(seed, position // len(self)) if position < place.end)

    def _plan(self, seed: int, epoch: int) -> list["_Place"]:
        if (seed, epoch) not in self._plans:
            self._plans = dict([*self._plans.items()][-1:]) | {(seed, epoch): self._new_plan(seed, epoch)}
        return self._plans[seed, epoch]

    def _new_plan(self, seed: int, epoch: int) -> list["_Place"]:
        """The windows of an epoch; shards of a window sorted, so that a window is a set."""
        order = np.random.default_rng(mix_seeds(seed, epoch, _SHARDS)).permutation(len(self._shards))
        windows: list[list[int]] = [[]]
        held = 0
        for shard in order.tolist():
            rows = self._shards[shard].rows
            if windows[-1] and held + rows > self._window_rows:
                windows.append([])
                held = 0
            windows[-1].append(shard)
            held += rows
        places, start = [], epoch * len(self)
        for number, window in enumerate(windows):
            rows = sum(self._shards[shard].rows for shard in window)
            places.append(_Place(epoch, number, tuple(sorted(window)), start, start + rows))
            start += rows
        return places

    def _order(self, seed: int, place: "_Place") -> Tensor:
        """The rows of a window in the order of training."""
        if (seed, place) not in self._orders:
            # Two are kept: a step can span two windows.
            self._orders = dict([*self._orders.items()][-1:]) | {(seed, place): place.order(seed).to(self._device)}
        return self._orders[seed, place]

    def _window(self, seed: int, place: "_Place", size: int) -> "_Window":
        wanted = self._wanted(seed, place, size)
        if wanted not in self._windows:
            reading = self._reading(wanted)
            self._read.clear()  # of one that fails, too: another try reads again
            try:
                rows, own = reading.result()
                self._windows = {wanted: _Window(rows, own, len(self._database), self._device)}
            except torch.OutOfMemoryError as error:  # no smaller step would help
                told = f"{self._device} is out of memory for a window of pictures, or for encoding them"
                raise ModelError(f"{told}; choose a smaller window, batch or network, or a device with more") from error
            following = self._wanted(seed, self._place(seed, place.end), size)
            if following != wanted:
                self._reading(following)
        return self._windows[wanted]

    def _wanted(self, seed: int, place: "_Place", size: int) -> "_Wanted":
        """All rows of the window, the same in every epoch; or, of several and for several workers, this one's."""
        streams = len(self._plan(seed, place.epoch)) > 1
        return _Wanted(place.shards, (seed, place, size) if streams and self._world > 1 else None)

    def _reading(self, wanted: "_Wanted") -> "Future[tuple[TrainingRows, NDArray[np.int64] | None]]":
        if wanted not in self._read:
            self._read[wanted] = self._reader.submit(self._load, wanted)
        return self._read[wanted]

    def _load(self, wanted: "_Wanted") -> tuple[TrainingRows, NDArray[np.int64] | None]:
        """The rows, and which of the window they are, ascending (None: all)."""
        shards = [self._shards[number] for number in wanted.shards]
        own = None if wanted.share is None else self._own(*wanted.share)
        asked = [(shard, None) for shard in shards] if own is None else _cut(own, shards)
        # Each worker begins at another shard: what is made of one and kept is made once on a machine.
        first = len(asked) * self._rank // self._world
        loaded = [shard.load(rows) for shard, rows in (*asked[first:], *asked[:first])]
        return _join([*loaded[len(asked) - first :], *loaded[: len(asked) - first]]), own

    def _own(self, seed: int, place: "_Place", size: int) -> NDArray[np.int64]:
        """The window's rows that fall into this worker's parts of the batches, ascending."""
        worker = np.arange(place.start, place.end) % size * self._world // size
        return np.sort(place.order(seed).numpy()[worker == self._rank])


class _Place(NamedTuple):
    """A window of shards, and the positions in an endless row of epochs that its rows come at."""

    epoch: int
    number: int
    shards: tuple[int, ...]
    start: int
    end: int

    def order(self, seed: int) -> Tensor:
        """The window's rows in the order of training."""
        generator = torch.Generator().manual_seed(mix_seeds(seed, self.epoch, _ROWS, self.number))
        return torch.randperm(self.end - self.start, generator=generator)


class _Wanted(NamedTuple):
    """What is held of a window: all, or of (seed, place, global batch) what is this worker's."""

    shards: tuple[int, ...]
    share: tuple[int, _Place, int] | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """Rows that are already there, as a shard."""

    held: TrainingRows

    @property
    def rows(self) -> int:
        return len(self.held.pictures)

    def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
        assert chosen is None, "a shard alone does not stream"  # noqa: S101
        return self.held


class _Window:
    """Rows on the device."""

    def __init__(
        self, rows: TrainingRows, own: NDArray[np.int64] | None, database_rows: int, device: torch.device
    ) -> None:
        if rows.neighbours.min() < 0 or rows.neighbours.max() >= database_rows:
            raise ModelError("the neighbours point past the database; they were searched in another version of it")
        self._pictures = torch.from_numpy(rows.pictures).to(device)
        self._embeddings = torch.from_numpy(rows.embeddings).to(device)
        self._neighbours = torch.from_numpy(rows.neighbours).to(device)
        self._reference = None if rows.reference is None else torch.from_numpy(rows.reference).to(device)
        self._own = None if own is None else torch.from_numpy(own).to(device)

    def take(self, chosen: Tensor, database: NeighbourEmbeddings) -> Batch:
        """The rows that are ``chosen`` of the whole window."""
        if self._own is not None:
            chosen = torch.searchsorted(self._own, chosen)
        return Batch(
            images=_to_target(self._pictures[chosen]),
            query=self._embeddings[chosen].float(),
            neighbours=database.take(self._neighbours[chosen]),
            reference=None if self._reference is None else to_model_range(self._reference[chosen]),
        )


def _concatenate(pieces: list[Batch]) -> Batch:
    references = [piece.reference for piece in pieces if piece.reference is not None]
    return Batch(
        images=torch.cat([piece.images for piece in pieces]),
        query=torch.cat([piece.query for piece in pieces]),
        neighbours=torch.cat([piece.neighbours for piece in pieces]),
        reference=torch.cat(references) if references else None,
    )


def _to_target(stored: Tensor) -> Tensor:
    """Stored pictures as the objective wants them: pixels scaled, latents float32, codes int64."""
    if stored.ndim == 2:
        return stored.long()
    return to_model_range(stored) if stored.dtype == torch.uint8 else stored.float()


def _cut(rows: NDArray[np.int64], shards: list[Source]) -> list[tuple[Source, NDArray[np.int64] | None]]:
    """The ascending rows (n,) of shards one after the other, as each shard that has any counts its own."""
    ends = np.cumsum([shard.rows for shard in shards])
    cuts = np.split(rows, np.searchsorted(rows, ends[:-1]))
    return [(shard, cut - (end - shard.rows)) for shard, cut, end in zip(shards, cuts, ends, strict=True) if len(cut)]


def _join(loaded: list[TrainingRows]) -> TrainingRows:
    if len(loaded) == 1:
        return loaded[0]
    references = [rows.reference for rows in loaded if rows.reference is not None]
    return TrainingRows(
        pictures=np.concatenate([rows.pictures for rows in loaded]),
        embeddings=np.concatenate([rows.embeddings for rows in loaded]),
        neighbours=np.concatenate([rows.neighbours for rows in loaded]),
        reference=np.concatenate(references) if references else None,
    )
