"""Files verified once: while nothing has touched them since, their bytes are not hashed again.

A stamp, ``<cache>/verified/ab/<sha256>-<place>``, holds a file's size, modification and change time, inode and device
as they were when its bytes had that digest. While they are the same, opening costs a look at the file, whatever its
size. Whoever writes to a file changes its times, even one who sets the modification time back; then it is hashed again.
What changes no time (a failing disk) is found once ``verified/`` is deleted, which may be done at any moment.

A stamp's own modification time is when the file was used last.
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
_TICK_S = 0.01  # of a file system's clock: times that are younger cannot tell two writes apart
_MOST_SEEN = 1 << 17
_stamps: dict[
    tuple[str, str, str], tuple[Path, list[int]]
] = {}  # stamps that this process has read, and what was there


def is_verified(path: Path, sha256: str, size: int, cache: Path) -> bool:
    """Whether ``path`` holds the bytes of that digest: by its stamp, else by hashing, which leaves a stamp.

    Raises ``NotFoundError`` when it may not be read.
    """
    try:
        before = path.stat()
    except FileNotFoundError:
        return False
    if before.st_size != size:
        return False
    key, now = (str(path), sha256, str(cache)), _fingerprint(before)
    if (seen := _stamps.get(key)) and seen[1] == now and _touch(seen[0]):
        return True
    stamp = stamp_file(cache, sha256, path)
    if _read_stamp(stamp) == now:
        _touch(stamp)
        if len(_stamps) >= _MOST_SEEN:
            _stamps.clear()
        _stamps[key] = stamp, now
        return True
    time.sleep(min(_TICK_S, max(0.0, before.st_ctime + _TICK_S - time.time())))
    try:
        if storage.sha256(str(path)) != sha256 or _fingerprint(path.stat()) != now:
            return False
    except (FileNotFoundError, NotFoundError) as error:
        if isinstance(error.__cause__ or error, FileNotFoundError):  # another process found it damaged, and removed it
            return False
        raise
    write_stamp(stamp, before)
    return True


def stamp_file(cache: Path, sha256: str, path: Path) -> Path:
    """Where the stamp of ``path`` with that digest is, if there is one."""
    place = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]
    return cache / FOLDER / sha256[:2] / f"{sha256}-{place}"


def _touch(stamp: Path) -> bool:
    """Note that the stamp's file is used; whether the stamp is there, in a cache that may be written."""
    try:
        os.utime(stamp)  # the file's own times stay as they are
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
    """Note that a file of this status has the stamp's digest. Best effort: without it the file is hashed again."""
    partial = stamp.with_name(f".{stamp.name}.{os.getpid()}-{threading.get_ident()}")
    with contextlib.suppress(OSError):
        make_folder(stamp.parent)
        partial.write_text(json.dumps(_fingerprint(status)))
        partial.replace(stamp)
