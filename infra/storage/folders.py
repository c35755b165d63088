"""Folders that other users of the machine cannot access."""

from pathlib import Path

GROUP = 0o770
PRIVATE = 0o700


def make_folder(folder: Path, mode: int = GROUP) -> None:
    """Create ``folder`` and its missing parents; existing folders keep their mode.

    ``mode`` is subject to the umask; missing parents get :data:`GROUP`. New folders are closed to everybody outside the
    user's group, so the files inside need no mode of their own. A team that shares a root or a cache creates that
    folder itself, with the mode that it wants. Raises ``OSError`` if a file has the name of one of the folders.
    """
    for missing in reversed([parent for parent in folder.parents if not parent.exists()]):
        missing.mkdir(mode=GROUP, exist_ok=True)
    folder.mkdir(mode=mode, exist_ok=True)
