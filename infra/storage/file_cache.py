"""Remote files kept on this machine under their digest, bounded, shared by all its processes.

    <cache>/ab/abcdef….npy      a remote file, by its sha256
    <cache>/verified/           stamps: see ``infra.storage.digest_stamps``
    <cache>/fetching/abcdef…/   a file on its way, locked by the process that fetches it
    <cache>/uses, lock          what is in use; who looks or evicts
    <cache>/owed                what was to be forgotten, and was in use: see :func:`forget`
    <cache>/registered/         files of registered generators, by the generator's digest
    <cache>/pixels, encoded, …  what stages derive and keep; both count towards the bound

When more than a hundredth of ``Settings.cache_bytes`` has come in, the files used least recently go until the rest
fits. A file is in use, and stays, while the path that was handed out is referenced anywhere in its process: the path
holds a shared lock on one byte of ``uses``, the digest's own, which the kernel frees when a process dies. A file that
is open or memory-mapped may go all the same: an unlinked file lives on until its last user closes it, on every POSIX
system. What stages derive has no such lock and is left alone for an hour after its last use.
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
_STAMPS_KEPT_S = 90 * 86_400.0
_LONGEST_SUFFIX = 32
_FETCHING = "fetching"
_OWED = "owed"
_BOOKKEEPING = frozenset({"verified", _FETCHING, "uses", "lock", _OWED, f"{_OWED}.partial"})


class DigestMismatchError(Exception):
    """The bytes are not those of the digest."""


class PinnedPath(PosixPath):
    """A path in the cache; while it is referenced, the file is not evicted. A pickled copy is a plain path."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path, (str(self),)


REGISTERED = "registered"


def fetch(uri: str, sha256: str, size: int, cache: Path) -> Path:
    """The file at a remote ``uri`` in ``cache``, verified; fetched if it is not there, by one process at a time.

    Raises:
        NotFoundError: it is not at ``uri`` either.
        DamagedError: what came are other bytes; they are not kept.
        StageError: the disk is full.
        InputError: the cache cannot be written.
        ValueError: ``sha256`` is no digest, so it cannot name a file.
    """
    suffix = Path(uri).suffix
    path = cache / validation.digest(sha256)[:2] / (sha256 + suffix[:_LONGEST_SUFFIX])
    with disk_full_errors(cache):
        held = _pin(path, sha256, cache)
        if path.exists() and is_verified(path, sha256, size, cache):
            return held
        with exclusive_folder(cache / _FETCHING / sha256, within=cache) as folder:
            if not is_verified(path, sha256, size, cache):  # another process may have fetched it meanwhile
                path.unlink(missing_ok=True)
                arrived = storage.fetch(uri, folder / "file")
                if arrived.stat().st_size != size or storage.sha256(str(arrived)) != sha256:
                    raise DigestMismatchError
                arrived.replace(path)
                write_stamp(stamp_file(cache, sha256, path), path.stat())
    _account_for(cache, size)
    return held


def fetch_registered(
    digest: str, is_whole: Callable[[Path], bool], download: Callable[[Path], object], cache: Path
) -> Path:
    """The folder ``<cache>/registered/<digest>``; where it is not whole, with what ``download`` puts into a new folder.

    One process at a time does so. Raises as ``download`` does, as :func:`fetch` does for the cache, and ``ValueError``
    when ``digest`` is none.
    """
    kept = cache / REGISTERED / validation.digest(digest)
    try:
        with disk_full_errors(cache):
            kept = _pin(kept, digest, cache)
    except InputError:
        if not is_whole(kept):  # of a cache that may only be read, what is there serves
            raise
    if is_whole(kept):
        return kept
    with disk_full_errors(cache), exclusive_folder(cache / _FETCHING / digest, within=cache) as folder:
        if is_whole(kept):  # another process may have fetched it meanwhile
            return kept
        arrived = folder / "files"
        download(arrived)
        files = [path for path in arrived.rglob("*") if path.is_file() and not path.is_symlink()]
        size = sum(path.stat().st_size for path in files)
        for path in files:
            place = kept / path.relative_to(arrived)
            make_folder(place.parent)
            path.replace(place)
    _account_for(cache, size)
    return kept


def evict(cache: Path, limit_bytes: int) -> int:
    """Remove the files used least recently until at most ``limit_bytes`` are left; return what is left.

    Files in use stay, and may keep the cache above its bound. What dead processes were fetching goes too.
    """
    with _locked(cache / "lock", fcntl.LOCK_EX):
        _drop_abandoned(cache)
        files = _inventory(cache)
        total = sum(size for _, size, _ in files)
        for _, size, paths in files:
            if total <= limit_bytes:
                break
            if _try_remove(cache, paths):
                total -= size
    if total > limit_bytes:
        logs.get("cache").warning(
            "%s holds %d bytes in use, its bound is %d; raise KNN_DIFFUSION_CACHE_BYTES", cache, total, limit_bytes
        )
    return total


def purge(digests: Collection[str], cache: Path, *, derived: bool = True) -> int:
    """Remove what is kept under ``digests``, and whatever stages derived, unless in use; return the bytes that went.

    Of what was derived nobody knows what went into it, and it can be derived again. What is in use is told, and owed:
    it goes when this is called again, with whatever digests and though nothing else that was ``derived`` is to go.
    """
    if not cache.exists():
        return 0
    freed, left = 0, set[str]()
    with _locked(cache / "lock", fcntl.LOCK_EX):
        due = {*digests, *_pending_purges(cache)}
        chosen = []
        for _, size, paths in _inventory(cache):
            made = {str(path.relative_to(cache)) for path in paths if _is_derived(cache, path)}
            if named := (made if derived else made & due) | {path.stem for path in paths} & due:
                chosen.append((size, paths, named))
        _owe(cache, {name for _, _, named in chosen for name in named})
        for size, paths, named in chosen:
            if _try_remove(cache, paths):
                freed += size
            else:
                left |= named
        _owe(cache, left)
    if left:
        told = "%s keeps %d of the files that were to go: they are in use, or were an hour ago; run gc --delete later"
        logs.get("cache").warning(told, cache, len(left))
    return freed


