"""Deletion of cached files: of the least recently used ones above the limit, and of given digests.

Files in use are kept: fetched files that a process has pinned, and derived files for an hour after their last use. See
:mod:`infra.storage.file_cache` for the folders of a cache.
"""

import contextlib
import fcntl
import time
from collections.abc import Collection
from pathlib import Path

from infra import logs
from infra.storage.digest_stamps import stamp_file
from infra.storage.locks import remove_stale
from infra.storage.pins import is_pinned, locked

DERIVED_GRACE_S = 3600.0
"""Seconds after its last use during which a derived file counts as in use."""
FETCHING = "fetching"
"""Folder of downloads in progress."""
REGISTERED = "registered"
"""Folder of the files of registered generators."""
_STAMP_RETENTION_S = 90 * 86_400.0
_PENDING = "owed"
_BOOKKEEPING = frozenset({"verified", FETCHING, "uses", "lock", _PENDING, f"{_PENDING}.partial"})


def evict(cache: Path, limit_bytes: int) -> int:
    """Delete the least recently used files until at most ``limit_bytes`` remain; return the number of remaining bytes.

    Files in use are kept, so the cache may exceed its limit. Partial downloads of dead processes are deleted, too.
    """
    with locked(cache, fcntl.LOCK_EX):
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
    with locked(cache, fcntl.LOCK_EX):
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
        return is_pinned(path.stem, cache)
    parts = path.relative_to(cache).parts
    if parts[0] == REGISTERED and len(parts) > 2 and is_pinned(parts[1], cache):
        return True
    try:
        status = path.stat()
    except FileNotFoundError:  # its writer has just renamed it
        return False
    return time.time() - max(status.st_atime, status.st_mtime) < DERIVED_GRACE_S


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
    remove_stale(cache.glob(f"{FETCHING}/*"), within=cache)
    for stamp in cache.glob("verified/*/*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - stamp.stat().st_mtime > _STAMP_RETENTION_S:
                stamp.unlink()
