"""Embeddings in files, mapped into memory when they are first asked for.

A database has a file for each embedding shard: to map thousands before the first search takes longer than the search,
and a process may map some ten thousand at most.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import ModelError

Located = Path | Callable[[], Path]
"""A file, or what fetches it when it is first asked for."""


class StoredRows:
    """(n, D) float16 rows in a ``.npy`` file; indexed like the array it holds."""

    def __init__(self, file: Located, dimension: int, rows: int | None = None) -> None:
        """The rows of ``file``; ``rows``, where n is known, spares opening it now."""
        self._file, self._dimension, self._rows = file, dimension, rows
        self._array: NDArray[np.float16] | None = None

    def __len__(self) -> int:
        """How many rows."""
        return len(self.array) if self._rows is None else self._rows

    def __getitem__(self, place: Any) -> Any:
        """What the array has there."""
        return self.array[place]

    @property
    def array(self) -> NDArray[np.float16]:
        """All rows, memory-mapped. Raises ``ModelError`` when the file holds others than the database says."""
        if self._array is None:
            path = self._file if isinstance(self._file, Path) else self._file()
            # As a plain array: a memmap's own indexing costs more than reading a row.
            found: NDArray[np.float16] = np.load(path, mmap_mode="r").view(np.ndarray)
            if found.ndim != 2 or found.shape != (len(found) if self._rows is None else self._rows, self._dimension):
                rows = "n" if self._rows is None else self._rows
                raise ModelError(
                    f"{path} holds {found.shape}, not ({rows}, {self._dimension}) as its index and encoder say; "
                    "rebuild the database"
                )
            self._array = found
        return self._array
