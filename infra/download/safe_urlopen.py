"""Guarded ``urllib`` opener: limits the hosts, duration and size of downloads from untrusted URLs.

- Only http and https are allowed, and proxies of the environment are ignored. A ``data:`` URL in the list is decoded
  without a request.
- Every address that a name resolves to must be public. The connection uses a checked address: the name is not resolved
  a second time. TLS still verifies the name. Each redirect passes the same checks.
- A thread keeps its last connection and reuses it for the same host if the last response was complete and no data
  followed it.
- Status line, headers and body share one wall-clock deadline. Each receive waits at most for the time left, so a server
  that sends single bytes cannot extend it. Only the system's name resolution cannot be interrupted; the deadline is
  checked right after it.
- ``X-Robots-Tag`` is honoured on every response, including redirects.
- Cookies last for the redirects of one URL, and go only to the hosts that they are for.
- Requests to one host keep to a rate, and wait as long as ``Retry-After`` of a 429 or 503 asks, within a limit. The
  time that a URL waits for its turn does not count against its deadline.
- robots.txt is respected if the limits say so.
"""

import http.cookiejar
import socket
import ssl
import string
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from email.message import Message
from http import HTTPStatus
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import quote, urljoin, urlsplit

import h11

from infra.download.ascii_url import ascii_url, endpoint_of
from infra.download.data_urls import is_data_url, open_data_url
from infra.download.http_connection import Connection, Response, raises_fetch_error
from infra.download.limits import Deadline, FetchError, Limits
from infra.download.pacing import PAUSE_STATUSES, HostPacer, retry_after_s
from infra.download.public_addresses import is_public
from infra.download.robots_tag import forbidding_rule
from infra.download.robots_txt import MAX_BYTES, RobotsRules
from infra.download.user_agent import default_user_agent
from infra.download.validators import Validators

Resolve = Callable[..., list[tuple[Any, ...]]]
"""A resolver with the signature and result of ``socket.getaddrinfo(host, port, type=…)``."""

Clock = Callable[[], float]

_INSTALL_LOCK = threading.RLock()
_MAX_PAUSES = 3  # requests of one URL that may be answered with Retry-After before its error counts


@contextmanager
def guarded(
    limits: Limits,
    *,
    resolve: Resolve = socket.getaddrinfo,
    tls: ssl.SSLContext | None = None,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    conditions: Mapping[str, Validators] | None = None,
) -> Iterator["GuardedOpener"]:
    """Guard every ``urllib.request.urlopen`` call of this process during the block, then restore the previous opener.

    The opener is global to the process. A second thread therefore waits until the guard of the first one has ended:
    otherwise the first thread to leave would remove the guard of the other.

    Args:
        limits: Allowed hosts, sizes and times.
        resolve: Resolver of host names.
        tls: TLS context; by default one with the system's certificates.
        clock: Clock of deadlines, idle connections and pauses, in seconds.
        sleep: Function that waits for a host's turn.
        conditions: Validators of earlier responses by URL: these URLs are requested only if their body has changed.
    """
    opener = GuardedOpener(limits, resolve, tls or ssl.create_default_context(), clock, sleep)
    opener.conditions = dict(conditions or {})
    with _INSTALL_LOCK:
        previous = vars(urllib.request)["_opener"]
        urllib.request.install_opener(opener)
        try:
            yield opener
        finally:
            urllib.request.install_opener(previous)


