"""Embeddings of neighbours: in device memory if they fit, else read by row from memory-mapped files.

Legend: ``M`` database rows, ``D`` embedding width.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import ModelError
from model.retrieval.stored_rows import StoredRows


class RowArray(Protocol):
    """Common interface of float16 arrays (M, D), memory-mapped or not, and :class:`ConcatenatedRows`."""

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


class ConcatenatedRows:
    """Concatenation of arrays without a copy, e.g. of the memory-mapped shards of a database."""

    def __init__(self, parts: "Sequence[NDArray[Any] | StoredRows]") -> None:
        """Concatenate ``parts``, each (m, …). Raise ``ModelError`` if there are none, or shapes or dtypes differ."""
        if len({(part.shape[1:], part.dtype) for part in parts}) != 1:
            raise ModelError(
                "cannot concatenate rows: there are none, or their shapes or dtypes differ; build all parts again with "
                "the same encoder"
            )
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    @property
    def nbytes(self) -> int:
        """Size of all rows in bytes."""
        return sum(part.nbytes for part in self._parts)

    def __len__(self) -> int:
        """Return the number of rows, M."""
        return int(self._starts[-1])

    def __getitem__(self, ids: Any) -> NDArray[Any]:
        """Return the rows of integer ids (…) as (…, …row), or read all rows of a slice."""
        if isinstance(ids, slice):
            ids = np.arange(*ids.indices(len(self)))
        flat = np.asarray(ids).reshape(-1)
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"row ids are out of range: {flat.min()} … {flat.max()}; there are {len(self)} rows")
        rows = np.empty((len(flat), *self._parts[0].shape[1:]), dtype=self._parts[0].dtype)
        part_of_row = np.searchsorted(self._starts, flat, side="right") - 1
        for number in np.unique(part_of_row):
            mask = part_of_row == number
            rows[mask] = self._parts[number][flat[mask] - self._starts[number]]
        return rows.reshape(*np.shape(ids), *rows.shape[1:])


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
