"""Folders that are closed to the other users of a machine."""

from pathlib import Path

GROUP = 0o770
PRIVATE = 0o700


def make_folder(folder: Path, mode: int = GROUP) -> None:
    """Create ``folder`` with ``mode``, less the umask, and its missing parents; what exists keeps its mode.

    New folders are closed to everybody outside of the user's group, so the files inside need no mode of their own. A
    team that shares a root or a cache creates that folder itself, with the mode that it wants. Raises ``OSError`` where
    a file is in the way.
    """
    for missing in reversed([parent for parent in folder.parents if not parent.exists()]):
        missing.mkdir(mode=GROUP, exist_ok=True)
    folder.mkdir(mode=mode, exist_ok=True)
