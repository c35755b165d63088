"""The connections of the HTTP server: limits on time, on headers, and on requests that wait for each other."""

import asyncio

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEADERS_TIMEOUT_S = 10.0
"""Time for a client to send the headers of a request. Uvicorn itself waits without a limit."""
MAX_HEADERS_BYTES = 65_536
"""Size of the headers of a request; up to one more read of a socket is accepted. The parser itself has no limit."""
MAX_PIPELINED = 8
"""Requests that may wait for the response of the one before them. The connection is closed instead of taking more."""
SEND_TIMEOUT_S = 60.0
"""Time for a client to read a response, or the part of a stream that is sent. A slower one is disconnected."""


class Connection(HttpToolsProtocol):
    """A connection that is closed if the headers of a request do not arrive, or a response is not read, in time.

    It is also closed if a request is invalid, if headers, or the trailers and the extensions of a chunked body, are too
    large, and if too many requests are sent at once. The requests before are answered first.
    """

    _timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _in_headers = _is_refused = False
    _unused_bytes = 0
    _plain_headers: bytes | None = None
    _open: list[RequestResponseCycle] = []  # noqa: RUF012 - replaced, never changed

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the headers of the first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # writing pauses until the client has read everything
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        """Wait for the headers of the next request from its first byte on."""
        if self._is_refused:
            return
        if self._timer is None and self._is_between_requests():
            self._wait_for_headers()
        self._unused_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._unused_bytes > MAX_HEADERS_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers are too large; the limit is {MAX_HEADERS_BYTES:,} bytes.")

    def _parse(self, data: bytes) -> None:
        """Parse data. A request for another protocol than WebSocket is parsed again as an ordinary one.

        The parser ends such a request after its headers. Its body would be lost, or taken for the next request.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._plain_headers is None:
                self.handle_websocket_upgrade()
                return
            headers, self._plain_headers = self._plain_headers, None
            self._parse(headers + data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def on_message_begin(self) -> None:
        """Start to count the bytes of headers."""
        super().on_message_begin()
        self._in_headers, self._unused_bytes = True, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header, without the white space after its value. Trailers of a body are ignored."""
        if self._in_headers:
            super().on_header(name, value.rstrip(b" \t"))  # the parser removes only that before it

    def on_headers_complete(self) -> None:
        """Start the request, or queue it. The parser reports an error as an invalid request."""
        self._in_headers, before = False, self.cycle
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests at once")
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("the service is not a proxy")
            if not self._should_upgrade():
                self._plain_headers = self._headers_without_upgrade()
                return
            if not self._is_between_requests():
                raise ValueError("a WebSocket begins before the response of a request")
        super().on_headers_complete()
        if self.cycle is not before:
            self._open = [*(one for one in self._open if not one.response_complete), self.cycle]
            self.flow.resume_reading()  # the base class pauses it, and a paused connection does not notice its end

    def on_body(self, body: bytes) -> None:
        """Pass on a part of the body, whose size the application limits."""
        self._unused_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Finish the request."""
        self._unused_bytes = 0
        if self._plain_headers is None:
            super().on_message_complete()

    def _headers_without_upgrade(self) -> bytes:
        first = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = (b"%s: %s\r\n" % (name, value) for name, value in self.headers if name != b"upgrade")
        return b"".join([first, *kept, b"\r\n"])

    def send_400_response(self, msg: str) -> None:
        """Refuse a request, and close the connection.

        A request whose response is due before is answered first: its client would take the refusal for the answer.
        """
        self._is_refused = True
        due = [one for one in self._open if not (one.response_complete or one.more_body)]
        if due:
            due[-1].keep_alive = False  # its response closes the connection
        elif self._is_between_requests() or not self.cycle.response_started:
            super().send_400_response(msg)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        for timer in (self._timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        for cycle in self._open:  # the base class marks only the last one
            cycle.disconnected = cycle.disconnected or not cycle.response_complete
            cycle.message_event.set()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._send_timer = self.loop.call_later(SEND_TIMEOUT_S, self._abort)

    def resume_writing(self) -> None:
        """Stop waiting: the client has read everything."""
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()

    def _abort(self) -> None:
        """Close the connection without sending the rest, for which ``close`` would wait."""
        if self.transport.get_protocol() is self:  # else it is a WebSocket by now
            self.transport.abort()

    def _wait_for_headers(self) -> None:
        self._timer = self.loop.call_later(HEADERS_TIMEOUT_S, self._check, self.cycle)

    def _check(self, before: object) -> None:
        """Close the connection if no request began since ``before`` did."""
        self._timer = None
        if self.transport.is_closing() or self.transport.get_protocol() is not self:  # closed, or a WebSocket by now
            return
        if self.cycle is before:
            self.transport.close()
        elif self._is_between_requests() and self.timeout_keep_alive_task is None:  # part of the next one is here
            self._wait_for_headers()

    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete
