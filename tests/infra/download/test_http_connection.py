"""Responses with hostile or invalid framing: how much is read of them, and which error is raised."""

import contextlib
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Self

import pytest

from infra.download.limits import FetchError, Limits
from infra.download.safe_urlopen import guarded

LIMIT = 200_000
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
COMPLETE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nimage"


class RawServer:
    """A server that sends ``head``, then repeats ``endless`` if given; ``sent`` counts the repeated bytes."""

    def __init__(self, head: bytes, endless: bytes = b"") -> None:
        self.sent = 0
        self.connections = 0
        self._head, self._endless = head, endless
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # the listening socket is closed at the end of the test
            while True:
                connection, _ = self._socket.accept()
                self.connections += 1
                with connection, contextlib.suppress(OSError):  # the client disconnects
                    connection.settimeout(0.3)
                    self._converse(connection)

    def _converse(self, connection: socket.socket) -> None:
        while connection.recv(1 << 16).endswith(b"\r\n\r\n"):
            connection.sendall(self._head)
            while self._endless:
                self.sent += connection.send(self._endless)


def fetch(server: RawServer) -> bytes:
    with urllib.request.urlopen(f"http://{server.address}/") as response:
        return bytes(response.read())


@contextlib.contextmanager
def guard(server: RawServer, max_body_bytes: int = LIMIT) -> Iterator[None]:
    limits = Limits(
        allow_hosts=(server.address,), max_body_bytes=max_body_bytes, deadline_s=60.0, timeout_s=1.0, max_redirects=1
    )
    with guarded(limits):
        yield


def fetched(head: bytes) -> bytes:
    with RawServer(head) as server, guard(server):
        return fetch(server)


def refused(head: bytes, endless: bytes = b"") -> tuple[str, int]:
    """Return the error class, and the bytes that the server could send before the client disconnected."""
    with RawServer(head, endless) as server, guard(server), pytest.raises(FetchError) as caught:
        fetch(server)
    return caught.value.error_class, server.sent


SOCKET_BUFFERS = 8 << 20  # bytes that the kernel accepts although the client does not read them


@pytest.mark.parametrize("size", [b"-1", b"+5", b"0x5", b"5_0", b" 5", b"", b"g", b"\xb2", b"1" * 21, b"5 5"])
def test_fetch_invalid_chunk_size_is_rejected_unread(size: bytes) -> None:
    error_class, sent = refused(CHUNKED + size + b"\r\n", b"x" * 65_536)
    assert error_class == "connection_error"
    assert sent < SOCKET_BUFFERS


@pytest.mark.parametrize(
    ("head", "endless"),
    [
        (CHUNKED + b"7fffffffffffffff\r\n", b"x" * 65_536),
        (CHUNKED, b"1\r\nx\r\n" * 1000),
        (CHUNKED, b"1;" + b"e" * 5000 + b"\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65_536),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 200001\r\n\r\n", b"x" * 65_536),
    ],
    ids=["one chunk", "tiny chunks", "chunk extensions", "until close", "declared"],
)
def test_fetch_body_above_limit_stops_reading(head: bytes, endless: bytes) -> None:
    error_class, sent = refused(head, endless)
    assert error_class == "body_too_large"
    assert sent < SOCKET_BUFFERS


@pytest.mark.parametrize(
    ("head", "endless"),
    [
        (CHUNKED + b"5;", b"e" * 65_536),
        (CHUNKED + b"5\r\nimage\r\n0\r\n", b"Trailer: x\r\n" * 1000),
        (b"HTTP/1.1 200 OK\r\n", b"Field: x\r\n" * 1000),
        (b"HTTP/1.1 200 OK\r\nField: ", b"x" * 65_536),
        (b"HTTP/1.1 200 ", b"x" * 65_536),
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    ],
    ids=["chunk extension", "trailers", "header fields", "one header field", "reason", "interim responses"],
)
def test_fetch_endless_framing_is_rejected(head: bytes, endless: bytes) -> None:
    error_class, sent = refused(head, endless)
    assert error_class == "connection_error"
    assert sent < SOCKET_BUFFERS


@pytest.mark.parametrize(
    "fields",
    [
        *(b"Content-Length: " + value for value in (b"-5", b"+5", b"5_0", b"0x5", b"5 5", b"", b"5, 6", b"9" * 5000)),
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"\r\n".join([b"Field: x"] * 101),
    ],
)
def test_fetch_ambiguous_length_is_rejected(fields: bytes) -> None:
    assert refused(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n\r\nimage")[0] == "connection_error"


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nimage",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nimage",
        CHUNKED + b"A;name=value\r\nimageimage\r\n00\r\nTrailer: x\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n" * 3 + COMPLETE,
        b"HTTP/1.1 100 Continue\r\n\r\n" + COMPLETE,
    ],
)
def test_fetch_valid_framing_returns_the_body(head: bytes) -> None:
    assert fetched(head) in (b"image", b"imageimage")


def test_fetch_transfer_encoding_overrides_content_length_and_closes() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nimage\r\n0\r\n\r\n"
    with RawServer(head) as server, guard(server):
        assert [fetch(server), fetch(server)] == [b"image", b"image"]
    assert server.connections == 2


def test_fetch_complete_responses_share_a_connection() -> None:
    with RawServer(COMPLETE) as server, guard(server):
        assert [fetch(server), fetch(server)] == [b"image", b"image"]
    assert server.connections == 1


def test_fetch_chunks_up_to_the_limit_are_accepted() -> None:
    head = CHUNKED + (b"20\r\n%s\r\n" % (b"x" * 32)) * 32 + b"0\r\n\r\n"
    with RawServer(head) as server, guard(server, 1024):
        assert fetch(server) == b"x" * 1024
    with RawServer(head) as server, guard(server, 1023), pytest.raises(FetchError, match="body_too_large"):
        fetch(server)


def test_fetch_many_small_chunks_are_rejected_before_the_deadline() -> None:
    started = time.monotonic()
    refused(CHUNKED, b"1\r\nx\r\n" * 1000)
    assert time.monotonic() - started < 30
