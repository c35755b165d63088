"""Exclusive folder locks (flock); the kernel releases them when the process dies."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock

from infra.errors import InputError
from infra.storage.folders import make_folder

LOCK = "lock"


@contextlib.contextmanager
def exclusive_folder(folder: Path, *, within: Path, wait: bool = True, lock_name: str = LOCK) -> Iterator[Path]:
    """Create and lock ``folder`` for this thread; delete it with its contents at the end of the block.

    Args:
        folder: The folder to create and lock.
        within: The root that ``folder`` must be below.
        wait: Wait until another holder releases the folder.
        lock_name: Name of the lock file in ``folder``.

    Raises:
        filelock.Timeout: Another thread or process holds the folder and ``wait`` is False.
        InputError: ``folder`` is not below ``within`` after links and ``..`` are resolved. Nothing is deleted.
    """
    require_within(folder, within)
    # Without flock, a lock file would stay locked after its process was killed: raise an error instead.
    lock = FileLock(folder / lock_name, blocking=wait, fallback_to_soft=False)
    while not lock.is_locked:
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # the previous holder has just removed it
            make_folder(folder)
            lock.acquire()
    try:
        yield folder
    finally:
        try:
            require_within(folder, within)  # a link may have replaced the folder in the meantime
            with contextlib.suppress(FileNotFoundError):  # another process deletes files there, too
                for entry in folder.iterdir():
                    if entry.name != lock_name:
                        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            (folder / lock_name).unlink(missing_ok=True)  # last, so that nobody else locks a folder with files
            with contextlib.suppress(OSError):  # the next holder is already there
                folder.rmdir()
        finally:
            lock.release()


def require_within(folder: Path, root: Path) -> None:
    """Raise ``InputError`` unless ``folder`` is below ``root`` after links and ``..`` of both are resolved."""
    if not _is_within(folder, root):
        raise InputError(
            f"{folder} is not below {root}: its real path is {os.path.realpath(folder)}; remove the link or the '..' "
            "that leads out of it"
        )


def remove_stale(folders: Iterable[Path], *, within: Path, lock_name: str = LOCK) -> None:
    """Delete those of ``folders`` that no live thread holds; links that lead out of ``within`` are kept."""
    for folder in folders:
        if _is_within(folder, within):
            with contextlib.suppress(OSError), exclusive_folder(folder, within=within, wait=False, lock_name=lock_name):
                pass


def _is_within(folder: Path, root: Path) -> bool:
    return Path(os.path.realpath(root)) in Path(os.path.realpath(folder)).parents


def boot_id() -> str:
    """Return the kernel's random id of this boot. Raises ``OSError`` if the system has none."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
