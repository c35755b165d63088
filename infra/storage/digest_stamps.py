"""Verification stamps: a file that has not changed since it was verified is not hashed again.

A stamp, ``<cache>/verified/ab/<sha256>-<path digest>``, records the size, modification time, change time, inode and
device of a file whose bytes had that digest. While these are unchanged, verification costs one ``stat``, independent of
the file size. Every write changes the change time, even if the modification time is set back afterwards, and the file
is hashed again. Corruption that changes no time (a failing disk) remains undetected until ``verified/`` is deleted.
Deleting that folder is always safe.

The modification time of a stamp is the time of the file's last use.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import NotFoundError
from infra.storage.folders import make_folder

FOLDER = "verified"
_CLOCK_RESOLUTION_S = 0.01  # resolution of a file system's clock: within it, two writes can have the same time
_MAX_STAMPS = 1 << 17
# Stamps that this process has read: (path, sha256, cache) -> (stamp, fingerprint).
_stamps: dict[tuple[str, str, str], tuple[Path, list[int]]] = {}


def is_verified(path: Path, sha256: str, size: int, cache: Path) -> bool:
    """Return True if ``path`` has this size (bytes) and digest, according to its stamp, or by hashing without one.

    A successful hash writes a stamp. Raises ``NotFoundError`` if the file cannot be read for lack of permission.
    """
    try:
        before = path.stat()
    except FileNotFoundError:
        return False
    if before.st_size != size:
        return False
    key, now = (str(path), sha256, str(cache)), _fingerprint(before)
    if (cached := _stamps.get(key)) and cached[1] == now and _touch(cached[0]):
        return True
    stamp = stamp_file(cache, sha256, path)
    if _read_stamp(stamp) == now:
        _touch(stamp)
        if len(_stamps) >= _MAX_STAMPS:
            _stamps.clear()
        _stamps[key] = stamp, now
        return True
    time.sleep(min(_CLOCK_RESOLUTION_S, max(0.0, before.st_ctime + _CLOCK_RESOLUTION_S - time.time())))
    try:
        if storage.sha256(str(path)) != sha256 or _fingerprint(path.stat()) != now:
            return False
    except (FileNotFoundError, NotFoundError) as error:
        if isinstance(error.__cause__ or error, FileNotFoundError):  # another process found damage and deleted the file
            return False
        raise
    write_stamp(stamp, before)
    return True


def stamp_file(cache: Path, sha256: str, path: Path) -> Path:
    """Return the path of the stamp of ``path`` with this digest; it need not exist."""
    path_digest = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    return cache / FOLDER / sha256[:2] / f"{sha256}-{path_digest}"


def _touch(stamp: Path) -> bool:
    """Record a use of the stamp's file. Return True if the stamp exists and is writable."""
    try:
        os.utime(stamp)  # the times of the file itself are unchanged
    except OSError:
        return False
    return True


def _fingerprint(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _read_stamp(stamp: Path) -> Any:
    try:
        return json.loads(stamp.read_bytes())
    except (OSError, ValueError):
        return None


def write_stamp(stamp: Path, status: os.stat_result) -> None:
    """Record that a file with this ``stat`` result has the stamp's digest.

    Best effort: if the stamp cannot be written, the file is hashed again.
    """
    partial = stamp.with_name(f".{stamp.name}.{os.getpid()}-{threading.get_ident()}")
    with contextlib.suppress(OSError):
        make_folder(stamp.parent)
        partial.write_text(json.dumps(_fingerprint(status)))
        partial.replace(stamp)
