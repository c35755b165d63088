"""Files of a list: which there are, and their content as UTF-8 text without compression."""

import codecs
import fnmatch
import io
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from infra import storage, uris
from infra.errors import InputError, NotFoundError

MAX_FIELD_BYTES = 64 << 20
"""Longest field, row or line of a text file."""
BLOCK_BYTES = 16 << 20
SUFFIXES = frozenset({".parquet", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt"})
"""Suffixes of the files of a folder that are read, with or without a suffix of ``COMPRESSIONS`` after them."""
COMPRESSIONS = frozenset({".gz", ".zst", ".zstd", ".bz2", ".xz"})
TEXT_COLUMNS = {name: pa.string() for name in ("url", "sha256", "key")}  # a key is digits with leading zeros
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}
_MARKS = {  # the longer ones first: that of UTF-16 starts the one of UTF-32
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_WILDCARD = re.compile(r"[*?\[]")


def find_files(uri: str) -> list[str]:
    """Return the files of a list: the file itself, those that a pattern matches, or those of a folder, sorted.

    A pattern has wildcards in its path: ``s3://bucket/lists/*.parquet``. ``**`` matches any folders, and hidden files
    are not matched. A folder is read recursively: files with a suffix of a list whose name starts with neither ``.``
    nor ``_``. A folder with parquet files is a data set, whose ``.json`` files are statistics and are skipped.

    Raises:
        NotFoundError: nothing exists there.
        InputError: a folder or pattern has no list.
    """
    if uri.startswith(("http://", "https://")) or (uris.is_local(uri) and uris.local_path(uri).is_file()):
        return [uri]  # a ? starts the query of a web address
    if _WILDCARD.search(uri):
        found = _matching(uri)
    else:
        below = storage.walk(uri)
        if [one.uri.rstrip("/") for one in below] == [uri] or (not below and not storage.exists(uri)):
            return [uri]  # which is reported as missing when it is opened
        found = [one.uri for one in below if _is_list(one.uri.removeprefix(uri))]
        if any(suffix_of(one) == ".parquet" for one in found):
            found = [one for one in found if suffix_of(one) != ".json"]
    if not found:
        raise InputError(f"{uri} has no list; give files of {', '.join(sorted(SUFFIXES))}")
    return found


def _matching(pattern: str) -> list[str]:
    start = pattern[: _WILDCARD.search(pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    below = storage.walk(start or ".")
    prefix = "" if start else "./"
    expression = re.compile(_glob_expression(prefix + pattern))
    hidden = re.compile(r"/\.(?!/)") if "/." not in pattern else re.compile("(?!)")
    found = [one.uri for one in below if expression.fullmatch(one.uri) and not hidden.search(one.uri, len(start))]
    if not found:
        raise NotFoundError(f"{pattern} matches no file; check the path")
    return found


def _glob_expression(pattern: str) -> str:
    """Return the regular expression of a pattern in which only ``**`` matches a slash."""
    parts = re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", pattern)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(part) or (fnmatch.translate(part)[4:-3] if part.startswith("[") else re.escape(part))
        for part in parts
    )


def _is_list(path: str) -> bool:
    names = [name for name in path.split("/") if name]
    return bool(names) and not any(name.startswith((".", "_")) for name in names) and suffix_of(names[-1]) in SUFFIXES


def suffix_of(uri: str) -> str:
    """Return the suffix of the format in lower case, without that of a compression; empty if there is none."""
    path = PurePosixPath(uri if uris.is_local(uri) else uri.partition("?")[0])  # a signed URI ends in its signature
    suffix = path.suffix.lower()
    return PurePosixPath(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


class ListSource:
    """A local file of a list, which can be opened several times."""

    def __init__(self, path: Path, suffix: str) -> None:
        """Read the compression and the encoding from the first bytes of ``path``."""
        self.path, self.suffix = path, suffix
        with path.open("rb") as stream:
            head = stream.read(8)
        self.compression = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
        self._mark = b""
        self._encoding = "utf-8"
        with self._opened() as stream:
            head = stream.read(4)
        for mark, encoding in _MARKS.items():
            if head.startswith(mark):
                self._mark, self._encoding = mark, encoding
                break

    def head(self, size: int = 1 << 16) -> bytes:
        """Return the first bytes of the text."""
        return next(self.blocks(size), b"")

    def blocks(self, size: int) -> Iterator[bytes]:
        """Yield the text as UTF-8, without a byte order mark. UTF-8 is not validated; other encodings are."""
        decoder = codecs.getincrementaldecoder(self._encoding)() if self._encoding != "utf-8" else None
        with self._opened() as stream:
            stream.read(len(self._mark))
            while block := stream.read(size):
                yield bytes(block) if decoder is None else decoder.decode(block).encode()
            if decoder is not None:
                decoder.decode(b"", final=True)

    def line_blocks(self) -> Iterator[bytes]:
        """Yield blocks of whole lines. Raises ``InputError`` for a line that is longer than ``MAX_FIELD_BYTES``."""
        rest, number = b"", 0
        for block in self.blocks(BLOCK_BYTES):
            end = block.rfind(b"\n") + 1
            if end:
                number += block.count(b"\n")
                yield rest + block[:end]
                rest = block[end:]
            else:
                rest += block
            if len(rest) > MAX_FIELD_BYTES:
                raise InputError(f"line {number + 1} is longer than {MAX_FIELD_BYTES >> 20} MiB; shorten its fields")
        if rest:
            yield rest

    def lines(self) -> Iterator[bytes]:
        r"""Yield the lines without their ``\n`` or ``\r\n``. Raises ``InputError`` as :meth:`line_blocks` does."""
        for block in self.line_blocks():
            for line in block.removesuffix(b"\n").split(b"\n"):
                yield line.removesuffix(b"\r")

    @contextmanager
    def open(self, watch: Callable[[bytes], None] | None = None) -> Iterator[Any]:
        """Open the text for pyarrow; ``watch`` sees every block and may raise."""
        if watch is None and self.compression is None and self._encoding == "utf-8":
            with self._opened() as stream:  # pyarrow skips the byte order mark
                yield stream
        else:
            with pa.PythonFile(_Blocks(self.blocks(1 << 20), watch), mode="r") as stream:
                yield stream

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        if self.compression == "xz":
            with lzma.open(self.path) as stream:
                yield stream
        elif self.compression is not None:
            with pa.OSFile(str(self.path)) as raw, pa.CompressedInputStream(raw, self.compression) as stream:
                yield stream
        else:
            with pa.OSFile(str(self.path)) as stream:
                yield stream

    def encoding_problem(self) -> str | None:
        """Return a clause that names the encoding if the text is not UTF-8; None if it is."""
        decoder, number = codecs.getincrementaldecoder("utf-8")(), 1
        try:
            for block in self.blocks(BLOCK_BYTES):
                decoder.decode(block)
                number += block.count(b"\n")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            line = number + bytes(error.object[: error.start]).count(b"\n")
            if b"\0" in bytes(error.object[:256]):
                return "it is binary data, or UTF-16 without a byte order mark; convert it to UTF-8"
            byte = error.object[error.start]
            return (
                f"it is not UTF-8: byte 0x{byte:02x} in line {line}; it is probably Windows-1252 or Latin-1, so "
                "convert it with iconv -f WINDOWS-1252 -t UTF-8"
            )
        return None


class _Blocks(io.RawIOBase):
    """A readable stream over blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes], watch: Callable[[bytes], None] | None) -> None:
        self._blocks, self._watch, self._rest = blocks, watch, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, b"")
            if not block:
                return 0
            if self._watch is not None:
                self._watch(block)
            self._rest = memoryview(block)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            return super().readall()
        data = bytearray()
        while len(data) < size:
            part = bytearray(size - len(data))
            count = self.readinto(part)
            if not count:
                break
            data += part[:count]
        return bytes(data)


@dataclass(slots=True)
class Hints:
    """Findings of an earlier attempt to read a file: types of columns, and whether quotes occur."""

    types: dict[str, pa.DataType] = field(default_factory=dict)
    quotes: bool = False


class ReadAgainError(Exception):
    """Raised after rows were yielded that are wrong: forget them and read the file again, with the changed hints."""
