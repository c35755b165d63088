"""Embeddings and images of neighbours: in device memory if they fit, else read by row from memory-mapped files.

Legend: ``M`` database rows, ``D`` embedding width.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from model.images import to_model_range


class RowArray(Protocol):
    """Interface of arrays (M, …), memory-mapped or not, and of concatenated ones."""

    @property
    def nbytes(self) -> int:
        """Size of all rows in bytes."""
        ...

    def __len__(self) -> int:
        """Return the number of rows, M."""
        ...

    def __getitem__(self, ids: Any) -> Any:
        """Return the rows of integer ids (…) as (…, …row), or those of a slice."""
        ...


class NeighbourRows:
    """Look-up of embeddings or images by row id, on the training device."""

    MAX_RESIDENT_BYTES = 2 << 30
    """Maximum size in bytes for which all rows are copied to the device. A GPU may hold more, see ``MEMORY_SHARE``."""
    MEMORY_SHARE = 1 / 8
    """Share of a GPU's memory that the rows may take."""

    def __init__(self, rows: RowArray, device: torch.device | str) -> None:
        """Look up rows in ``rows``, which are copied to ``device`` unless they are too large."""
        self._mapped = rows
        self._resident = None
        largest = self.MAX_RESIDENT_BYTES
        if (device := torch.device(device)).type == "cuda":
            largest = max(largest, int(self.MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory))
        if rows.nbytes <= largest:
            whole = np.require(rows[:], requirements=["C", "W"])  # copies only what is read-only, such as a mapped file
            self._resident = torch.from_numpy(whole).to(device)

    def __len__(self) -> int:
        """Return the number of rows, M."""
        return len(self._mapped)

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the rows of ids (…) as (…, …row), on the device of the ids."""
        if self._resident is not None:
            return self._resident[ids]
        return torch.from_numpy(self._mapped[ids.cpu().numpy()]).to(ids.device)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NeighbourImages:
    """The images of a batch's neighbours. Only those that are chosen are read.

    Attributes:
        ids: (b, P) row ids of the neighbours, nearest first.
        rows: Images of the database, uint8 (M, S, S, 3).
    """

    ids: Tensor
    rows: NeighbourRows

    def choose(self, positions: Tensor) -> Tensor:
        """Return the images at ``positions`` (b, I) of the neighbours: (b, I, 3, S, S) in [−1, 1]."""
        pixels = self.rows.lookup(self.ids.gather(1, positions))
        images = to_model_range(pixels.flatten(0, 1))
        return images.view(*positions.shape, *images.shape[1:])
