"""A guarded ``urllib`` opener: what a list of strangers' URLs may reach, for how long, and how much it may send.

Only http and https. Every address a name resolves to must be public, and the connection goes to an address that was
checked: the name is not resolved again in between, and each redirect is checked anew. A thread that asks the same place
again does so over the same connection, if the last answer was read to its end and nothing came after it. TLS still
verifies the name. No proxy is taken from the environment. Status line, headers and body share one wall-clock deadline,
which a server that sends a byte now and then cannot stretch, since each receive waits at most for what is left. Only
the system's name resolution, bounded by its own settings, cannot be interrupted; the deadline is checked right after.
"""

import io
import select
import socket
import ssl
import string
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPResponse, InvalidURL
from typing import IO, Any, cast
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from infra.download.public_addresses import is_public
from infra.errors import KNNDiffusionError

Resolve = Callable[..., list[tuple[Any, ...]]]
"""Called and answering as ``socket.getaddrinfo(host, port, type=…)``."""

_BLOCK_BYTES = 1 << 16
_KEPT_S = 10.0  # idle for longer, a router on the way may have forgotten it
_INSTALLED = threading.RLock()


class FetchError(KNNDiffusionError):
    """A URL that was not fetched. ``error_class`` is stable; ``str()`` is ``error_class: detail``."""

    def __init__(self, error_class: str, detail: str) -> None:
        """``error_class`` is a snake_case name, ``detail`` says what happened and the mend."""
        super().__init__(error_class, detail)
        self.error_class = error_class
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.error_class}: {self.detail}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the guard allows."""

    allow_hosts: tuple[str, ...]  # "host:port" entries, in lower case, whose addresses need not be public
    max_body_bytes: int
    deadline_s: float  # for one URL, its redirects and its body included
    timeout_s: float  # for one socket operation, where the caller of urlopen names none
    max_redirects: int


@contextmanager
def guarded(
    limits: Limits, *, resolve: Resolve = socket.getaddrinfo, tls: ssl.SSLContext | None = None
) -> Iterator["GuardedOpener"]:
    """Make every ``urllib.request.urlopen`` of this process a guarded one; the previous opener comes back afterwards.

    The opener belongs to the process, so a second thread that asks for a guard waits until the first one's is gone:
    otherwise the first to leave would take the other's guard away.
    """
    opener = GuardedOpener(limits, resolve, tls or ssl.create_default_context())
    with _INSTALLED:
        previous = vars(urllib.request)["_opener"]
        urllib.request.install_opener(opener)
        try:
            yield opener
        finally:
            urllib.request.install_opener(previous)


class GuardedOpener(urllib.request.OpenerDirector):
    """An opener with the guard's handlers and no others: no file, ftp, data or proxy handler. Threads may share it.

    Raises ``FetchError``, and ``urllib.error.HTTPError`` for an answer that is neither a success nor a redirect.
    """

    def __init__(self, limits: Limits, resolve: Resolve, tls: ssl.SSLContext) -> None:
        """``tls`` says which certificates are believed."""
        super().__init__()
        self._limits = limits
        self.add_handler(_Connector(limits, resolve, tls))
        self.add_handler(_Redirector(limits.max_redirects))
        self.add_handler(urllib.request.HTTPErrorProcessor())
        self.add_handler(urllib.request.HTTPDefaultErrorHandler())

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        """Fetch ``fullurl``, a string or a ``Request`` without a body. The deadline starts with this call."""
        if isinstance(fullurl, _Hop):
            return super().open(fullurl, timeout=fullurl.deadline.timeout_s)
        if data is not None or getattr(fullurl, "data", None) is not None:
            raise ValueError("the guarded opener only fetches; send no data")
        seconds = float(timeout) if isinstance(timeout, int | float) else self._limits.timeout_s
        deadline = _Deadline(self._limits.deadline_s, seconds)
        given = isinstance(fullurl, urllib.request.Request)
        url, headers = (fullurl.full_url, dict(fullurl.header_items())) if given else (fullurl, {})
        with _told(deadline):
            return self.open(_Hop(url, headers, deadline, hops=0))


class _Deadline:
    """The clock of one URL; each socket operation is granted the smaller of its own timeout and the time left."""

    def __init__(self, deadline_s: float, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._deadline_s = deadline_s
        self._end = time.monotonic() + deadline_s

    def allowance_s(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise FetchError("deadline_exceeded", f"not finished after deadline_s={self._deadline_s:g}")
        return min(left, self.timeout_s)


class _Hop(urllib.request.Request):
    """One request on the way of a URL: its address made ASCII and checked, its deadline shared with the other hops."""

    def __init__(self, url: str, headers: dict[str, str], deadline: _Deadline, hops: int) -> None:
        super().__init__(_ascii_url(url), headers=headers)
        self.deadline = deadline
        self.hops = hops


class _Redirector(urllib.request.BaseHandler):
    """Follows redirects through the guarded opener, so that each target passes every check of a first URL."""

    def __init__(self, max_redirects: int) -> None:
        self._max_redirects = max_redirects

    def http_error_302(self, req: _Hop, fp: IO[bytes], code: int, msg: str, headers: Message) -> Any:
        location = headers.get("location")
        if location is None:
            return None  # the status itself becomes the error
        fp.close()  # a redirect's body is never read
        if req.hops >= self._max_redirects:
            raise FetchError("too_many_redirects", f"more than max_redirects={self._max_redirects}")
        # Header bytes arrive decoded as latin-1: escape them as they were sent.
        target = urljoin(req.full_url, quote(location.strip(), safe=string.punctuation, encoding="latin-1"))
        return self.parent.open(_Hop(target, dict(req.headers), req.deadline, req.hops + 1))

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _Connector(urllib.request.AbstractHTTPHandler):
    """Opens http and https, each connection to an address that was checked."""

    def __init__(self, limits: Limits, resolve: Resolve, tls: ssl.SSLContext) -> None:
        super().__init__()
        self.limits = limits
        self._resolve = resolve
        self._tls = tls
        self._kept = threading.local()  # one connection a thread: lists name many pictures of a host in a row

    def http_open(self, req: _Hop) -> HTTPResponse:
        return self._answered(req, None)

    def https_open(self, req: _Hop) -> HTTPResponse:
        return self._answered(req, self._tls)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _answered(self, req: _Hop, tls: ssl.SSLContext | None) -> HTTPResponse:
        """The answer over the connection that this thread has kept to the same place, or over a new one."""
        place, kept = (req.type, req.host), self._kept_to(req.type, req.host)
        response = None
        if kept is not None:
            with suppress(ConnectionError, HTTPException, ssl.SSLError):  # the server has ended it meanwhile
                response = kept.ask(req)
        if response is None:
            kept = _Connection(req.host, connector=self, deadline=req.deadline, tls=tls)
            response = kept.ask(req)
        self._kept.place, self._kept.connection = place, kept
        return response

    def _kept_to(self, *place: str) -> "_Connection | None":
        connection: _Connection | None = vars(self._kept).pop("connection", None)
        usable = connection is not None and self._kept.place == place and connection.is_silent()
        return connection if usable else None

    def connected(self, host: str, port: int, deadline: _Deadline) -> socket.socket:
        problem: OSError | None = None
        for family, kind, protocol, _, address in self._addresses(host, port):
            allowance_s = deadline.allowance_s()
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(allowance_s)
                sock.connect(address)
                return sock
            except OSError as error:
                problem = error
                sock.close()
        raise problem or OSError("no address to connect to")

    def _addresses(self, host: str, port: int) -> list[tuple[Any, ...]]:
        """What the name resolves to, asked once. One address that is not public refuses them all."""
        try:
            answers = self._resolve(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise FetchError("dns_error", f"{host}: {error.strerror}") from error
        answers = [answer for answer in answers if answer[0] in (socket.AF_INET, socket.AF_INET6)]
        if not answers:
            raise FetchError("dns_error", f"{host} has no address")
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        refused = [str(answer[4][0]) for answer in answers if not is_public(str(answer[4][0]))]
        if refused and place not in self.limits.allow_hosts:
            mend = f"add {place} to allow_hosts if this is meant"
            raise FetchError("blocked_address", f"{min(refused)} (from {host}) is not public; {mend}")
        return answers


class _Connection(HTTPConnection):
    """A connection that leaves name resolution to the connector and its clock to the deadline of what it asks."""

    def __init__(
        self, host: str, *, connector: _Connector, deadline: _Deadline, tls: ssl.SSLContext | None, **options: Any
    ) -> None:
        self.default_port = 80 if tls is None else 443
        super().__init__(host, **options)
        self._connector, self._tls = connector, tls
        self.deadline, self.max_body_bytes = deadline, connector.limits.max_body_bytes
        self.free_since: float | None = None  # when the last answer was read to its end, and another can be asked for

    def __del__(self) -> None:
        if self.free_since is not None:
            self.close()

    def is_silent(self) -> bool:
        """Whether the next answer can only be that to the next question: nothing has come since the last one ended."""
        if self.free_since is None or self.sock is None or time.monotonic() - self.free_since > _KEPT_S:
            return False
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)

    def ask(self, req: _Hop) -> HTTPResponse:
        """The answer to ``req``, its body not read yet."""
        self.free_since, self.deadline = None, req.deadline
        if self.sock is not None:
            self.sock.settimeout(self.deadline.allowance_s())
        headers = {name.title(): value for name, value in (*req.headers.items(), *req.unredirected_hdrs.items())}
        try:
            self.request(req.get_method(), req.selector, headers=headers)
            response = self.getresponse()
        except BaseException:
            self.close()
            raise
        response.url, response.msg = req.full_url, response.reason  # type: ignore[assignment]
        return response

    def connect(self) -> None:
        self.sock = self._connector.connected(self.host, self.port, self.deadline)
        self.sock.settimeout(self.deadline.allowance_s())
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)
            self.sock.settimeout(self.deadline.allowance_s())

    def response_class(self, sock: socket.socket, **options: Any) -> HTTPResponse:  # type: ignore[override]
        return _Response(sock, connection=self, **options)


class _Response(HTTPResponse):
    """A response whose every receive is held to the deadline and whose body is bounded, declared or not."""

    def __init__(self, sock: socket.socket, *, connection: _Connection, **options: Any):
        super().__init__(sock, **options)
        self._connection, self._deadline = weakref.ref(connection), connection.deadline  # no cycle: sockets are few
        self.fp = io.BufferedReader(_TimedReader(sock, self.fp.detach(), self._deadline))
        self._max_body_bytes = connection.max_body_bytes
        self._taken_bytes = 0

    def begin(self) -> None:
        super().begin()
        if 200 <= self.status < 300:
            self._check(self.length or 0)

    def read(self, amt: int | None = None) -> bytes:
        if amt is None or amt < 0:
            return b"".join(iter(lambda: self.read(_BLOCK_BYTES), b""))
        with _told(self._deadline):
            block = super().read(amt)
        self._taken_bytes += len(block)
        self._check(self._taken_bytes)
        if amt and not block:
            if self.length:
                raise FetchError("connection_error", f"the body ended {self.length} bytes early")
            if (connection := self._connection()) is not None:
                connection.free_since = time.monotonic()
        return block

    def _check(self, body_bytes: int) -> None:
        if body_bytes > self._max_body_bytes:
            self.close()
            raise FetchError("body_too_large", f"more than max_body_bytes={self._max_body_bytes}")


class _TimedReader(io.RawIOBase):
    """A socket's raw stream that asks the deadline before each receive."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, deadline: _Deadline) -> None:
        self._sock, self._raw, self._deadline = sock, raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._deadline.allowance_s())
        return cast(int | None, self._raw.readinto(buffer))

    def close(self) -> None:
        self._raw.close()
        super().close()