def has_pending_purges(cache: Path) -> bool:
    """Whether anything that was to be forgotten was in use then."""
    return bool(_pending_purges(cache))


def _pending_purges(cache: Path) -> list[str]:
    try:
        return (cache / _OWED).read_text().splitlines()
    except FileNotFoundError:
        return []


def _owe(cache: Path, names: set[str]) -> None:
    """Note what is to go, all at once: a process that ends in between loses none of it."""
    if not names:
        (cache / _OWED).unlink(missing_ok=True)
        return
    partial = cache / f"{_OWED}.partial"
    partial.write_text("\n".join(sorted(names)))
    partial.replace(cache / _OWED)


class _Uses:
    """This process's locks on bytes of a cache's ``uses``: one descriptor, however many files."""

    def __init__(self, cache: Path) -> None:
        # Never closed: closing any descriptor of the file would free the process's locks on it.
        self._number = os.open(cache / "uses", os.O_RDWR | os.O_CREAT, 0o666)
        self._counts: Counter[int] = Counter()
        self._let_go: deque[int] = deque()
        self._lock = threading.Lock()

    def hold(self, byte: int) -> None:
        with self._lock:
            self._drain()
            self._counts[byte] += 1
            if self._counts[byte] == 1:
                fcntl.lockf(self._number, fcntl.LOCK_SH, 1, byte)

    def let_go(self, byte: int) -> None:
        """Called when a path is collected: that may happen anywhere, even while this thread is in here."""
        self._let_go.append(byte)
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def held(self, byte: int) -> bool:
        """Whether this or another process holds the byte."""
        with self._lock:
            self._drain()
            if byte in self._counts:
                return True
            try:
                fcntl.lockf(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except OSError:
                return True
            fcntl.lockf(self._number, fcntl.LOCK_UN, 1, byte)
            return False

    def _drain(self) -> None:
        while self._let_go:
            byte = self._let_go.popleft()
            self._counts[byte] -= 1
            if not self._counts[byte]:
                del self._counts[byte]
                fcntl.lockf(self._number, fcntl.LOCK_UN, 1, byte)


_uses: dict[tuple[int, str], _Uses] = {}  # by process, since a fork inherits no such locks, and by cache
_uses_lock = threading.Lock()
_came: dict[tuple[int, str], int] = {}


def _uses_of(cache: Path) -> _Uses:
    key = (os.getpid(), os.path.realpath(cache))
    with _uses_lock:
        if key not in _uses:
            _uses[key] = _Uses(cache)
        return _uses[key]


def _pin(path: Path, sha256: str, cache: Path) -> PinnedPath:
    """``path``, held from now on. The lock keeps it from falling between an eviction's look and its deed."""
    try:
        make_folder(path.parent)
        uses, byte, held = _uses_of(cache), _byte(sha256), PinnedPath(path)
        with _locked(cache / "lock", fcntl.LOCK_SH):
            uses.hold(byte)
    except OSError as error:
        if not isinstance(error, PermissionError | FileExistsError | NotADirectoryError) and error.errno != errno.EROFS:
            raise
        told = f"{cache} cannot hold the cache ({error.strerror}); set KNN_DIFFUSION_CACHE to a folder that can"
        raise InputError(told) from error
    weakref.finalize(held, _let_go, uses, byte, os.getpid()).atexit = False
    return held


def _let_go(uses: _Uses, byte: int, process: int) -> None:
    if os.getpid() == process:  # a fork has a copy of the path, and none of the locks
        uses.let_go(byte)


def _try_remove(cache: Path, paths: list[Path]) -> bool:
    """Remove a file by all of its names, and their stamps, unless it is in use; whether it went."""
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
        return _uses_of(cache).held(_byte(path.stem))
    parts = path.relative_to(cache).parts
    if parts[0] == REGISTERED and len(parts) > 2 and _uses_of(cache).held(_byte(parts[1])):
        return True
    try:
        status = path.stat()
    except FileNotFoundError:  # whoever derives it has just given it its name
        return False
    return time.time() - max(status.st_atime, status.st_mtime) < DERIVED_GRACE_S


def _byte(sha256: str) -> int:
    return int(sha256[:15], 16)


def _account_for(cache: Path, size: int) -> None:
    limit, key = Settings().cache_bytes, (os.getpid(), str(cache))
    _came[key] = _came.get(key, limit) + size  # the first time, whatever came: others may have left much
    if _came[key] > limit // 100:
        _came[key] = 0
        evict(cache, limit)


def _inventory(cache: Path) -> list[tuple[float, int, list[Path]]]:
    """(last use, bytes, paths) of each file, oldest use first; one that has several names once."""
    found: dict[int, tuple[float, int, list[Path]]] = {}
    for top in cache.iterdir():
        if top.name in _BOOKKEEPING or top.is_symlink():  # what a link leads to is not the cache's to delete
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


def _drop_abandoned(cache: Path) -> None:
    """Remove what dead processes left on its way, and stamps that nobody has asked for in a long time."""
    remove_stale(cache.glob(f"{_FETCHING}/*"), within=cache)
    for stamp in cache.glob("verified/*/*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - stamp.stat().st_mtime > _STAMPS_KEPT_S:
                stamp.unlink()


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(number, how)
        yield
    finally:
        os.close(number)
