"""Temporary folders that are deleted even after their process was killed."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from infra.storage.errors import disk_full_errors
from infra.storage.locks import boot_id, exclusive_folder, remove_stale

_SCRATCH = "knn-diffusion-"


@contextmanager
def scratch() -> Iterator[Path]:
    """Create a local temporary folder and delete it at the end. Raises ``StageError`` if the disk fills up.

    Folders left by killed processes of the same user and machine are deleted first.
    """
    lock = _scratch_lock()
    remove_stale(_own_scratch_folders(lock), within=Path(tempfile.gettempdir()), lock_name=lock)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, ignore_cleanup_errors=True) as outer, ExitStack() as locks:
        with suppress(OSError):  # a file system without locks: stale folders are not deleted there either
            locks.enter_context(exclusive_folder(Path(outer), within=Path(outer).parent, lock_name=lock))
        with (
            tempfile.TemporaryDirectory(dir=outer, ignore_cleanup_errors=True) as folder,
            disk_full_errors(Path(folder)),
        ):
            yield Path(folder)


def _own_scratch_folders(lock: str) -> Iterator[Path]:
    for lock_file in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*/{lock}"):
        with suppress(FileNotFoundError):
            if lock_file.parent.lstat().st_uid == os.getuid():  # skip other users' folders and links
                yield lock_file.parent


def _scratch_lock() -> str:
    """Return a lock name specific to this machine, because some shared file systems lock on each machine only."""
    try:
        return f"lock-{boot_id()}"
    except OSError:
        return f"lock-{socket.gethostname()}"
