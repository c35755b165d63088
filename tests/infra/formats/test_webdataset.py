"""Tests of image shards in webdataset format."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from infra.errors import IntegrityError
from infra.formats import webdataset


def tar_of(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_iter_images_yields_only_images_in_order(form: int, tmp_path: Path) -> None:
    images = [("000010002", b"\x89PNG two"), ("000010000", b""), ("000010001", bytes(range(256)) * 300)]
    members = [
        member
        for (key, data), suffix in zip(images, (".png", ".jpeg", ".webp"), strict=True)
        for member in ((f"{key}.json", b"{}"), (f"{key}{suffix}", data), (f"{key}.txt", b"caption"))
    ]
    members.append(("sub/000010003.jpg", b"\xff\xd8"))
    tar = tar_of(tmp_path / "00001.tar", members, form)
    assert list(webdataset.iter_images(tar)) == [*images, ("000010003", b"\xff\xd8")]


def test_iter_images_skips_links_and_folders(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.DIRTYPE), ("b.png", tarfile.SYMTYPE), ("c.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            tar.addfile(info)
    assert list(webdataset.iter_images(tmp_path / "a.tar")) == []


def test_iter_images_of_an_empty_tar_yields_nothing(tmp_path: Path) -> None:
    assert list(webdataset.iter_images(tar_of(tmp_path / "a.tar", []))) == []


@pytest.mark.parametrize("kept_bytes", [0, 100, 512, 700, 512 + 2048 + 512, 512 + 2048 + 1000])
def test_iter_images_of_a_truncated_tar_raises_integrity_error(kept_bytes: int, tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "00000.tar", [("a.png", b"a" * 2000), ("b.png", b"b" * 2000)])
    tar.write_bytes(tar.read_bytes()[:kept_bytes])
    with pytest.raises(IntegrityError) as caught:
        list(webdataset.iter_images(tar))
    assert str(caught.value).startswith(f"{tar} is not a complete tar (")
    assert str(caught.value).endswith("); delete its shard's marker and run again")


def test_iter_images_of_another_file_raises_integrity_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>Not Found</html>" * 100)
    with pytest.raises(IntegrityError, match=r"a\.tar is not a complete tar \("):
        list(webdataset.iter_images(tmp_path / "a.tar"))
