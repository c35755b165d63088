"""Pins: cached files that a process uses, which no process may delete.

A pin is a shared lock on one byte of the cache's file ``uses``, chosen by the digest. The kernel releases it when the
process dies.
"""

import contextlib
import errno
import fcntl
import os
import threading
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path, PosixPath
from typing import Any

from infra.errors import InputError
from infra.storage.folders import make_folder


class PinnedPath(PosixPath):
    """A path in the cache whose file is not evicted while the path is referenced. A pickled copy is a plain path."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path, (str(self),)


class _PinLocks:
    """Byte locks of this process on a cache's ``uses`` file, through a single descriptor."""

    def __init__(self, cache: Path) -> None:
        # Never closed: closing any descriptor of the file would release all locks of the process on it.
        self._descriptor = os.open(cache / "uses", os.O_RDWR | os.O_CREAT, 0o666)
        self._counts: Counter[int] = Counter()
        self._released: deque[int] = deque()
        self._lock = threading.Lock()

    def pin(self, byte: int) -> None:
        with self._lock:
            self._drain()
            self._counts[byte] += 1
            if self._counts[byte] == 1:
                fcntl.lockf(self._descriptor, fcntl.LOCK_SH, 1, byte)

    def unpin(self, byte: int) -> None:
        """Release one use. Called by the garbage collector, possibly while this thread holds ``self._lock``."""
        self._released.append(byte)
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def is_pinned(self, byte: int) -> bool:
        """Return True if this or another process has locked the byte."""
        with self._lock:
            self._drain()
            if byte in self._counts:
                return True
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except OSError:
                return True
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, byte)
            return False

    def _drain(self) -> None:
        while self._released:
            byte = self._released.popleft()
            self._counts[byte] -= 1
            if not self._counts[byte]:
                del self._counts[byte]
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, byte)


_uses: dict[tuple[int, str], _PinLocks] = {}  # (pid, cache) -> locks: a fork does not inherit such locks
_uses_lock = threading.Lock()


def _locks_of(cache: Path) -> _PinLocks:
    key = (os.getpid(), os.path.realpath(cache))
    with _uses_lock:
        if key not in _uses:
            _uses[key] = _PinLocks(cache)
        return _uses[key]


def pin(path: Path, sha256: str, cache: Path) -> PinnedPath:
    """Pin ``path`` against eviction. The shared lock closes the race between an eviction's check and its unlink."""
    try:
        make_folder(path.parent)
        uses, byte, pinned = _locks_of(cache), _byte(sha256), PinnedPath(path)
        with locked(cache, fcntl.LOCK_SH):
            uses.pin(byte)
    except OSError as error:
        if not isinstance(error, PermissionError | FileExistsError | NotADirectoryError) and error.errno != errno.EROFS:
            raise
        message = f"the cache {cache} is not writable: {error.strerror}; set KNN_DIFFUSION_CACHE to a writable folder"
        raise InputError(message) from error
    weakref.finalize(pinned, _unpin, uses, byte, os.getpid()).atexit = False
    return pinned


def is_pinned(sha256: str, cache: Path) -> bool:
    """Return True if this or another process uses the file of a digest."""
    return _locks_of(cache).is_pinned(_byte(sha256))


def _unpin(uses: _PinLocks, byte: int, process: int) -> None:
    if os.getpid() == process:  # a fork has a copy of the path but none of the locks
        uses.unpin(byte)


def _byte(sha256: str) -> int:
    return int(sha256[:15], 16)


@contextlib.contextmanager
def locked(cache: Path, operation: int) -> Iterator[None]:
    """Lock the cache within the block: ``LOCK_SH`` to pin files, ``LOCK_EX`` to delete files that are not pinned."""
    descriptor = os.open(cache / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)
