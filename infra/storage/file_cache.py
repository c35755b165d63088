"""Size-bounded cache of remote files, addressed by digest and shared by all processes of a machine.

    <cache>/ab/abcdef….npy      a remote file, by its sha256
    <cache>/verified/           stamps: see ``infra.storage.digest_stamps``
    <cache>/fetching/abcdef…/   a download in progress, locked by the process that fetches it
    <cache>/uses, lock          byte locks of files in use; lock for pinning (shared) and eviction (exclusive)
    <cache>/owed                pending purges: files to delete once no process uses them, see :func:`purge`
    <cache>/registered/         files of registered generators, by the generator's digest
    <cache>/pixels, encoded, …  files derived by stages

Registered and derived files count towards the limit, ``Settings.cache_bytes``. Whenever files of one hundredth of the
limit have been added, the least recently used ones are evicted until the rest fits.

A fetched file is in use while the returned path is referenced anywhere in its process. The path holds a shared lock on
one byte of ``uses``, chosen by the digest; the kernel releases it when the process dies. An open or memory-mapped file
may still be evicted: on POSIX systems an unlinked file exists until its last user closes it. Derived files have no such
lock. They are kept for an hour after their last use.
"""

import contextlib
import errno
import fcntl
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PosixPath
from typing import Any

from infra import logs, storage, validation
from infra.errors import InputError
from infra.settings import Settings
from infra.storage.digest_stamps import is_verified, stamp_file, write_stamp
from infra.storage.errors import disk_full_errors
from infra.storage.folders import make_folder
from infra.storage.locks import exclusive_folder, remove_stale

DERIVED_GRACE_S = 3600.0
"""Seconds after its last use during which a derived file counts as in use."""
_STAMP_RETENTION_S = 90 * 86_400.0
_MAX_SUFFIX_LENGTH = 32
_FETCHING = "fetching"
_PENDING = "owed"
_BOOKKEEPING = frozenset({"verified", _FETCHING, "uses", "lock", _PENDING, f"{_PENDING}.partial"})


class DigestMismatchError(Exception):
    """Raised when the fetched bytes do not match the expected size and digest."""


