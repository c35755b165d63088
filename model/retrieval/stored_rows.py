"""Embeddings in files, mapped into memory when they are first asked for.

A database has a file for each embedding shard: to map thousands before the first search takes longer than the search,
and a process may map some ten thousand at most.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import ModelError


class StoredRows:
    """(n, D) float16 rows in a ``.npy`` file; indexed like the array it holds."""

    def __init__(self, path: Path, dimension: int, rows: int | None = None) -> None:
        """The file at ``path``; ``rows``, where n is known, spares opening it now."""
        self._path, self._dimension, self._rows = path, dimension, rows
        self._array: NDArray[np.float16] | None = None

    def __len__(self) -> int:
        """N."""
        return len(self.array) if self._rows is None else self._rows

    def __getitem__(self, place: Any) -> Any:
        """What the array has there."""
        return self.array[place]

    @property
    def array(self) -> NDArray[np.float16]:
        """All rows, memory-mapped. Raises ``ModelError`` when the file holds others than the database says."""
        if self._array is None:
            # As a plain array: a memmap's own indexing costs more than reading a row.
            found: NDArray[np.float16] = np.load(self._path, mmap_mode="r").view(np.ndarray)
            if found.ndim != 2 or found.shape != (len(found) if self._rows is None else self._rows, self._dimension):
                rows = "n" if self._rows is None else self._rows
                raise ModelError(
                    f"{self._path} holds {found.shape}, not ({rows}, {self._dimension}) as its index and encoder say; "
                    "rebuild the database"
                )
            self._array = found
        return self._array
