"""Size-bounded cache of remote files, addressed by digest and shared by all processes of a machine.

    <cache>/ab/abcdef….npy      a remote file, by its sha256
    <cache>/verified/           stamps: see ``infra.storage.digest_stamps``
    <cache>/fetching/abcdef…/   a download in progress, locked by the process that fetches it
    <cache>/uses, lock          pins, see ``infra.storage.pins``; lock for pinning (shared) and eviction (exclusive)
    <cache>/owed                pending purges: files to delete once no process uses them
    <cache>/registered/         files of registered generators, by the generator's digest
    <cache>/pixels, encoded, …  files derived by stages

Registered and derived files count towards the limit, ``Settings.cache_bytes``. Whenever files of one hundredth of the
limit have been added, the least recently used ones are evicted until the rest fits (``infra.storage.eviction``).

A fetched file is in use while the returned path is referenced anywhere in its process. The path holds a shared lock on
one byte of ``uses``, chosen by the digest; the kernel releases it when the process dies. An open or memory-mapped file
may still be evicted: on POSIX systems an unlinked file exists until its last user closes it. Derived files have no such
lock. They are kept for an hour after their last use.
"""

import os
from collections.abc import Callable
from pathlib import Path

from infra import storage, validation
from infra.errors import InputError
from infra.settings import Settings
from infra.storage.digest_stamps import is_verified, stamp_file, write_stamp
from infra.storage.errors import disk_full_errors
from infra.storage.eviction import FETCHING, REGISTERED, evict
from infra.storage.folders import make_folder
from infra.storage.locks import exclusive_folder
from infra.storage.pins import pin

_MAX_SUFFIX_LENGTH = 32
_added_bytes: dict[tuple[int, str], int] = {}  # by (pid, cache), since the last eviction


class DigestMismatchError(Exception):
    """Raised when the fetched bytes do not match the expected size and digest."""


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
        pinned = pin(path, sha256, cache)
        if path.exists() and is_verified(path, sha256, size, cache):
            return pinned
        with exclusive_folder(cache / FETCHING / sha256, within=cache) as folder:
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
            registered = pin(registered, digest, cache)
    except InputError:
        if not is_complete(registered):  # a read-only cache can still serve a complete folder
            raise
    if is_complete(registered):
        return registered
    with disk_full_errors(cache), exclusive_folder(cache / FETCHING / digest, within=cache) as folder:
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


def _account_for(cache: Path, size: int) -> None:
    limit, key = Settings().cache_bytes, (os.getpid(), str(cache))
    _added_bytes[key] = _added_bytes.get(key, limit) + size  # the first addition always evicts
    if _added_bytes[key] > limit // 100:
        _added_bytes[key] = 0
        evict(cache, limit)