class PinnedPath(PosixPath):
    """A path in the cache whose file is not evicted while the path is referenced. A pickled copy is a plain path."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path, (str(self),)


REGISTERED = "registered"


def fetch(uri: str, sha256: str, size: int, cache: Path) -> Path:
    """Return the verified local copy of the file at ``uri``; fetch it if necessary, one process at a time.

    Args:
        uri: Remote URI of the file.
        sha256: Expected digest, 64 lower-case hexadecimal digits.
        size: Expected size in bytes.
        cache: Root folder of the cache.

    Raises:
        NotFoundError: The file is neither in the cache nor at ``uri``.
        DigestMismatchError: The fetched bytes differ from the expected ones. They are not kept.
        StageError: The disk is full.
        InputError: The cache is not writable.
        ValueError: ``sha256`` is not a digest.
    """
    suffix = Path(uri).suffix
    path = cache / validation.digest(sha256)[:2] / (sha256 + suffix[:_MAX_SUFFIX_LENGTH])
    with disk_full_errors(cache):
        pinned = _pin(path, sha256, cache)
        if path.exists() and is_verified(path, sha256, size, cache):
            return pinned
        with exclusive_folder(cache / _FETCHING / sha256, within=cache) as folder:
            if not is_verified(path, sha256, size, cache):  # another process may have fetched it in the meantime
                path.unlink(missing_ok=True)
                downloaded = storage.fetch(uri, folder / "file")
                if downloaded.stat().st_size != size or storage.sha256(str(downloaded)) != sha256:
                    raise DigestMismatchError
                downloaded.replace(path)
                write_stamp(stamp_file(cache, sha256, path), path.stat())
    _account_for(cache, size)
    return pinned


def fetch_registered(
    digest: str, is_complete: Callable[[Path], bool], download: Callable[[Path], object], cache: Path
) -> Path:
    """Return the folder ``<cache>/registered/<digest>``; download it if it is incomplete, one process at a time.

    Args:
        digest: Digest of the registered generator.
        is_complete: Returns True if the given folder is complete.
        download: Downloads the files into the given folder, which does not exist yet.
        cache: Root folder of the cache.

    Raises:
        StageError: The disk is full.
        InputError: The cache is not writable.
        ValueError: ``digest`` is not a digest.
        Exception: Any error of ``download``.
    """
    registered = cache / REGISTERED / validation.digest(digest)
    try:
        with disk_full_errors(cache):
            registered = _pin(registered, digest, cache)
    except InputError:
        if not is_complete(registered):  # a read-only cache can still serve a complete folder
            raise
    if is_complete(registered):
        return registered
    with disk_full_errors(cache), exclusive_folder(cache / _FETCHING / digest, within=cache) as folder:
        if is_complete(registered):  # another process may have fetched it in the meantime
            return registered
        downloaded = folder / "files"
        download(downloaded)
        files = [path for path in downloaded.rglob("*") if path.is_file() and not path.is_symlink()]
        size = sum(path.stat().st_size for path in files)
        for path in files:
            target = registered / path.relative_to(downloaded)
            make_folder(target.parent)
            path.replace(target)
    _account_for(cache, size)
    return registered


def evict(cache: Path, limit_bytes: int) -> int:
    """Delete the least recently used files until at most ``limit_bytes`` remain; return the number of remaining bytes.

    Files in use are kept, so the cache may exceed its limit. Partial downloads of dead processes are deleted, too.
    """
    with _locked(cache / "lock", fcntl.LOCK_EX):
        _remove_stale_entries(cache)
        files = _inventory(cache)
        total = sum(size for _, size, _ in files)
        for _, size, paths in files:
            if total <= limit_bytes:
                break
            if _try_remove(cache, paths):
                total -= size
    if total > limit_bytes:
        logs.get("cache").warning(
            "cache %s exceeds its limit: %d bytes are in use, the limit is %d; increase KNN_DIFFUSION_CACHE_BYTES",
            cache,
            total,
            limit_bytes,
        )
    return total


def purge(digests: Collection[str], cache: Path, *, derived: bool = True) -> int:
    """Delete the files of these digests and, with ``derived``, all derived files; return the number of bytes freed.

    All derived files are deleted because their sources are not recorded; stages can derive them again. Files in use are
    reported in the log and recorded as pending. Every later call also deletes the pending files.
    """
    if not cache.exists():
        return 0
    freed, pending = 0, set[str]()
    with _locked(cache / "lock", fcntl.LOCK_EX):
        targets = {*digests, *_pending_purges(cache)}
        selected = []
        for _, size, paths in _inventory(cache):
            derivable = {str(path.relative_to(cache)) for path in paths if _is_derived(cache, path)}
            if names := (derivable if derived else derivable & targets) | {path.stem for path in paths} & targets:
                selected.append((size, paths, names))
        _record_pending(cache, {name for _, _, names in selected for name in names})
        for size, paths, names in selected:
            if _try_remove(cache, paths):
                freed += size
            else:
                pending |= names
        _record_pending(cache, pending)
    if pending:
        message = "%s: %d files could not be deleted: in use now or within the last hour; run gc --delete later"
        logs.get("cache").warning(message, cache, len(pending))
    return freed


def has_pending_purges(cache: Path) -> bool:
    """Return True if files of an earlier purge are still to be deleted because they were in use."""
    return bool(_pending_purges(cache))


def _pending_purges(cache: Path) -> list[str]:
    try:
        return (cache / _PENDING).read_text().splitlines()
    except FileNotFoundError:
        return []


def _record_pending(cache: Path, names: set[str]) -> None:
    """Record the pending purges atomically, so that a process that dies loses none of them."""
    if not names:
        (cache / _PENDING).unlink(missing_ok=True)
        return
    partial = cache / f"{_PENDING}.partial"
    partial.write_text("\n".join(sorted(names)))
    partial.replace(cache / _PENDING)


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
_added_bytes: dict[tuple[int, str], int] = {}


def _locks_of(cache: Path) -> _PinLocks:
    key = (os.getpid(), os.path.realpath(cache))
    with _uses_lock:
        if key not in _uses:
            _uses[key] = _PinLocks(cache)
        return _uses[key]


def _pin(path: Path, sha256: str, cache: Path) -> PinnedPath:
    """Pin ``path`` against eviction. The shared lock closes the race between an eviction's check and its unlink."""
    try:
        make_folder(path.parent)
        uses, byte, pinned = _locks_of(cache), _byte(sha256), PinnedPath(path)
        with _locked(cache / "lock", fcntl.LOCK_SH):
            uses.pin(byte)
    except OSError as error:
        if not isinstance(error, PermissionError | FileExistsError | NotADirectoryError) and error.errno != errno.EROFS:
            raise
        message = f"the cache {cache} is not writable: {error.strerror}; set KNN_DIFFUSION_CACHE to a writable folder"
        raise InputError(message) from error
    weakref.finalize(pinned, _unpin, uses, byte, os.getpid()).atexit = False
    return pinned