class GuardedOpener(urllib.request.OpenerDirector):
    """A thread-safe opener with the guarded http and https handlers only: no file, ftp or proxy handler.

    Raises ``FetchError``, or ``urllib.error.HTTPError`` for a status that is neither a success nor a redirect.
    """

    def __init__(
        self,
        limits: Limits,
        resolve: Resolve,
        tls: ssl.SSLContext,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Install the guarded handlers; ``tls`` determines the trusted certificates."""
        super().__init__()
        self._limits, self._clock = limits, clock
        self.conditions: dict[str, Validators] = {}
        self.validators: dict[str, Validators] = {}  # of the responses, by requested URL
        self._unchanged: dict[str, HTTPError] = {}  # URLs that were answered with 304
        self._pacer = HostPacer(
            rate=limits.host_rate,
            max_wait_s=limits.max_pause_s,
            unlimited=limits.allow_hosts,  # servers of the user's own
            clock=clock,
            sleep=sleep,
        )
        self._robots = RobotsRules(self._read_robots_txt) if limits.robots_txt else None
        self.add_handler(_Connector(limits, resolve, tls, clock, self._pacer))
        self.add_handler(_Redirector(limits.max_redirects))
        self.add_handler(urllib.request.HTTPErrorProcessor())
        self.add_handler(urllib.request.HTTPDefaultErrorHandler())

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        """Fetch ``fullurl``, a string or a ``Request`` without a body. The deadline starts with this call."""
        if isinstance(fullurl, _Hop):
            if self._robots is not None and not fullurl.is_robots_txt:
                started = self._clock()
                self._robots.require_allowed(fullurl.full_url)
                fullurl.deadline.extend(self._clock() - started)  # another URL of the site may have waited for it
            return super().open(fullurl, timeout=fullurl.deadline.timeout_s)
        if data is not None or getattr(fullurl, "data", None) is not None:
            raise ValueError("the guarded opener does not send data; remove the request body")
        timeout_s = float(timeout) if isinstance(timeout, int | float) else self._limits.timeout_s
        is_request = isinstance(fullurl, urllib.request.Request)
        url, headers = (fullurl.full_url, dict(fullurl.header_items())) if is_request else (fullurl, {})
        if is_data_url(url):
            return open_data_url(url, self._limits.max_body_bytes)
        if url in self._unchanged:  # img2dataset requests it again
            raise self._unchanged[url]
        if url in self.conditions:
            headers |= self.conditions[url].request_headers()
        pauses = 0
        while True:
            try:
                response = self._fetch(url, headers, timeout_s)
                self.validators[url] = Validators.of(response.headers)
                return response
            except HTTPError as error:
                if error.code == HTTPStatus.NOT_MODIFIED:
                    self._unchanged[url] = error
                if not self._pause_host(error) or pauses == _MAX_PAUSES:
                    raise
                pauses += 1

    def _fetch(self, url: str, headers: dict[str, str], timeout_s: float, *, is_robots_txt: bool = False) -> Any:
        """Follow the redirect chain of ``url`` once, within a new deadline."""
        deadline = Deadline(self._limits.deadline_s, timeout_s, self._clock)
        with raises_fetch_error(deadline):
            return self.open(_Hop(url, headers, deadline, http.cookiejar.CookieJar(), is_robots_txt=is_robots_txt))

    def _pause_host(self, error: HTTPError) -> bool:
        """Pause the host if it answered with ``Retry-After``; return True if the URL is to be requested again."""
        seconds = retry_after_s(error.headers.get("Retry-After")) if error.code in PAUSE_STATUSES else None
        return seconds is not None and self._pacer.pause(endpoint_of(error.url), seconds, error.code)

    def _read_robots_txt(self, url: str) -> bytes:
        with self._fetch(url, {}, self._limits.timeout_s, is_robots_txt=True) as response:
            return bytes(response.read(MAX_BYTES))


class _Hop(urllib.request.Request):
    """One request in the redirect chain of a URL, with a validated ASCII URL. All hops share one deadline."""

    def __init__(
        self,
        url: str,
        headers: dict[str, str],
        deadline: Deadline,
        cookies: http.cookiejar.CookieJar,
        *,
        hops: int = 0,
        is_robots_txt: bool = False,
    ) -> None:
        super().__init__(ascii_url(url), headers=headers)
        self.endpoint = endpoint_of(self.full_url)
        self.deadline = deadline
        self.cookies = cookies
        self.hops = hops
        self.is_robots_txt = is_robots_txt

    def redirected(self, target: str) -> "_Hop":
        """Return the next request of the chain."""
        return _Hop(
            target,
            dict(self.headers),
            self.deadline,
            self.cookies,
            hops=self.hops + 1,
            is_robots_txt=self.is_robots_txt,
        )


class _Redirector(urllib.request.BaseHandler):
    """Redirect handler that uses the guarded opener, so that each target passes all checks."""

    def __init__(self, max_redirects: int) -> None:
        self._max_redirects = max_redirects

    def http_error_302(self, req: _Hop, fp: IO[bytes], code: int, msg: str, headers: Message) -> Any:
        location = headers.get("location")
        if location is None:
            return None  # the status is raised as an HTTPError
        fp.close()  # a redirect's body is never read
        if req.hops >= self._max_redirects:
            raise FetchError("too_many_redirects", f"more than max_redirects={self._max_redirects}")
        # Header bytes arrive decoded as latin-1: escape them as they were sent.
        target = urljoin(req.full_url, quote(location.strip(), safe=string.punctuation, encoding="latin-1"))
        return self.parent.open(req.redirected(target))

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _Connector(urllib.request.AbstractHTTPHandler):
    """Handler of http and https that connects to checked addresses only."""

    def __init__(self, limits: Limits, resolve: Resolve, tls: ssl.SSLContext, clock: Clock, pacer: HostPacer) -> None:
        super().__init__()
        self._limits, self._clock, self._pacer = limits, clock, pacer
        self._resolve = resolve
        self._tls = tls
        self._user_agent = limits.user_agent or default_user_agent()
        self._thread = threading.local()  # one connection per thread: lists often have many images of one host in a row

    def http_open(self, req: _Hop) -> Response:
        return self._response(req, None)

    def https_open(self, req: _Hop) -> Response:
        return self._response(req, self._tls)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _response(self, req: _Hop, tls: ssl.SSLContext | None) -> Response:
        """Return the response, over this thread's open connection to the same host if there is one, else a new one."""
        req.deadline.extend(self._pacer.wait(req.endpoint))
        endpoint, connection = (req.type, req.host), self._reusable_connection(req.type, req.host)
        req.cookies.add_cookie_header(req)
        fields = {name.title(): value for name, value in (*req.headers.items(), *req.unredirected_hdrs.items())}
        fields |= {"Accept-Encoding": "identity", "User-Agent": self._user_agent}
        response = None
        if connection is not None:
            with suppress(ConnectionError, h11.RemoteProtocolError, ssl.SSLError):  # the server has closed it
                response = connection.get(req.selector, fields, req.deadline)
        if response is None:
            connection = Connection(self._open_socket(req, tls), self._limits.max_body_bytes, self._clock)
            response = connection.get(req.selector, fields, req.deadline)
        self._thread.endpoint, self._thread.connection = endpoint, connection
        response.url = req.full_url
        req.cookies.extract_cookies(response, req)  # type: ignore[arg-type]  # it only reads the headers
        if self._limits.respect_robots_tag and response.status < 400:
            _check_robots_tag(response)
        return response

    def _reusable_connection(self, *endpoint: str) -> Connection | None:
        connection: Connection | None = vars(self._thread).pop("connection", None)
        usable = connection is not None and self._thread.endpoint == endpoint and connection.is_silent()
        return connection if usable else None

    def _open_socket(self, req: _Hop, tls: ssl.SSLContext | None) -> socket.socket:
        host = str(urlsplit(req.full_url).hostname)
        sock = self._connect(host, req)
        try:
            sock.settimeout(req.deadline.allowance_s())
            return sock if tls is None else tls.wrap_socket(sock, server_hostname=host)
        except BaseException:
            sock.close()
            raise

    def _connect(self, host: str, req: _Hop) -> socket.socket:
        last_error: OSError | None = None
        for family, kind, protocol, _, address in self._checked_addresses(host, req.endpoint):
            allowance_s = req.deadline.allowance_s()
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(allowance_s)
                sock.connect(address)
                return sock
            except OSError as error:
                last_error = error
                sock.close()
        raise last_error or OSError("no address to connect to")

    def _checked_addresses(self, host: str, endpoint: str) -> list[tuple[Any, ...]]:
        """Resolve ``host`` once and return its addresses. Raises ``FetchError`` if any of them is not public."""
        try:
            addresses = self._resolve(host, int(endpoint.rpartition(":")[2]), type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise FetchError("dns_error", f"{host}: {error.strerror}") from error
        addresses = [entry for entry in addresses if entry[0] in (socket.AF_INET, socket.AF_INET6)]
        if not addresses:
            raise FetchError("dns_error", f"{host} has no address")
        private = [str(entry[4][0]) for entry in addresses if not is_public(str(entry[4][0]))]
        if private and endpoint not in self._limits.allow_hosts:
            fix = f"add {endpoint} to allow_hosts if this is intended"
            raise FetchError("blocked_address", f"{min(private)} (from {host}) is not public; {fix}")
        return addresses


def _check_robots_tag(response: Response) -> None:
    rule = forbidding_rule(response.headers.get_all("X-Robots-Tag", []))
    if rule is not None:
        response.close()
        raise FetchError("robots_disallowed", f"X-Robots-Tag: {rule}")
