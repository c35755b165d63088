"""Embedding files, memory-mapped on first use.

A database has a file for each embedding shard, and mapping thousands of them takes longer than the first search. A
process can map about 65,000 files. Each mapping keeps the file's disk blocks allocated, even if the file is deleted.
When more than ``MAX_MAPPED`` files are mapped, the one mapped first is unmapped; it is mapped again when needed.
"""

import collections
import resource
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import ModelError

FileSource = Path | Callable[[], Path]
"""A local file, or a function that returns one and is called each time the file is mapped."""

_MAX_OPEN = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MAX_MAPPED = min(8_192, _MAX_OPEN // 2) if _MAX_OPEN > 0 else 8_192
"""Maximum mapped files of a process, over all its databases: at most half of the files that it may open."""
_mapped: "collections.deque[weakref.ref[StoredRows]]" = collections.deque()  # mapped files, oldest first
_mapping = threading.Lock()


class StoredRows:
    """(n, D) float16 rows in a ``.npy`` file, indexed like an array.

    ``np.asarray`` reads a file that is not mapped once, without keeping it mapped.
    """

    def __init__(self, file: FileSource, dimension: int, rows: int | None = None) -> None:
        """Use the rows of ``file``. If n is known, ``rows`` avoids opening the file for its length."""
        self._file, self._dimension, self._rows = file, dimension, rows
        self._array: NDArray[np.float16] | None = None
        self.path = file if isinstance(file, Path) else None  # for messages; set when a fetched file is mapped

    def __len__(self) -> int:
        """Return the number of rows."""
        if self._rows is None:
            self._rows = len(self.array)
        return self._rows

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (n, D) of the array."""
        return len(self), self._dimension

    @property
    def dtype(self) -> np.dtype[np.float16]:
        """Data type of the rows, float16."""
        return np.dtype(np.float16)

    @property
    def nbytes(self) -> int:
        """Size of all rows in bytes."""
        return len(self) * self._dimension * self.dtype.itemsize

    def __getitem__(self, index: Any) -> Any:
        """Index the array."""
        return self.array[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return all rows. A file that was not mapped before remains mapped only while the caller uses them."""
        array = self._array
        return np.array(self._map() if array is None else array, dtype=dtype, copy=copy)

    @property
    def array(self) -> NDArray[np.float16]:
        """All rows, memory-mapped. Raises ``ModelError`` if shape or dtype differ from the expected ones."""
        array = self._array  # read once: another thread may unmap it
        return self._keep(self._map()) if array is None else array

    def _map(self) -> NDArray[np.float16]:
        path = self._file if isinstance(self._file, Path) else self._file()
        self.path = path
        try:
            # A plain array: indexing a np.memmap costs more than reading a row.
            found: NDArray[np.float16] = np.load(path, mmap_mode="r").view(np.ndarray)
        except (ValueError, EOFError, OverflowError, SyntaxError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"unreadable array: {path} ({reason}); rebuild the database") from error
        fits = found.ndim == 2 and found.shape == (len(found) if self._rows is None else self._rows, self._dimension)
        if not fits or found.dtype != np.float16:
            rows = "n" if self._rows is None else self._rows
            actual = f"{found.shape}" if found.dtype == np.float16 else f"{found.dtype} {found.shape}"
            raise ModelError(
                f"an array has the wrong shape or dtype: {path} is {actual}, expected float16 ({rows}, "
                f"{self._dimension}); rebuild the database"
            )
        return found

    def _keep(self, found: NDArray[np.float16]) -> NDArray[np.float16]:
        with _mapping:
            if self._array is None:
                self._array = found
                _mapped.append(weakref.ref(self))
            while len(_mapped) > MAX_MAPPED:
                first = _mapped.popleft()()
                if first is not None:
                    first._array = None
        return found
