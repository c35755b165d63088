"""Decoding of compressed response bodies in blocks, so that a small body cannot fill the memory.

Requests ask for the ``identity`` encoding, because images are compressed already. Some servers compress them anyway.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

from infra.download.limits import FetchError

BLOCK_BYTES = 1 << 16
"""Maximum size of a decoded block."""

Decode = Callable[[bytes], Iterator[bytes]]
"""Decoder of the next bytes of a body; empty bytes mark its end. Raises ``FetchError`` if they are invalid."""

_GZIP = 16 + zlib.MAX_WBITS  # window bits with which zlib expects the header of gzip
_GZIP_MAGIC = b"\x1f\x8b"
_UNSUPPORTED = frozenset({"compress", "dcb", "dcz", "zstd"})


def decoder_of(content_encoding: str) -> Decode:
    """Return the decoder for the value of a ``Content-Encoding`` header.

    A value that is not an encoding, such as ``utf-8``, means that the body is not encoded: browsers treat it so too.
    Raises ``FetchError`` for several encodings, and for those that are not supported.
    """
    names = [name.strip().lower().removeprefix("x-") for name in content_encoding.split(",")]
    encodings = [name for name in names if name in _STREAMS or name in _UNSUPPORTED]
    if not encodings:
        return _identity
    if len(encodings) > 1 or encodings[0] in _UNSUPPORTED:
        raise FetchError("connection_error", f"Content-Encoding is not supported: {', '.join(encodings[:8])}")
    return _Decoder(encodings[0])


def _identity(data: bytes) -> Iterator[bytes]:
    if data:
        yield data


class _Decoder:
    """Decoder of one encoding: checks that the body is complete, and translates the errors of its library."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stream = _STREAMS[name]()
        self._started = False

    def __call__(self, data: bytes) -> Iterator[bytes]:
        self._started = self._started or bool(data)
        try:
            yield from self._stream.decode(data)
        except Exception as error:  # brotli's error class is only known once the library is imported
            raise self._failure(str(error)) from error
        if not data and self._started and not self._stream.is_complete():
            raise self._failure("it ends early")

    def _failure(self, detail: str) -> FetchError:
        return FetchError("connection_error", f"the body is not valid {self._name}: {detail}")


class _Gzip:
    """gzip, with one or more members. Other bytes after a member are ignored, as browsers do."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(_GZIP)
        self._head = b""  # after a member: the first byte of a magic number whose second byte was not read yet
        self._ended = False

    def decode(self, data: bytes) -> Iterator[bytes]:
        if self._ended:
            return
        data, self._head = self._head + data, b""
        while data:
            if self._member.eof:
                if data == _GZIP_MAGIC[:1]:
                    self._head = data
                    return
                if not data.startswith(_GZIP_MAGIC):
                    self._ended = True
                    return
                self._member = zlib.decompressobj(_GZIP)
            yield from _inflate(self._member, data)
            data = self._member.unused_data

    def is_complete(self) -> bool:
        return self._member.eof


class _Deflate:
    """deflate, with the zlib header that the standard demands, or without it as some servers send it."""

    def __init__(self) -> None:
        self._head = b""
        self._stream: Any = None

    def decode(self, data: bytes) -> Iterator[bytes]:
        if self._stream is None:
            data = self._head = self._head + data
            if len(data) < 2:
                return
            has_header = data[0] & 0x0F == zlib.DEFLATED and int.from_bytes(data[:2], "big") % 31 == 0
            self._stream = zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
        if not self._stream.eof:
            yield from _inflate(self._stream, data)

    def is_complete(self) -> bool:
        return self._stream is not None and bool(self._stream.eof)


class _Brotli:
    def __init__(self) -> None:
        import brotli

        self._stream = brotli.Decompressor()

    def decode(self, data: bytes) -> Iterator[bytes]:
        if self._stream.is_finished():
            return
        yield self._stream.process(data, output_buffer_limit=BLOCK_BYTES)
        while not (self._stream.is_finished() or self._stream.can_accept_more_data()):
            yield self._stream.process(b"", output_buffer_limit=BLOCK_BYTES)

    def is_complete(self) -> bool:
        return bool(self._stream.is_finished())


def _inflate(stream: Any, data: bytes) -> Iterator[bytes]:
    """Decompress ``data``, up to the end of the stream, in blocks."""
    while not stream.eof:
        block = stream.decompress(data, BLOCK_BYTES)
        data = stream.unconsumed_tail
        yield block
        if not data and len(block) < BLOCK_BYTES:  # a full block may leave output in the stream without input
            return


_STREAMS: dict[str, Callable[[], Any]] = {"br": _Brotli, "deflate": _Deflate, "gzip": _Gzip}
