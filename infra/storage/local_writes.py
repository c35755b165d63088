"""Atomic writes of local files: complete content under another name, then a rename or a link."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from infra.storage.folders import make_folder


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a stream whose content replaces ``path``, after fsync, if the block succeeds; else ``path`` is unchanged."""
    make_folder(path.parent)
    partial = partial_path(path)
    try:
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def create_exclusive(path: Path, data: bytes) -> bool:
    """Write a file unless another one exists. Return True if ``path`` contains ``data`` afterwards."""
    make_folder(path.parent)
    partial = partial_path(path)
    try:
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            return path.read_bytes() == data
        sync(path.parent)
        return True
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """Return a new name beside ``path``, to write the file under before it is renamed."""
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
