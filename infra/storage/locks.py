"""Folders that one thread has for itself, by a lock in them that the kernel frees when the process dies."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

LOCK = "lock"


@contextlib.contextmanager
def alone(folder: Path, *, wait: bool = True, lock_name: str = LOCK) -> Iterator[Path]:
    """``folder`` for this thread alone; it is gone afterwards. Raises ``BlockingIOError`` instead of waiting."""
    lock = folder / lock_name
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            number = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileNotFoundError, FileExistsError):  # who had it before has just removed it
            continue
        try:
            fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if lock.exists() and os.fstat(number).st_ino == lock.stat().st_ino:
                break
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(number)
            raise
        os.close(number)
    try:
        yield folder
    finally:
        try:
            with contextlib.suppress(FileNotFoundError):  # somebody tidies up there, too
                for left in folder.iterdir():
                    if left.name != lock.name:
                        shutil.rmtree(left) if left.is_dir() else left.unlink()
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another one has come already
                folder.rmdir()
        finally:
            os.close(number)


def drop_abandoned(folders: Iterable[Path], lock_name: str = LOCK) -> None:
    """Remove those of ``folders`` that nobody has for itself any more."""
    for folder in folders:
        with contextlib.suppress(OSError), alone(folder, wait=False, lock_name=lock_name):
            pass


def this_boot() -> str:
    """This boot of this machine, which no other machine has. Raises ``OSError`` where the system does not tell."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
