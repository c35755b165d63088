"""Files anywhere fsspec reaches: the only place that knows whether a URI is local or remote.

A URI is a local path, ``file://…``, ``s3://…`` or any other fsspec scheme. Folders are URIs without a trailing slash.
Writers here are all-or-nothing: a reader sees the whole object or none of it, which is what a commit marker needs.
Nothing is renamed in an object store: it would be a copy and a deletion. A multipart upload whose writer died never
becomes an object; the store's own lifecycle rule (AbortIncompleteMultipartUpload) frees its parts.
"""

import dataclasses
import hashlib
import math
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from infra.errors import InputError, NotFoundError
from infra.storage.errors import disk_full_errors, error_code, storage_errors, with_retries
from infra.storage.folders import make_folder
from infra.storage.locks import boot_id, exclusive_folder, remove_stale
from infra.uris import is_local, is_s3, join, local_path, masked, reveal

PART_BYTES = 8 << 20
"""Of a multipart upload, which begins at two parts; ten parts are in flight and in memory at once."""
_MOST_PARTS = 10_000  # that S3 takes of one object: above 78 GiB they are larger
_BLOCK_BYTES = 1 << 20
_SCRATCH = "knn-diffusion-"


def exists(uri: str) -> bool:
    """Whether a file or folder is there. Raises ``NotFoundError`` when even the bucket is not."""
    fs, path = _fs(uri)
    return with_retries(uri, lambda: _info(fs, path) is not None)


def size(uri: str) -> int:
    """Size in bytes. Raises ``NotFoundError``."""
    fs, path = _fs(uri)
    return with_retries(uri, lambda: int(fs.size(path)))


def modified(uri: str) -> float:
    """When the object was written last, by the store's own clock; seconds since 1970. Raises ``NotFoundError``."""
    fs, path = _fs(uri)
    return with_retries(uri, lambda: float(fs.modified(path).timestamp()))


def expire(uri: str) -> None:
    """Let a local file seem written long ago, which needs no room on a full disk; a remote object stays as it is."""
    if is_local(uri):
        with storage_errors(uri):
            os.utime(local_path(uri), (0, 0))


def list_names(uri: str) -> list[str]:
    """Sorted base names directly below a folder; empty when the folder is not there."""
    fs, path = _fs(uri)

    def listed() -> list[str]:
        if _info(fs, path) is None:
            return []
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))

    return with_retries(uri, listed)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """An object that is there: its size in bytes, and when it was written, as :func:`modified` tells."""

    uri: str
    bytes: int
    modified: float


def walk(uri: str) -> list[StoredObject]:
    """Every object below a folder, sorted by URI; none when the folder is not there."""
    fs, path = _fs(uri)

    def found() -> list[StoredObject]:
        if _info(fs, path) is None:
            return []
        entries = fs.find(path, detail=True)
        return [
            StoredObject(uri=join(uri, name.removeprefix(path)), bytes=int(entry["size"]), modified=_written(entry))
            for name, entry in sorted(entries.items())
        ]

    return with_retries(uri, found)


