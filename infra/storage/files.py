"""Files on any fsspec file system; the only module that distinguishes local from remote files.

A URI is a local path, ``file://…``, ``s3://…`` or any other fsspec scheme. Folders are URIs without a trailing slash.
Writes are atomic: a reader sees the complete object or no object, as commit markers require. Objects are never renamed
in an object store, because a rename is a copy and a deletion there. A multipart upload whose writer died never becomes
an object; the store's lifecycle rule (AbortIncompleteMultipartUpload) deletes its parts.
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from infra.errors import InputError, NotFoundError
from infra.storage.errors import error_code, storage_errors, with_retries
from infra.storage.folders import make_folder
from infra.storage.local_writes import atomic_write, create_exclusive, partial_path
from infra.uris import is_local, is_s3, join, local_path, masked, reveal

PART_BYTES = 8 << 20
"""Part size of multipart uploads, for files of two parts or more. Up to ten parts are in memory at once."""
_MAX_PARTS = 10_000  # limit of S3 for one object; above 78 GiB the parts are larger
_BLOCK_BYTES = 1 << 20
_READERS = 16
Item = TypeVar("Item")
Result = TypeVar("Result")


def exists(uri: str) -> bool:
    """Return True if a file or folder exists at ``uri``. Raises ``NotFoundError`` if the bucket does not exist."""
    fs, path = _fs(uri)
    return with_retries(uri, lambda: _info(fs, path) is not None)


def size(uri: str) -> int:
    """Return the size of a file in bytes. Raises ``NotFoundError``."""
    fs, path = _fs(uri)
    return with_retries(uri, lambda: int(fs.size(path)))


def modified(uri: str) -> float:
    """Return the modification time by the store's clock, in seconds since 1970. Raises ``NotFoundError``."""
    fs, path = _fs(uri)
    return with_retries(uri, lambda: float(fs.modified(path).timestamp()))


def expire(uri: str) -> None:
    """Set the mtime of a local file to 0, which needs no disk space. No effect on remote objects."""
    if is_local(uri):
        with storage_errors(uri):
            os.utime(local_path(uri), (0, 0))


def list_names(uri: str) -> list[str]:
    """Return the sorted base names directly below a folder; empty if the folder does not exist."""
    fs, path = _fs(uri)

    def read_names() -> list[str]:
        if _info(fs, path) is None:
            return []
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))

    return with_retries(uri, read_names)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """An existing object: its URI, its size in bytes, and its modification time as in :func:`modified`."""

    uri: str
    bytes: int
    modified: float


def walk(uri: str) -> list[StoredObject]:
    """Return every object below a folder, recursively, sorted by URI; empty if the folder does not exist."""
    fs, path = _fs(uri)

    def read_objects() -> list[StoredObject]:
        if _info(fs, path) is None:
            return []
        entries = fs.find(path, detail=True)
        return [
            StoredObject(
                uri=join(uri, name.removeprefix(path)), bytes=int(entry["size"]), modified=_modified_time(entry)
            )
            for name, entry in sorted(entries.items())
        ]

    return with_retries(uri, read_objects)


@contextmanager
def open_read(uri: str) -> Iterator[IO[bytes]]:
    """Open a binary reader. Only the byte ranges that are read are requested from a store. Raises ``NotFoundError``."""
    fs, path = _fs(uri)
    stream = with_retries(uri, lambda: fs.open(path, "rb"))
    with storage_errors(uri), stream:
        yield stream


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """Return the content of a file. Raises ``NotFoundError``.

    At most ``max_bytes + 1`` bytes are read from an HTTP server, so that the caller can detect a larger file.
    """
    fs, path = _fs(uri)
    if max_bytes is not None and uri.startswith(("http://", "https://")):  # the server may never stop sending
        data = bytearray()
        with open_read(uri) as stream:
            while len(data) <= max_bytes and (part := stream.read(max_bytes + 1 - len(data))):
                data += part
        return bytes(data)
    return with_retries(uri, lambda: bytes(fs.cat_file(path)))


