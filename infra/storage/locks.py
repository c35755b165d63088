"""Folders that one thread has for itself, by a lock in them that the kernel frees when the process dies."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from infra.errors import InputError
from infra.storage.folders import make_folder

LOCK = "lock"


@contextlib.contextmanager
def exclusive_folder(folder: Path, *, within: Path, wait: bool = True, lock_name: str = LOCK) -> Iterator[Path]:
    """``folder`` for this thread alone; it and all it holds are deleted afterwards.

    Raises:
        BlockingIOError: another has it, and this call does not ``wait``.
        InputError: ``folder`` is not below ``within``, once links and ``..`` are resolved; nothing is deleted.
    """
    require_within(folder, within)
    lock = folder / lock_name
    while True:
        try:
            make_folder(folder)
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
            require_within(folder, within)  # a link may have taken its place meanwhile
            with contextlib.suppress(FileNotFoundError):  # somebody tidies up there, too
                for left in folder.iterdir():
                    if left.name != lock.name:
                        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another one has come already
                folder.rmdir()
        finally:
            os.close(number)


def require_within(folder: Path, root: Path) -> None:
    """Raise ``InputError`` unless ``folder`` is below ``root``, once links and ``..`` of both are resolved."""
    if not _is_within(folder, root):
        raise InputError(
            f"{folder} is not below {root}: its real path is {os.path.realpath(folder)}; remove the link or the name "
            "that leads out of it"
        )


def remove_stale(folders: Iterable[Path], *, within: Path, lock_name: str = LOCK) -> None:
    """Remove those of ``folders`` that nobody has for itself any more; links that lead out of ``within`` stay."""
    for folder in folders:
        if _is_within(folder, within):
            with contextlib.suppress(OSError), exclusive_folder(folder, within=within, wait=False, lock_name=lock_name):
                pass


def _is_within(folder: Path, root: Path) -> bool:
    return Path(os.path.realpath(root)) in Path(os.path.realpath(folder)).parents


def boot_id() -> str:
    """This boot of this machine, which no other machine has. Raises ``OSError`` where the system does not tell."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
