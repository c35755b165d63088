"""A guarded ``urllib`` opener: it bounds what an untrusted list of URLs can reach, how long that takes, and its size.

Only http and https. Every address that a name resolves to must be public, and the connection goes to an address that
was checked: the name is not resolved again in between. Each redirect passes the same checks. A thread keeps its
connection and uses it again for the same place, if the last response was complete and nothing came after it. TLS still
verifies the name. No proxy is taken from the environment. Status line, headers and body share one wall-clock deadline.
Each receive waits at most for the time left, so a server that sends single bytes cannot extend it. Only the system's
name resolution cannot be interrupted; the deadline is checked right after. ``X-Robots-Tag`` is honoured on every
response, redirects included.
"""

import socket
import ssl
import string
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from typing import IO, Any
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import h11

from infra.download.http_connection import Connection, Response, raises_fetch_error
from infra.download.limits import Deadline, FetchError, Limits
from infra.download.public_addresses import is_public
from infra.download.robots_tag import forbidding_rule

Resolve = Callable[..., list[tuple[Any, ...]]]
"""Called and answering as ``socket.getaddrinfo(host, port, type=…)``."""

_INSTALLED = threading.RLock()


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
        deadline = Deadline(self._limits.deadline_s, seconds)
        given = isinstance(fullurl, urllib.request.Request)
        url, headers = (fullurl.full_url, dict(fullurl.header_items())) if given else (fullurl, {})
        with raises_fetch_error(deadline):
            return self.open(_Hop(url, headers, deadline, hops=0))


class _Hop(urllib.request.Request):
    """One request on the way of a URL: its address made ASCII and checked, its deadline shared with the other hops."""

    def __init__(self, url: str, headers: dict[str, str], deadline: Deadline, hops: int) -> None:
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
        self._limits = limits
        self._resolve = resolve
        self._tls = tls
        self._kept = threading.local()  # one connection a thread: lists name many images of a host in a row

    def http_open(self, req: _Hop) -> Response:
        return self._response(req, None)

    def https_open(self, req: _Hop) -> Response:
        return self._response(req, self._tls)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _response(self, req: _Hop, tls: ssl.SSLContext | None) -> Response:
        """Return the response over the connection that this thread has kept to the same place, or over a new one."""
        place, kept = (req.type, req.host), self._kept_to(req.type, req.host)
        fields = {name.title(): value for name, value in (*req.headers.items(), *req.unredirected_hdrs.items())}
        fields["Accept-Encoding"] = "identity"
        response = None
        if kept is not None:
            with suppress(ConnectionError, h11.RemoteProtocolError, ssl.SSLError):  # the server has ended it meanwhile
                response = kept.get(req.selector, fields, req.deadline)
        if response is None:
            kept = Connection(self._connected(req, tls), self._limits.max_body_bytes)
            response = kept.get(req.selector, fields, req.deadline)
        self._kept.place, self._kept.connection = place, kept
        response.url = req.full_url
        if self._limits.respect_robots_tag and response.status < 400:
            _check_robots_tag(response)
        return response

    def _kept_to(self, *place: str) -> Connection | None:
        connection: Connection | None = vars(self._kept).pop("connection", None)
        usable = connection is not None and self._kept.place == place and connection.is_silent()
        return connection if usable else None

    def _connected(self, req: _Hop, tls: ssl.SSLContext | None) -> socket.socket:
        parts = urlsplit(req.full_url)
        host = str(parts.hostname)
        sock = self._reached(host, parts.port or (80 if tls is None else 443), req.deadline)
        try:
            sock.settimeout(req.deadline.allowance_s())
            return sock if tls is None else tls.wrap_socket(sock, server_hostname=host)
        except BaseException:
            sock.close()
            raise

    def _reached(self, host: str, port: int, deadline: Deadline) -> socket.socket:
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
        if refused and place not in self._limits.allow_hosts:
            mend = f"add {place} to allow_hosts if this is meant"
            raise FetchError("blocked_address", f"{min(refused)} (from {host}) is not public; {mend}")
        return answers


def _check_robots_tag(response: Response) -> None:
    rule = forbidding_rule(response.headers.get_all("X-Robots-Tag", []))
    if rule is not None:
        response.close()
        raise FetchError("robots_disallowed", f"X-Robots-Tag: {rule}")


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
