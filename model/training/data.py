"""What the loop is fed: batches that depend on the seed and the step alone.

Legend: ``N`` pictures, ``M`` database rows, ``B`` global batch, ``K`` neighbours, ``D`` embedding width, ``S`` side.

Which pictures make the global batch of a step follows from the seed and the step, and each worker takes its slice of
it. So a resumed run needs no random state, and another number of workers sees the same pictures in the same order.
"""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from model.errors import ModelError


def picture_to_array(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """An RGB picture to (side, side, 3) uint8: the centre square, as CLIP's own preprocessing takes it."""
    return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS), dtype=np.uint8)


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) to float32 (B, 3, S, S) in [−1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One worker's share of a step: images (b, 3, S, S), query (b, D), neighbours (b, K, D), all float32."""

    images: Tensor
    query: Tensor
    neighbours: Tensor


class TrainingSet:
    """Pictures, their embeddings and their neighbours in memory."""

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        embeddings: NDArray[np.float16],
        neighbours: NDArray[np.int64],
        database_rows: NDArray[np.float16],
    ) -> None:
        """Hold (N, S, S, 3) uint8, (N, D) and (M, D) float16, (N, K) int64 rows of the database."""
        if not len(pixels) == len(embeddings) == len(neighbours) > 0:
            raise ModelError(
                f"{len(pixels)} pictures, {len(embeddings)} embeddings and {len(neighbours)} neighbour lists do not "
                "belong together; rebuild the stage that is shorter"
            )
        if neighbours.min() < 0 or neighbours.max() >= len(database_rows):
            raise ModelError("the neighbours point past the database; they were searched in another version of it")
        self._pixels = torch.from_numpy(pixels)
        self._embeddings = torch.from_numpy(embeddings)
        self._neighbours = torch.from_numpy(neighbours)
        self._database_rows = torch.from_numpy(database_rows)

    def __len__(self) -> int:
        """N."""
        return len(self._pixels)

    def batch(self, step: int, *, seed: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        """The share of worker ``rank`` of ``world`` in the global batch of ``size`` at ``step``."""
        chosen = self._order(step * size + rank * (size // world), size // world, seed)
        return Batch(
            images=to_model_range(self._pixels[chosen]),
            query=self._embeddings[chosen].float(),
            neighbours=self._database_rows[self._neighbours[chosen]].float(),
        )

    def _order(self, start: int, count: int, seed: int) -> Tensor:
        """Positions ``start`` … of an endless row of shuffled epochs."""
        epochs = range(start // len(self), (start + count - 1) // len(self) + 1)
        shuffled = torch.cat([torch.randperm(len(self), generator=step_generator(seed, epoch, 1)) for epoch in epochs])
        first = start - epochs[0] * len(self)
        return shuffled[first : first + count]


def step_generator(seed: int, step: int, stream: int) -> torch.Generator:
    """A CPU generator for one step; ``stream`` keeps shuffling (1) and noise (2) apart."""
    mixed = np.random.SeedSequence([seed, step, stream]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(mixed[0]) << 31 ^ int(mixed[1]))
