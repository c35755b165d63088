"""Rows of several arrays as one array, without a copy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import ModelError
from model.retrieval.stored_rows import StoredRows

_FEW_ROWS = 64  # up to this number, reading rows one by one is faster than grouping them by part


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
        self._starts = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)

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
        return self._read(flat).reshape(*np.shape(ids), *self._parts[0].shape[1:])

    def path_of(self, row: int) -> Path | None:
        """Return the file of a row; None for an array in memory, or a file that was not fetched yet."""
        part = self._parts[int(np.searchsorted(self._starts, row, side="right")) - 1]
        return part.path if isinstance(part, StoredRows) else None

    def _read(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Return the rows of ids (n,) as (n, …row)."""
        first = self._parts[0]
        if len(self._parts) == 1:
            return np.take(first.array if isinstance(first, StoredRows) else np.asarray(first), ids, axis=0)
        rows = np.empty((len(ids), *first.shape[1:]), dtype=first.dtype)
        part_of_row = np.searchsorted(self._starts, ids, side="right") - 1
        if len(ids) <= _FEW_ROWS:
            for row, (number, position) in enumerate(zip(part_of_row, ids - self._starts[part_of_row], strict=True)):
                rows[row] = self._parts[number][position]
            return rows
        order = np.argsort(part_of_row, kind="stable")
        numbers, firsts = np.unique(part_of_row[order], return_index=True)
        for number, some in zip(numbers, np.split(order, firsts[1:]), strict=True):
            rows[some] = self._parts[number][ids[some] - self._starts[number]]
        return rows