@contextmanager
def open_read(uri: str) -> Iterator[IO[bytes]]:
    """A binary reader; of a remote file, it asks for the ranges that are read. Raises ``NotFoundError``."""
    fs, path = _fs(uri)
    stream = with_retries(uri, lambda: fs.open(path, "rb"))
    with storage_errors(uri), stream:
        yield stream


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises ``NotFoundError``."""
    fs, path = _fs(uri)
    return with_retries(uri, lambda: bytes(fs.cat_file(path)))


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole object at once: a local file by rename after fsync, a remote one by a single PUT."""
    fs, path = _fs(uri)

    def write() -> None:
        if isinstance(fs, LocalFileSystem):
            with _atomic_write(Path(path)) as stream:
                stream.write(data)
        else:
            fs.pipe_file(path, data)

    with_retries(uri, write)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a small object unless there is one; of many writers exactly one is told True.

    Locally by a hard link, which comes into being with its content; in S3 by ``If-None-Match: *``. ``data`` must be
    the writer's own (hold a token, say): a PUT whose answer was lost is recognised by it.
    """
    fs, path = _fs(uri)

    def create() -> bool:
        if isinstance(fs, LocalFileSystem):
            return _create_exclusive(Path(path), data)
        try:
            fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            pass
        except OSError as error:  # a store that does not name the condition
            if error_code(error) not in {"PreconditionFailed", "412"}:
                raise
        else:
            return True
        try:
            return bool(fs.cat_file(path) == data)
        except FileNotFoundError:  # gone since
            return False

    return with_retries(uri, create)


def put(local: Path, uri: str) -> None:
    """Copy a local file to ``uri``; the destination is whole or absent. Above 16 MiB in parts, several at once."""
    fs, path = _fs(uri)

    def copy() -> None:
        if isinstance(fs, LocalFileSystem):
            with open(local, "rb") as source, _atomic_write(Path(path)) as target:
                for block in iter(lambda: source.read(_BLOCK_BYTES), b""):
                    target.write(block)
        elif is_s3(uri):
            part_bytes = max(PART_BYTES, math.ceil(local.stat().st_size / _MOST_PARTS))
            fs.put_file(str(local), path, chunksize=part_bytes)
        else:
            fs.put_file(str(local), path)

    with_retries(uri, copy)


def fetch(uri: str, local: Path) -> Path:
    """Copy ``uri`` to a local file and return it; a local URI is returned as it is, without a copy."""
    if is_local(uri):
        return local_path(uri)
    fs, path = _fs(uri)

    def copy() -> Path:
        make_folder(local.parent)
        partial = _partial(local)
        try:
            fs.get_file(path, str(partial))
            partial.replace(local)
        finally:
            partial.unlink(missing_ok=True)
        return local

    return with_retries(uri, copy)


def remove(uri: str) -> None:
    """Delete a file or a folder with all it holds; nothing happens when it is not there.

    Raises ``NotFoundError`` when it may not be deleted.
    """
    fs, path = _fs(uri)

    def delete() -> None:
        if (there := _info(fs, path)) is None:
            return
        with suppress(FileNotFoundError):  # somebody else was quicker
            fs.rm(path, recursive=True)
        if not is_local(uri) and _info(fs, path) == there:  # s3fs asks for many at once, and hears of no refusal
            raise PermissionError("it is still there after its deletion: locked, or without the right to delete")

    with_retries(uri, delete)


def discard(uri: str) -> None:
    """:func:`remove` of what nobody needs any more: where it may not be deleted, it stays."""
    with suppress(NotFoundError):
        remove(uri)


def sha256(uri: str) -> str:
    """Hex sha256 of the bytes. Raises ``NotFoundError``."""
    digest = hashlib.sha256()
    with open_read(uri) as stream:
        for block in iter(lambda: stream.read(_BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def scratch() -> Iterator[Path]:
    """A local working folder that is gone afterwards. Raises ``StageError`` when the disk fills up meanwhile.

    One whose process was killed goes when the next one of its user and machine is made in the same place.
    """
    lock = _scratch_lock()
    remove_stale(_own_scratches(lock), within=Path(tempfile.gettempdir()), lock_name=lock)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, ignore_cleanup_errors=True) as own, ExitStack() as held:
        with suppress(OSError):  # no locks in that place: then nobody sweeps there either
            held.enter_context(exclusive_folder(Path(own), within=Path(own).parent, lock_name=lock))
        with tempfile.TemporaryDirectory(dir=own, ignore_cleanup_errors=True) as folder, disk_full_errors(Path(folder)):
            yield Path(folder)


def _own_scratches(lock: str) -> Iterator[Path]:
    for found in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*/{lock}"):
        with suppress(FileNotFoundError):
            if found.parent.lstat().st_uid == os.getuid():  # neither another user's nor a link of theirs
                yield found.parent


def _scratch_lock() -> str:
    """Named by this machine: the place may be shared with others, whose locks not every file system tells."""
    try:
        return f"lock-{boot_id()}"
    except OSError:
        return f"lock-{socket.gethostname()}"


def _fs(uri: str) -> tuple[Any, str]:
    if is_local(uri):
        fs, path = fsspec.core.url_to_fs(str(local_path(uri)))
        return fs, cast(str, path)
    options: dict[str, Any] = {"use_listings_cache": False}  # others write here too: it would hide what they commit
    if is_s3(uri):
        options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": 2}}
    try:
        with storage_errors(uri):  # some connect here already, ftp for one
            fs, path = fsspec.core.url_to_fs(reveal(uri), **options)
    except (ValueError, ImportError) as error:
        raise InputError(f"{masked(f'{uri} cannot be opened: {error}')}; write a path or an s3:// address") from None
    if is_s3(uri):
        fs.retries = 2
    return fs, cast(str, path)


def _info(fs: Any, path: str) -> dict[str, Any] | None:
    """What is known of a file or folder; None when there is none. A bucket that is not there is an error."""
    try:
        return cast(dict[str, Any], fs.info(path))
    except FileNotFoundError as error:
        if error_code(error) == "NoSuchBucket":
            raise
        return None


def _written(entry: dict[str, Any]) -> float:
    """When a listed object was written: a local file's ``mtime`` or a store's ``LastModified``."""
    when: Any = entry["mtime"] if "mtime" in entry else entry["LastModified"]
    return float(when.timestamp() if hasattr(when, "timestamp") else when)


@contextmanager
def _atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A stream that becomes ``path`` when the block ends well, after fsync; otherwise nothing has happened."""
    make_folder(path.parent)
    partial = _partial(path)
    try:
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _create_exclusive(path: Path, data: bytes) -> bool:
    make_folder(path.parent)
    partial = _partial(path)
    try:
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            return path.read_bytes() == data
        _sync(path.parent)
        return True
    finally:
        partial.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Make a rename in ``folder`` outlast a power cut."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