def _unpin(uses: _PinLocks, byte: int, process: int) -> None:
    if os.getpid() == process:  # a fork has a copy of the path but none of the locks
        uses.unpin(byte)


def _try_remove(cache: Path, paths: list[Path]) -> bool:
    """Delete a file by all of its names (hard links), with its stamps. Return False if it is in use."""
    if any(_in_use(cache, path) for path in paths):
        return False
    for path in paths:
        path.unlink(missing_ok=True)
        stamp_file(cache, path.stem, path).unlink(missing_ok=True)
    return True


def _is_fetched(cache: Path, path: Path) -> bool:
    return path.parent.parent == cache and path.stem.startswith(path.parent.name)


def _is_derived(cache: Path, path: Path) -> bool:
    return not _is_fetched(cache, path) and path.relative_to(cache).parts[0] != REGISTERED


def _in_use(cache: Path, path: Path) -> bool:
    if _is_fetched(cache, path):
        return _locks_of(cache).is_pinned(_byte(path.stem))
    parts = path.relative_to(cache).parts
    if parts[0] == REGISTERED and len(parts) > 2 and _locks_of(cache).is_pinned(_byte(parts[1])):
        return True
    try:
        status = path.stat()
    except FileNotFoundError:  # its writer has just renamed it
        return False
    return time.time() - max(status.st_atime, status.st_mtime) < DERIVED_GRACE_S


def _byte(sha256: str) -> int:
    return int(sha256[:15], 16)


def _account_for(cache: Path, size: int) -> None:
    limit, key = Settings().cache_bytes, (os.getpid(), str(cache))
    _added_bytes[key] = _added_bytes.get(key, limit) + size  # the first addition always evicts
    if _added_bytes[key] > limit // 100:
        _added_bytes[key] = 0
        evict(cache, limit)


def _inventory(cache: Path) -> list[tuple[float, int, list[Path]]]:
    """Return (last use, bytes, paths) of each file, least recently used first; hard links count as one file."""
    found: dict[int, tuple[float, int, list[Path]]] = {}
    for top in cache.iterdir():
        if top.name in _BOOKKEEPING or top.is_symlink():  # never delete the target of a link
            continue
        for path in [top] if top.is_file() else top.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if not path.is_file():
                    continue
                used = max(status.st_mtime, _last_use(cache, path) or status.st_atime)
                before = found.get(status.st_ino, (0.0, 0, []))
                found[status.st_ino] = (max(used, before[0]), status.st_size, [*before[2], path])
    return sorted(found.values(), key=lambda entry: entry[0])


def _last_use(cache: Path, path: Path) -> float | None:
    try:
        return stamp_file(cache, path.stem, path).stat().st_mtime
    except OSError:
        return None


def _remove_stale_entries(cache: Path) -> None:
    """Delete partial downloads of dead processes, and stamps unused for 90 days."""
    remove_stale(cache.glob(f"{_FETCHING}/*"), within=cache)
    for stamp in cache.glob("verified/*/*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - stamp.stat().st_mtime > _STAMP_RETENTION_S:
                stamp.unlink()


@contextlib.contextmanager
def _locked(path: Path, operation: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)
