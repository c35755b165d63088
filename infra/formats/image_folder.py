"""Images in files: a folder of image files, or webdataset tars such as the output of img2dataset.

Each image becomes a row with its URL, the captions and columns that are stored beside it, and its place in a file.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from infra import storage, uris
from infra.errors import InputError, NotFoundError
from infra.formats.json_rows import column_of

SOURCE_COLUMNS = ("source_file", "source_offset", "source_bytes")
"""Columns that say where the bytes of an image are: a file, and a range of it."""
_STILL_FORMATS = "avif bmp gif heic heif ico j2k jp2 jpeg jpg jxl pbm pgm png pnm ppm svg tif tiff webp"
SUFFIXES = frozenset(map(".{}".format, _STILL_FORMATS.split(" ")))
_SIDECARS = (".json", ".txt")
_MAX_SIDECAR_BYTES = 1 << 20


def read_image_folder(uri: str) -> pa.Table:
    """Return a row for each image below a folder, or in a tar, in the order of their names.

    The columns are ``url``, ``SOURCE_COLUMNS``, and those of ``NAME.json`` and ``NAME.txt`` (the caption) beside an
    image. The URL is that in the JSON, or else the URI of the file.

    Raises:
        NotFoundError: nothing exists there.
        InputError: there is no image, or a tar is damaged.
    """
    uri = uris.hide(uri)
    files = storage.walk(uri)
    if not files and not storage.exists(uri):
        raise NotFoundError(f"{uri} does not exist; check the path")
    rows = list(_rows([(one.uri.rstrip("/"), one.bytes) for one in files]))
    if not rows:
        raise InputError(f"{uri} has no image; give a folder of image files or of webdataset tars")
    names = dict.fromkeys(("url", *SOURCE_COLUMNS, *(name for row in rows for name in row)))
    return pa.table({name: column_of([row.get(name) for row in rows]) for name in names})


def read_source(row: dict[str, Any]) -> bytes:
    """Return the bytes of the image of a row."""
    with storage.open_read(row["source_file"]) as stream:
        stream.seek(row["source_offset"])
        return stream.read(row["source_bytes"])


def _rows(files: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    sizes = dict(files)
    for file, size in files:
        path = PurePosixPath(file)
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in SUFFIXES:
            stem = file.removesuffix(path.suffix)
            beside = {
                suffix: storage.read_bytes(stem + suffix)
                for suffix in _SIDECARS
                if sizes.get(stem + suffix, _MAX_SIDECAR_BYTES) < _MAX_SIDECAR_BYTES
            }
            yield _row(_file_uri(file), file, 0, size, beside)
        elif path.suffix.lower() == ".tar":
            yield from _tar_rows(file)


def _tar_rows(file: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each image of a tar; members of a sample have the same name up to its first dot."""
    beside: dict[str, dict[str, bytes]] = {}
    images: list[tuple[str, tarfile.TarInfo]] = []
    try:
        with storage.open_read(file) as stream, tarfile.open(fileobj=stream) as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                key, dot, suffix = name.partition(".")
                sample = f"{folder}/{key}"
                if not member.isfile():
                    continue
                if f".{suffix}".lower() in SUFFIXES:
                    images.append((sample, member))
                elif dot + suffix in _SIDECARS and member.size < _MAX_SIDECAR_BYTES:
                    content = archive.extractfile(member)
                    beside.setdefault(sample, {})[dot + suffix] = content.read() if content is not None else b""
    except tarfile.TarError as error:
        raise InputError(f"{file} is not a readable tar ({error}); write it again, or leave it out") from error
    for sample, member in images:
        yield _row(
            f"{_file_uri(file)}#{member.name}", file, member.offset_data, member.size, beside.get(sample, {})
        )  # fmt: skip


def _row(url: str, file: str, offset: int, size: int, beside: dict[str, bytes]) -> dict[str, Any]:
    """Return the row of an image."""
    row: dict[str, Any] = {}
    try:
        described = json.loads(beside.get(".json", b"{}"))
    except ValueError:
        described = {}
    if isinstance(described, dict):
        row |= {name: value for name, value in described.items() if name not in SOURCE_COLUMNS}
    if ".txt" in beside:
        row["caption"] = beside[".txt"].decode("utf-8", "replace").strip()
    row["url"] = str(row.get("url") or url)
    return row | dict(zip(SOURCE_COLUMNS, (file, offset, size), strict=True))


def _file_uri(file: str) -> str:
    return uris.local_path(file).absolute().as_uri() if uris.is_local(file) else file
