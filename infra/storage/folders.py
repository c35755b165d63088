"""Folders that other users of the machine cannot access."""

from pathlib import Path

GROUP = 0o770
PRIVATE = 0o700


def make_folder(folder: Path, mode: int = GROUP) -> None:
    """Create ``folder`` and its missing parents; existing folders keep their mode.

    ``mode`` is subject to the umask; missing parents get :data:`GROUP`. By default, users outside of the owner's group
    cannot access new folders, so the modes of the files inside do not matter. A team that shares a root or a cache
    creates that folder itself, with another mode. Raises ``OSError`` if a file has the name of one of the folders.
    """
    for missing in reversed([parent for parent in folder.parents if not parent.exists()]):
        missing.mkdir(mode=GROUP, exist_ok=True)
    folder.mkdir(mode=mode, exist_ok=True)
