"""What the loop is fed: batches that depend on the seed and the step alone.

Legend: ``N`` pictures, ``M`` database rows, ``B`` global batch, ``b`` a part of it, ``P`` neighbours searched for each
picture, ``D`` embedding width, ``S`` side.

An epoch is the shards in a random order, cut into windows of as many rows as fit, each window's rows in a random order.
All of it follows from the seed, so a resumed run needs no state and another number of workers sees the same pictures in
the same order. A set that fits in one window is shuffled as a whole and stays where it is: in memory or on the device.
A larger one streams: pictures, embeddings and neighbours of the next window are read while this one trains.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from model.draws import mixed_seed
from model.errors import ModelError
from model.training.database_rows import DatabaseRows, Rows16

WINDOW_ROWS = 1 << 18
_SHARDS, _ROWS = 1, 2  # streams of randomness


def picture_to_array(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """An RGB picture to (side, side, 3) uint8: the centre square, as CLIP's own preprocessing takes it."""
    return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS), dtype=np.uint8)


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) to float32 (B, 3, S, S) in [−1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(pictures: Tensor) -> NDArray[np.uint8]:
    """float32 (B, 3, S, S) in [−1, 1], on the CPU, to uint8 (B, S, S, 3): the way back."""
    pixels: NDArray[np.uint8] = ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One worker's part of a step, on the training device.

    Attributes:
        images: (b, 3, S, S) float32 in [−1, 1], (b, C, s, s) latents, or (b, n) int64 codes.
        query: (b, D) float32 unit rows.
        neighbours: (b, P, D) float32 unit rows, nearest first.
        reference: (b, 3, S, S) in [−1, 1], the aligned first neighbours that editing trains with, or None.
    """

    images: Tensor
    query: Tensor
    neighbours: Tensor
    reference: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
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

    def load(self) -> Rows:
        """Read and decode the shard."""
        ...


class TrainingSet:
    """Pictures, their embeddings and their neighbours, window after window."""

    def __init__(
        self,
        shards: Sequence[Source] | Rows,
        database_rows: Rows16,
        *,
        window_rows: int = WINDOW_ROWS,
        device: torch.device | str = "cpu",
    ) -> None:
        """Feed from ``shards``, with the database's rows (M, D) float16, memory-mapped if large.

        Args:
            shards: where rows come from, or the rows themselves.
            database_rows: what the neighbours point into.
            window_rows: rows held at a time; two windows are in memory when there are several.
            device: where a window is held and batches are made.
        """
        self._shards = [_Held(shards)] if isinstance(shards, Rows) else list(shards)
        if not self._shards or not len(database_rows):
            raise ModelError("there is nothing to train on; embed at least one picture")
        self._database = DatabaseRows(database_rows, device)
        self._device, self._window_rows = torch.device(device), window_rows
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="training-set")
        self._read: dict[tuple[int, ...], Future[Rows]] = {}
        self._windows: dict[tuple[int, ...], _Window] = {}
        self._plans: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        self._orders: dict[tuple[int, int, int], Tensor] = {}

    def __len__(self) -> int:
        """N."""
        return sum(shard.rows for shard in self._shards)

    def batch(self, step: int, *, seed: int, size: int, part: int = 0, parts: int = 1) -> Batch:
        """Part ``part`` of ``parts`` of the global batch of ``size`` pictures at ``step``."""
        count = size // parts
        pieces = list(self._pieces(step * size + part * count, count, seed))
        return pieces[0] if len(pieces) == 1 else _concatenate(pieces)

    def _pieces(self, start: int, count: int, seed: int) -> Iterator[Batch]:
        """The batches, mostly one, that positions ``start`` … of an endless row of epochs fall into."""
        while count:
            epoch, offset = divmod(start, len(self))
            windows = self._plan(seed, epoch)
            sizes = [sum(self._shards[shard].rows for shard in window) for window in windows]
            number = 0
            while offset >= sizes[number]:
                offset -= sizes[number]
                number += 1
            taken = min(count, sizes[number] - offset)
            order = self._order(seed, epoch, number, sizes[number])
            following = windows[number + 1] if number + 1 < len(windows) else self._plan(seed, epoch + 1)[0]
            yield self._window(windows[number], following).take(order[offset : offset + taken], self._database)
            start, count = start + taken, count - taken

    def _plan(self, seed: int, epoch: int) -> list[tuple[int, ...]]:
        if (seed, epoch) not in self._plans:
            self._plans = dict([*self._plans.items()][-1:]) | {(seed, epoch): self._new_plan(seed, epoch)}
        return self._plans[seed, epoch]

    def _new_plan(self, seed: int, epoch: int) -> list[tuple[int, ...]]:
        """The windows of an epoch as tuples of shard numbers; shards of a window sorted, so that a window is a set."""
        order = np.random.default_rng(mixed_seed(seed, epoch, _SHARDS)).permutation(len(self._shards))
        windows: list[list[int]] = [[]]
        held = 0
        for shard in order.tolist():
            rows = self._shards[shard].rows
            if windows[-1] and held + rows > self._window_rows:
                windows.append([])
                held = 0
            windows[-1].append(shard)
            held += rows
        return [tuple(sorted(window)) for window in windows]

    def _order(self, seed: int, epoch: int, window: int, rows: int) -> Tensor:
        """The rows of a window in the order of training."""
        key = (seed, epoch, window)
        if key not in self._orders:
            generator = torch.Generator().manual_seed(mixed_seed(seed, epoch, _ROWS, window))
            # Two are kept: a step can span two windows.
            self._orders = dict([*self._orders.items()][-1:]) | {
                key: torch.randperm(rows, generator=generator).to(self._device)
            }
        return self._orders[key]

    def _window(self, window: tuple[int, ...], following: tuple[int, ...]) -> "_Window":
        if window not in self._windows:
            rows = self._reading(window).result()
            self._read.pop(window)
            self._windows = {window: _Window(rows, len(self._database), self._device)}
            if following != window:
                self._reading(following)
        return self._windows[window]

    def _reading(self, window: tuple[int, ...]) -> Future[Rows]:
        if window not in self._read:
            self._read[window] = self._reader.submit(_join, [self._shards[shard] for shard in window])
        return self._read[window]


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """Rows that are already there, as a shard."""

    held: Rows

    @property
    def rows(self) -> int:
        return len(self.held.pictures)

    def load(self) -> Rows:
        return self.held


class _Window:
    """Rows on the device."""

    def __init__(self, rows: Rows, database_rows: int, device: torch.device) -> None:
        if rows.neighbours.min() < 0 or rows.neighbours.max() >= database_rows:
            raise ModelError("the neighbours point past the database; they were searched in another version of it")
        self._pictures = torch.from_numpy(rows.pictures).to(device)
        self._embeddings = torch.from_numpy(rows.embeddings).to(device)
        self._neighbours = torch.from_numpy(rows.neighbours).to(device)
        self._reference = None if rows.reference is None else torch.from_numpy(rows.reference).to(device)

    def take(self, chosen: Tensor, database: DatabaseRows) -> Batch:
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


def _join(shards: list[Source]) -> Rows:
    loaded = [shard.load() for shard in shards]
    if len(loaded) == 1:
        return loaded[0]
    references = [rows.reference for rows in loaded if rows.reference is not None]
    return Rows(
        pictures=np.concatenate([rows.pictures for rows in loaded]),
        embeddings=np.concatenate([rows.embeddings for rows in loaded]),
        neighbours=np.concatenate([rows.neighbours for rows in loaded]),
        reference=np.concatenate(references) if references else None,
    )
