"""Files anywhere fsspec reaches: the only place that knows whether a URI is local or remote.

A URI is a local path, ``file://…``, ``s3://…`` or any other fsspec scheme. Folders are URIs without a trailing slash.
Writers here are all-or-nothing: a reader sees the whole object or none of it, which is what a commit marker needs.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import fsspec
from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError
from fsspec.implementations.local import LocalFileSystem

from infra.errors import InputError, NotFoundError, TransientError

_BLOCK_BYTES = 1 << 20


def join(uri: str, *parts: str) -> str:
    """``uri`` with ``parts`` below it, whatever its scheme."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """``uri`` made independent of the working directory: references must mean the same on every worker."""
    return str(Path(local_path(uri)).absolute()) if is_local(uri) else uri.rstrip("/")


def is_local(uri: str) -> bool:
    """Whether ``uri`` names a file of this machine."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path behind a local URI. Raises ``ValueError`` for a remote one."""
    if not is_local(uri):
        raise ValueError(f"{uri} is remote; download it with storage.fetch first")
    return Path(uri.removeprefix("file://")).expanduser()


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = _fs(uri)
    with _told(uri):
        return bool(fs.exists(path))


def size(uri: str) -> int:
    """Size in bytes. Raises ``NotFoundError``."""
    fs, path = _fs(uri)
    with _told(uri):
        return int(fs.size(path))


def names(uri: str) -> list[str]:
    """Sorted base names directly below a folder; empty when the folder is not there."""
    fs, path = _fs(uri)
    with _told(uri):
        if not fs.exists(path):
            return []
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))


@contextmanager
def open_read(uri: str) -> Iterator[IO[bytes]]:
    """A binary reader. Raises ``NotFoundError`` when nothing is there."""
    fs, path = _fs(uri)
    with _told(uri), fs.open(path, "rb") as stream:
        yield stream


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises ``NotFoundError``."""
    with open_read(uri) as stream:
        return stream.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole object at once: a local file by rename after fsync, a remote one by a single PUT."""
    fs, path = _fs(uri)
    with _told(uri):
        if isinstance(fs, LocalFileSystem):
            _replace(Path(path), data)
        else:
            fs.pipe_file(path, data)


def put(local: Path, uri: str) -> None:
    """Copy a local file to ``uri``; the destination is whole or absent."""
    fs, path = _fs(uri)
    with _told(uri):
        if isinstance(fs, LocalFileSystem):
            destination = Path(path)
            destination.parent.mkdir(parents=True, exist_ok=True)
            partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
            with open(local, "rb") as source, open(partial, "wb") as target:
                for block in iter(lambda: source.read(_BLOCK_BYTES), b""):
                    target.write(block)
            partial.replace(destination)
        else:
            fs.put_file(str(local), path)


def fetch(uri: str, local: Path) -> Path:
    """Copy ``uri`` to a local file and return it; a local URI is returned as it is, without a copy."""
    if is_local(uri):
        return local_path(uri)
    fs, path = _fs(uri)
    local.parent.mkdir(parents=True, exist_ok=True)
    with _told(uri):
        partial = local.with_name(f".{local.name}.{os.getpid()}.partial")
        fs.get_file(path, str(partial))
        partial.replace(local)
    return local


def remove(uri: str) -> None:
    """Delete a file or a folder with all it holds; nothing happens when it is not there."""
    fs, path = _fs(uri)
    with _told(uri):
        if fs.exists(path):
            fs.rm(path, recursive=True)


def sha256(uri: str) -> str:
    """Hex sha256 of the bytes. Raises ``NotFoundError``."""
    digest = hashlib.sha256()
    with open_read(uri) as stream:
        for block in iter(lambda: stream.read(_BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def scratch() -> Iterator[Path]:
    """A local working folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="knn-diffusion-") as folder:
        yield Path(folder)


def _fs(uri: str) -> tuple[Any, str]:
    if is_local(uri):
        fs, path = fsspec.core.url_to_fs(str(local_path(uri)))
    else:  # other processes write here too: a cached listing would hide what they commit
        try:
            fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise InputError(f"{uri} cannot be opened: {error}; write a path or an s3:// address") from error
    return fs, cast(str, path)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Turn the many errors of object stores into the two that a caller can act on."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"{uri} does not exist; check the path, or run the stage that writes it") from error
    except PermissionError as error:
        raise NotFoundError(f"{uri} may not be accessed ({error}); check the credentials and the bucket") from error
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"{uri} cannot be used: {error.strerror or error}; name another path") from error
    except NoCredentialsError as error:
        raise NotFoundError(f"{uri} needs credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except (ConnectionError, TimeoutError, EndpointConnectionError, ReadTimeoutError, ConnectTimeoutError) as error:
        raise TransientError(f"{uri} could not be reached: {error}") from error
