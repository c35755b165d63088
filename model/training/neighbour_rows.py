"""Embeddings of neighbours: in device memory if they fit, else read by row from memory-mapped files.

Legend: ``M`` database rows, ``D`` embedding width.
"""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class RowArray(Protocol):
    """Interface of float16 arrays (M, D), memory-mapped or not, and of concatenated ones."""

    @property
    def nbytes(self) -> int:
        """Size of all rows in bytes."""
        ...

    def __len__(self) -> int:
        """Return the number of rows, M."""
        ...

    def __getitem__(self, ids: Any) -> Any:
        """Return the rows of integer ids (…) as (…, D), or those of a slice."""
        ...


class NeighbourEmbeddings:
    """Look-up of embeddings by row id, on the training device."""

    MAX_RESIDENT_BYTES = 2 << 30
    """Maximum size in bytes for which all rows are copied to the device."""

    def __init__(self, rows: RowArray, device: torch.device | str) -> None:
        """Look up rows in ``rows``, which are copied to ``device`` unless they are too large."""
        self._mapped = rows
        self._resident = None
        if rows.nbytes <= self.MAX_RESIDENT_BYTES:
            whole = rows if isinstance(rows, np.ndarray) else rows[:]
            self._resident = torch.from_numpy(np.array(whole)).to(device)

    def __len__(self) -> int:
        """Return the number of rows, M."""
        return len(self._mapped)

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the rows of ids (…) as (…, D) float32, on the device of the ids."""
        if self._resident is not None:
            return self._resident[ids].float()
        return torch.from_numpy(self._mapped[ids.cpu().numpy()]).to(ids.device).float()
