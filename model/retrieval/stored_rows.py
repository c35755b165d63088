"""Embeddings in files, mapped into memory when they are first asked for.

A database has a file for each embedding shard: to map thousands before the first search takes longer than the search.
A process may map some 65,000 at most, and what is mapped holds an open file and its blocks on the disk, even of a
file that is deleted: beyond ``MOST_MAPPED`` the file that was mapped first is let go, and mapped again when asked for.
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

Located = Path | Callable[[], Path]
"""A file, or what fetches it whenever it is to be mapped."""

_MOST_OPEN = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MOST_MAPPED = min(8_192, _MOST_OPEN // 2) if _MOST_OPEN > 0 else 8_192
"""Files that a process keeps mapped, of all its databases together; half of what it may open is left to others."""
_kept: "collections.deque[weakref.ref[StoredRows]]" = collections.deque()  # what is mapped, the first to go first
_keeping = threading.Lock()


class StoredRows:
    """(n, D) float16 rows in a ``.npy`` file; indexed like the array it holds.

    As an array (``np.asarray``) a file that was not mapped is read once, and not kept mapped.
    """

    def __init__(self, file: Located, dimension: int, rows: int | None = None) -> None:
        """The rows of ``file``; ``rows``, where n is known, spares opening it now."""
        self._file, self._dimension, self._rows = file, dimension, rows
        self._array: NDArray[np.float16] | None = None
        self.path = file if isinstance(file, Path) else None  # known once it was mapped, for messages

    def __len__(self) -> int:
        """How many rows."""
        if self._rows is None:
            self._rows = len(self.array)
        return self._rows

    @property
    def shape(self) -> tuple[int, int]:
        """(n, D)."""
        return len(self), self._dimension

    @property
    def dtype(self) -> np.dtype[np.float16]:
        """As they are stored."""
        return np.dtype(np.float16)

    @property
    def nbytes(self) -> int:
        """Size of all rows."""
        return len(self) * self._dimension * self.dtype.itemsize

    def __getitem__(self, place: Any) -> Any:
        """What the array has there."""
        return self.array[place]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All rows, for as long as the caller holds them."""
        held = self._array
        return np.array(self._map() if held is None else held, dtype=dtype, copy=copy)

    @property
    def array(self) -> NDArray[np.float16]:
        """All rows, memory-mapped. Raises ``ModelError`` when the file holds others than the database says."""
        held = self._array  # looked at once: another thread may let it go
        return self._keep(self._map()) if held is None else held

    def _map(self) -> NDArray[np.float16]:
        path = self._file if isinstance(self._file, Path) else self._file()
        self.path = path
        try:
            # As a plain array: a memmap's own indexing costs more than reading a row.
            found: NDArray[np.float16] = np.load(path, mmap_mode="r").view(np.ndarray)
        except (ValueError, EOFError, OverflowError, SyntaxError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{path} is no array that can be read ({reason}); rebuild the database") from error
        fits = found.ndim == 2 and found.shape == (len(found) if self._rows is None else self._rows, self._dimension)
        if not fits or found.dtype != np.float16:
            rows = "n" if self._rows is None else self._rows
            held = f"{found.shape}" if found.dtype == np.float16 else f"{found.dtype} {found.shape}"
            raise ModelError(
                f"{path} holds {held}, not ({rows}, {self._dimension}) as its index and encoder say; "
                "rebuild the database"
            )
        return found

    def _keep(self, found: NDArray[np.float16]) -> NDArray[np.float16]:
        with _keeping:
            if self._array is None:
                self._array = found
                _kept.append(weakref.ref(self))
            while len(_kept) > MOST_MAPPED:
                first = _kept.popleft()()
                if first is not None:
                    first._array = None
        return found
