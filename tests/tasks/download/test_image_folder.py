"""Import of image files: folders, tars and the output of img2dataset, through the decoder of downloads."""

import hashlib
import json
import tarfile
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.fakes import WithoutRay
from support.tiny_domain import drawn, encoded

from infra.download.downloader import DownloadPolicy
from infra.errors import InputError, NotFoundError, StageError
from infra.formats import webdataset
from infra.formats.image_folder import read_image_folder
from tasks.download.config import DownloadConfig, ListOptions
from tasks.download.task import download
from tasks.references.domain_folder import DomainFolder

PNG = encoded(drawn("red", "circle"))
JPEG = encoded(drawn("blue", "square"), "JPEG")


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, BytesIO(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with good and bad image files, sidecars and a tar."""
    base = tmp_path / "images"
    (base / "cats" / "old").mkdir(parents=True)
    (base / "cats" / "a b.png").write_bytes(PNG)
    (base / "cats" / "a b.txt").write_text("a red circle\n")
    (base / "cats" / "old" / "copy.PNG").write_bytes(PNG)
    (base / "cats" / "old" / "text.jpg").write_text("no image")
    (base / "cats" / ".hidden.png").write_bytes(PNG)
    (base / "big.png").write_bytes(encoded(Image.effect_noise((200, 200), 100)))
    (base / "readme.txt").write_text("about")
    described = {"url": "HTTP://Host/1.jpg", "caption": "a square", "id": 7, "key": "x", "sha256": "0", "width": 3}
    tar_of(
        base / "00000.tar",
        {
            "000000000.jpg": JPEG, "000000000.json": json.dumps(described).encode(), "000000000.txt": b"a square",
            "sub/000000001.seg.png": PNG, "sub/000000001.png": encoded(drawn("green", "bar")),
        },
    )  # fmt: skip
    return base


def test_read_image_folder_lists_files_and_members_in_order(folder: Path) -> None:
    table = read_image_folder(str(folder))
    uri = folder.as_uri()
    assert table["url"].to_pylist() == [
        "HTTP://Host/1.jpg", f"{uri}/00000.tar#sub/000000001.png", f"{uri}/big.png", f"{uri}/cats/a%20b.png",
        f"{uri}/cats/old/copy.PNG", f"{uri}/cats/old/text.jpg",
    ]  # fmt: skip
    assert table["caption"].to_pylist() == ["a square", None, None, "a red circle", None, None]
    assert table["id"].to_pylist() == [7, *[None] * 5]
    assert read_image_folder(str(folder / "00000.tar")).num_rows == 2
    with pytest.raises(NotFoundError, match="none does not exist"):
        read_image_folder(str(folder / "none"))
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no image; give a folder of image files or of webdataset tars"):
        read_image_folder(str(folder / "empty"))
    (folder / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match=r"bad\.tar is not a readable tar"):
        read_image_folder(str(folder))


def test_download_of_an_image_folder_decodes_and_counts_its_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WithoutRay().install(monkeypatch)
    place = DomainFolder(uri=str(tmp_path / "base"), cache=tmp_path / "cache")
    config = DownloadConfig(shard_rows=4, policy=DownloadPolicy(max_body_bytes=20_000), workers=1)
    made = download(str(folder), place, config, options=ListOptions(images=True))
    assert made.reference.manifest().info["outcomes"] == {
        "success": 3, "body_too_large": 1, "duplicate_content": 1, "not_an_image": 1
    }  # fmt: skip
    first = pq.read_table(Path(made.reference.uri, "00000.parquet")).to_pylist()
    assert [row["error_class"] for row in first] == ["success", "success", "body_too_large", "success"]
    assert (first[0]["url"], first[0]["id"], first[0]["width"]) == ("http://host/1.jpg", 7, 48)
    assert first[0]["sha256"] == hashlib.sha256(JPEG).hexdigest()
    assert not {"source_file", "source_offset", "source_bytes"} & set(first[0])
    images = dict(webdataset.iter_images(Path(made.reference.uri, "00000.tar")))
    assert sorted(images) == ["000000000", "000000001", "000000003"]
    assert all(data.startswith(b"\x89PNG") for data in images.values())
    assert download(str(folder), place, config, options=ListOptions(images=True)).skipped

    (folder / "new.png").write_bytes(encoded(drawn("pink", "cross")))
    grown = download(str(folder), place, config, options=ListOptions(images=True), previous=made.reference)
    assert grown.reference.manifest().info["added"]["outcomes"] == {"success": 1}
    # The tars of an images folder are an input themselves.
    other = DomainFolder(uri=str(tmp_path / "other"), cache=tmp_path / "cache")
    again = download(made.reference.uri, other, config, options=ListOptions(images=True)).reference
    urls = pq.read_table(Path(again.uri, "00000.parquet"))["url"].to_pylist()
    assert urls == ["http://host/1.jpg", first[1]["url"], first[3]["url"]]


def test_list_of_urls_with_the_columns_of_image_files_reads_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WithoutRay().install(monkeypatch)
    (tmp_path / "secret.png").write_bytes(PNG)
    named = {"source_file": str(tmp_path / "secret.png"), "source_offset": 0, "source_bytes": len(PNG)}
    (tmp_path / "list.jsonl").write_text(json.dumps({"url": "http://127.0.0.1:1/a.png", **named}) + "\n")
    place = DomainFolder(uri=str(tmp_path / "domain"), cache=tmp_path / "cache")
    with pytest.raises(StageError, match=r"none of the 1 URLs .* \(blocked_address 1\)"):
        download(str(tmp_path / "list.jsonl"), place, DownloadConfig())
