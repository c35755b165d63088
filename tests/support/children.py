"""Functions that child processes import."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path


def made(folder: Path) -> Callable[[str], int]:
    """Return a function, and leave a file that counts the child processes."""
    (folder / f"born-{os.getpid()}").touch()
    return partial(length, folder)


def length(folder: Path, text: str) -> int:
    if text == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "unlucky" and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.abort()
    if not text:
        raise ValueError("empty")
    return len(text)


def unmakeable() -> Callable[[], None]:
    os._exit(1)
