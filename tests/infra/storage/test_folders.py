import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import storage
from infra.storage.folders import PRIVATE, make_folder


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_make_folder_new_folders_are_closed_to_others(tmp_path: Path) -> None:
    make_folder(tmp_path / "a/b")
    make_folder(tmp_path / "c/d", PRIVATE)
    assert [mode(tmp_path / name) for name in ("a", "a/b", "c", "c/d")] == [0o770, 0o770, 0o770, 0o700]


def test_make_folder_existing_folder_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o775)
    make_folder(tmp_path / "shared")
    assert mode(tmp_path / "shared") == 0o775


def test_make_folder_existing_file_raises_os_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "a")
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "a/b")


def test_write_bytes_creates_a_root_closed_to_others(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "root/shapes/manifest.json"), b"{}")
    assert mode(tmp_path / "root") == 0o770