def read_all(read: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Call ``read`` for each item in threads, so that round trips to a store overlap. Return the results in order."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, items))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically: a local file by rename after fsync, a remote one by a single PUT."""
    fs, path = _fs(uri)

    def write() -> None:
        if isinstance(fs, LocalFileSystem):
            with atomic_write(Path(path)) as stream:
                stream.write(data)
        else:
            fs.pipe_file(path, data)

    with_retries(uri, write)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a small file if none exists. Return True for exactly one of several concurrent writers.

    A local file is created by a hard link to its complete content, an S3 object with ``If-None-Match: *``. ``data``
    must be unique to the writer, e.g. contain a token. If the response to a PUT is lost, it shows which writer won.
    """
    fs, path = _fs(uri)

    def create() -> bool:
        if isinstance(fs, LocalFileSystem):
            return create_exclusive(Path(path), data)
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            pass
        except OSError as error:  # some stores report the failed condition as a plain error
            if error_code(error) not in {"PreconditionFailed", "412"}:
                raise
        else:
            return True
        try:
            return bool(fs.cat_file(path) == data)
        except FileNotFoundError:  # deleted in the meantime
            return False

    return with_retries(uri, create)


def put(local: Path, uri: str) -> None:
    """Copy a local file to ``uri`` atomically. Files above 16 MiB go to S3 in parallel parts."""
    fs, path = _fs(uri)

    def copy() -> None:
        if isinstance(fs, LocalFileSystem):
            with open(local, "rb") as source, atomic_write(Path(path)) as target:
                for block in iter(lambda: source.read(_BLOCK_BYTES), b""):
                    target.write(block)
        elif is_s3(uri):
            part_bytes = max(PART_BYTES, math.ceil(local.stat().st_size / _MAX_PARTS))
            fs.put_file(str(local), path, chunksize=part_bytes)
        else:
            fs.put_file(str(local), path)

    with_retries(uri, copy)


def fetch(uri: str, local: Path) -> Path:
    """Copy the file at ``uri`` to ``local`` and return the path. A local URI is returned as a path without a copy."""
    if is_local(uri):
        return local_path(uri)
    fs, path = _fs(uri)

    def copy() -> Path:
        make_folder(local.parent)
        partial = partial_path(local)
        try:
            fs.get_file(path, str(partial))
            partial.replace(local)
        finally:
            partial.unlink(missing_ok=True)
        return local

    return with_retries(uri, copy)


def remove(uri: str) -> None:
    """Delete a file, or a folder with its contents; no effect if it does not exist.

    Raises ``NotFoundError`` if deletion is not permitted.
    """
    fs, path = _fs(uri)

    def delete() -> None:
        if (before := _info(fs, path)) is None:
            return
        with suppress(FileNotFoundError):  # deleted by another process
            fs.rm(path, recursive=True)
        if not is_local(uri) and _info(fs, path) == before:  # s3fs uses bulk deletes and ignores per-key errors
            raise PermissionError("it still exists after its deletion (locked, or no permission to delete)")

    with_retries(uri, delete)


def discard(uri: str) -> None:
    """Delete like :func:`remove`, but ignore a lack of permission."""
    with suppress(NotFoundError):
        remove(uri)


def sha256(uri: str) -> str:
    """Return the hexadecimal sha256 of a file. Raises ``NotFoundError``."""
    digest = hashlib.sha256()
    with open_read(uri) as stream:
        for block in iter(lambda: stream.read(_BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def _fs(uri: str) -> tuple[Any, str]:
    if is_local(uri):
        fs, path = fsspec.core.url_to_fs(str(local_path(uri)))
        return fs, cast(str, path)
    options: dict[str, Any] = {"use_listings_cache": False}  # a cached listing would hide commits of other writers
    if is_s3(uri):
        options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": 2}}
    try:
        with storage_errors(uri):  # some file systems, e.g. ftp, connect here already
            fs, path = fsspec.core.url_to_fs(reveal(uri), **options)
    except (ValueError, ImportError) as error:
        raise InputError(f"{masked(f'{uri} cannot be opened: {error}')}; use a path or an s3:// URI") from None
    if is_s3(uri):
        fs.retries = 2
    return fs, cast(str, path)


def _info(fs: Any, path: str) -> dict[str, Any] | None:
    """Return fsspec's info on a file or folder, or None if it does not exist. A missing bucket is an error."""
    try:
        return cast(dict[str, Any], fs.info(path))
    except FileNotFoundError as error:
        if error_code(error) == "NoSuchBucket":
            raise
        return None


def _modified_time(entry: dict[str, Any]) -> float:
    """Return the modification time of a listed object: ``mtime`` of a local file, ``LastModified`` of an object."""
    modified_at: Any = entry["mtime"] if "mtime" in entry else entry["LastModified"]
    return float(modified_at.timestamp() if hasattr(modified_at, "timestamp") else modified_at)
