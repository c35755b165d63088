"""The embeddings that neighbours point into: on the device when they fit, else read from their files row by row.

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
    """What a float16 array (M, D), memory-mapped or not, and :class:`ConcatenatedRows` have in common."""

    @property
    def nbytes(self) -> int:
        """Size of all rows."""
        ...

    def __len__(self) -> int:
        """M."""
        ...

    def __getitem__(self, ids: Any) -> Any:
        """The rows of integer ids (…) as (…, D), or those of a slice."""
        ...


class ConcatenatedRows:
    """Arrays one after the other as one, without a copy: the memory-mapped files of a database in shards."""

    def __init__(self, parts: "Sequence[NDArray[Any] | StoredRows]") -> None:
        """Join ``parts``, each (m, …). Raises ``ModelError`` when they are none, or of several shapes."""
        if len({(part.shape[1:], part.dtype) for part in parts}) != 1:
            raise ModelError("rows to join must be of one shape, and of one part at least; make them anew alike")
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    @property
    def nbytes(self) -> int:
        """Size of all rows."""
        return sum(part.nbytes for part in self._parts)

    def __len__(self) -> int:
        """M."""
        return int(self._starts[-1])

    def __getitem__(self, ids: Any) -> NDArray[Any]:
        """The rows of ids, of any shape, on their axes; a slice reads all that it spans."""
        if isinstance(ids, slice):
            ids = np.arange(*ids.indices(len(self)))
        flat = np.asarray(ids).reshape(-1)
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"rows {flat.min()} … {flat.max()} are asked of {len(self)}")
        found = np.empty((len(flat), *self._parts[0].shape[1:]), dtype=self._parts[0].dtype)
        holder = np.searchsorted(self._starts, flat, side="right") - 1
        for number in np.unique(holder):
            here = holder == number
            found[here] = self._parts[number][flat[here] - self._starts[number]]
        return found.reshape(*np.shape(ids), *found.shape[1:])


class NeighbourEmbeddings:
    """Rows by their ids, on the device where training runs."""

    LARGEST = 2 << 30
    """Bytes up to which all rows are held."""

    def __init__(self, rows: RowArray, device: torch.device | str) -> None:
        """Serve ``rows``."""
        self._mapped = rows
        self._held = None
        if rows.nbytes <= self.LARGEST:
            whole = rows if isinstance(rows, np.ndarray) else rows[:]
            self._held = torch.from_numpy(np.array(whole)).to(device)

    def __len__(self) -> int:
        """M."""
        return len(self._mapped)

    def take(self, ids: Tensor) -> Tensor:
        """The rows of ids (…) as (…, D) float32, where the ids are."""
        if self._held is not None:
            return self._held[ids].float()
        return torch.from_numpy(self._mapped[ids.cpu().numpy()]).to(ids.device).float()