def _ascii_url(url: str) -> str:
    """``url`` without its fragment, in ASCII: host by IDNA, the rest percent-encoded. Raises ``FetchError``."""
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https"):
        raise FetchError("blocked_scheme", f"{parts.scheme or 'no scheme'} is not fetched, only http and https are")
    if not parts.hostname or "@" in parts.netloc:
        raise FetchError("invalid_url", "it names no host" if not parts.hostname else "it carries credentials")
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode("ascii")
    netloc = (f"[{host}]" if ":" in host else host) + (f":{parts.port}" if parts.port is not None else "")
    path, query = (quote(part, safe=string.punctuation) for part in (parts.path or "/", parts.query))
    return urlunsplit((parts.scheme, netloc, path, query, ""))


@contextmanager
def _told(deadline: _Deadline) -> Iterator[None]:
    """Turn what urllib, http.client, ssl and socket raise into ``FetchError``; an ``HTTPError`` stays one."""
    try:
        yield
    except HTTPError as error:
        error.close()
        raise
    except (OSError, HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, TimeoutError):
            deadline.allowance_s()  # raises when it was the deadline that cut the wait short
            raise FetchError("timeout", f"nothing came for timeout_s={deadline.timeout_s:g}") from error
        # A certificate error is an OSError as well as a ValueError: the network's, not the URL's.
        invalid = isinstance(cause, InvalidURL) or not isinstance(cause, OSError | HTTPException)
        raise FetchError("invalid_url" if invalid else "connection_error", str(cause)) from error
