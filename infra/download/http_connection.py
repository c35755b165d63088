"""HTTP/1.1 connection to an untrusted server.

h11 parses the responses as RFC 9112 requires: chunk sizes and lengths are digits only, conflicting lengths are an
error, and ``Transfer-Encoding`` overrides ``Content-Length``. This module limits what h11 does not: time, interim
responses, header fields, the body, and the framing around the body.
"""

import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from typing import Any, Self
from urllib.error import HTTPError, URLError

import h11

from infra.download.content_encoding import decoder_of
from infra.download.limits import Deadline, FetchError

_BLOCK_BYTES = 1 << 16
_MAX_HEAD_BYTES = 1 << 16  # status line and header fields, or trailers, or one line before a chunk
_MAX_HEADER_FIELDS = 100
_MAX_INTERIM = 8  # responses such as 103 Early Hints before the final one
_MAX_IDLE_S = 10.0  # a router on the way may drop a connection that is idle for longer


class Connection:
    """A connected socket that carries one request after another. Not thread-safe."""

    def __init__(self, sock: socket.socket, max_body_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Take ownership of ``sock``; responses with a body above ``max_body_bytes`` are rejected."""
        self.max_body_bytes = max_body_bytes
        self._clock = clock
        # Time (s) on ``clock`` of the end of the last response; None if no request may follow.
        self.free_since: float | None = None
        self.received_bytes = 0
        self._sock = sock
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self.free_since = None
        self._sock.close()

    def is_silent(self) -> bool:
        """Return True if the next bytes can only be the response to the next request."""
        if self.free_since is None or self._clock() - self.free_since > _MAX_IDLE_S:
            return False
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def get(self, target: str, headers: dict[str, str], deadline: Deadline) -> "Response":
        """Send a GET request and return the final response with its body unread."""
        self.free_since = None
        try:
            if self._http.our_state is h11.DONE:
                self._http.start_next_cycle()
            # Cookies may have 8-bit characters.
            fields = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            request = h11.Request(method="GET", target=target, headers=fields)
            self._sock.settimeout(deadline.allowance_s())
            self._sock.sendall(self._http.send(request) + self._http.send(h11.EndOfMessage()))
            return Response(self, self._read_head(deadline), deadline)
        except BaseException:
            self.close()
            raise

    def _read_head(self, deadline: Deadline) -> h11.Response:
        for _ in range(_MAX_INTERIM + 1):
            event = self.next_event(deadline, _BLOCK_BYTES)
            if isinstance(event, h11.Response):
                if len(event.headers) > _MAX_HEADER_FIELDS:
                    raise FetchError("connection_error", f"more than {_MAX_HEADER_FIELDS} header fields")
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError("the server closed the connection without a response")
        raise FetchError("connection_error", f"more than {_MAX_INTERIM} interim responses")

    def next_event(self, deadline: Deadline, max_bytes: int) -> Any:
        """Return the next event of h11, receiving at most ``max_bytes`` at a time until it is complete."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._sock.settimeout(deadline.allowance_s())
            block = self._sock.recv(max_bytes)
            self.received_bytes += len(block)
            self._http.receive_data(block)
        return event

    def release(self, *, reusable: bool) -> None:
        """Finish a response: keep the connection for the next request if both sides allow it, else close it."""
        done = self._http.our_state is h11.DONE and self._http.their_state is h11.DONE
        if reusable and done and not self._http.trailing_data[0]:
            self.free_since = self._clock()
        else:
            self.close()


class Response:
    """A response as ``urllib`` expects it, with a body that is read and decoded within the limits."""

    def __init__(self, connection: Connection, head: h11.Response, deadline: Deadline) -> None:
        """Wrap the response with this ``head``, whose body is unread. Raises ``FetchError`` if it is too large."""
        self.status = self.code = head.status_code
        self.reason = self.msg = head.reason.decode("latin-1")
        self.url = ""
        self.headers = Message()
        for name, value in head.headers:
            self.headers[name.decode("latin-1")] = value.decode("latin-1")
        self._connection, self._deadline = connection, deadline
        self._max_body_bytes = connection.max_body_bytes
        self._body = bytearray()
        self._read_bytes, self._decoded_bytes = 0, 0
        self._ended = False
        # The framing may take at most a quarter of the body limit: chunks of one byte each are an attack.
        self._max_received_bytes = connection.received_bytes + self._max_body_bytes * 5 // 4 + _BLOCK_BYTES
        chunked = "transfer-encoding" in self.headers
        # RFC 9112, 6.3: a response with both is suspicious, and its connection must not be used again.
        self._reusable = not (chunked and "content-length" in self.headers)
        self._decode = decoder_of("")
        if 200 <= self.status < 300:
            if not chunked:
                self._check(int(self.headers.get("content-length", 0)))
            self._decode = decoder_of(",".join(self.headers.get_all("content-encoding", [])))

    def info(self) -> Message:
        """Return the header fields."""
        return self.headers

    def read(self, amt: int | None = None) -> bytes:
        """Return the next ``amt`` bytes of the body, or the rest of it. Fewer bytes mean that the body has ended."""
        while not self._ended and (amt is None or amt < 0 or len(self._body) < amt):
            self._receive()
        size = len(self._body) if amt is None or amt < 0 else amt
        block = bytes(self._body[:size])
        del self._body[:size]
        return block

    def close(self) -> None:
        """Discard the rest of the body; this closes the connection if the body is incomplete."""
        if not self._ended:
            self._ended = True
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> None:
        """Read one event of the body. A receive reads at most one byte beyond the limit."""
        max_bytes = min(_BLOCK_BYTES, self._max_body_bytes + 1 - self._read_bytes)
        try:
            with raises_fetch_error(self._deadline):
                event = self._connection.next_event(self._deadline, max_bytes)
        except FetchError:
            self.close()
            raise
        data = bytes(event.data) if isinstance(event, h11.Data) else b""
        self._read_bytes += len(data)
        self._check(self._read_bytes)
        self._extend_body(data)
        if not isinstance(event, h11.Data):
            self._ended = True
            self._connection.release(reusable=self._reusable)
        if self._connection.received_bytes > self._max_received_bytes:
            self._check(self._max_body_bytes + 1)

    def _extend_body(self, data: bytes) -> None:
        """Decode the next bytes of the body; empty bytes are its end."""
        try:
            for block in self._decode(data):
                self._body += block
                self._decoded_bytes += len(block)
                self._check(self._decoded_bytes)
        except FetchError:
            self.close()
            raise

    def _check(self, body_bytes: int) -> None:
        if body_bytes > self._max_body_bytes:
            self.close()
            raise FetchError("body_too_large", f"more than max_body_bytes={self._max_body_bytes}")


@contextmanager
def raises_fetch_error(deadline: Deadline) -> Iterator[None]:
    """Translate exceptions of urllib, h11, ssl and socket into ``FetchError``; ``HTTPError`` is unchanged."""
    try:
        yield
    except HTTPError as error:
        error.close()
        raise
    except (OSError, h11.ProtocolError, ValueError) as error:
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, TimeoutError):
            deadline.allowance_s()  # raises if the deadline, not the socket timeout, ended the wait
            raise FetchError("timeout", f"no data received for timeout_s={deadline.timeout_s:g}") from error
        # A certificate error is both an OSError and a ValueError. It is a fault of the connection, not of the URL.
        invalid = not isinstance(cause, OSError | h11.RemoteProtocolError)
        raise FetchError("invalid_url" if invalid else "connection_error", str(cause)) from error
