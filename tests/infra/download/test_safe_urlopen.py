import pickle
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from support.certificates import certificate
from support.fakes import FakeClock, LoopbackServer, Reply

from infra.download.limits import FetchError, Limits
from infra.download.public_addresses import is_public
from infra.download.safe_urlopen import Resolve, guarded

LIMITS = Limits(allow_hosts=(), max_body_bytes=1000, deadline_s=5.0, timeout_s=2.0, max_redirects=3)
PUBLIC = "93.184.215.14"
TLS = ssl.create_default_context()  # slow to build: once for all tests

pytestmark = pytest.mark.usefixtures("connects")


def fetch(
    url: str,
    *,
    resolve: Resolve = socket.getaddrinfo,
    tls: ssl.SSLContext = TLS,
    clock: Callable[[], float] = time.monotonic,
    **changes: Any,
) -> bytes:
    limits = replace(LIMITS, **changes)
    with guarded(limits, resolve=resolve, tls=tls, clock=clock), urllib.request.urlopen(url) as response:
        return bytes(response.read())


def rejected(url: str, **changes: Any) -> FetchError:
    with pytest.raises(FetchError) as caught:
        fetch(url, **changes)
    assert str(caught.value).startswith(f"{caught.value.error_class}: ")
    return caught.value


def names(table: dict[str, list[tuple[str, int]]], queries: list[str] | None = None) -> Resolve:
    """Return a resolver of the names in ``table`` that records each query in ``queries``."""

    def resolve(host: str, port: int, *, type: int) -> list[tuple[Any, ...]]:  # noqa: A002  # getaddrinfo's name
        if queries is not None:
            queries.append(host)
        if host not in table:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, type, 6, "", (address, to or port))
            for address, to in table[host]
        ]

    return resolve


def test_urlopen_allowed_host_returns_the_body() -> None:
    with LoopbackServer({"/a.png": Reply(body=b"image")}) as server:
        assert fetch(server.url("/a.png"), allow_hosts=(server.host,)) == b"image"


@pytest.mark.parametrize("scheme", ["file", "ftp", "gopher", "jar"])
def test_urlopen_other_scheme_is_blocked(scheme: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    url = f"file://{tmp_path}/secret" if scheme == "file" else f"{scheme}://127.0.0.1/secret"
    error = rejected(url)
    assert error.error_class == "blocked_scheme"
    assert scheme in str(error)


def test_urlopen_loopback_is_blocked_unless_host_and_port_are_allowed() -> None:
    with LoopbackServer({"/": Reply(body=b"internal")}) as server:
        error = rejected(server.url("/"), allow_hosts=("127.0.0.1:1",))
        assert error.error_class == "blocked_address"
        assert "127.0.0.1" in str(error)
        assert f"add {server.host} to allow_hosts" in str(error)
        assert rejected(f"http://localhost:{server.port}/", allow_hosts=(server.host,)).error_class == "blocked_address"
        assert server.requests == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "017700000001", "127.1", "[::1]", "[::ffff:127.0.0.1]"])
def test_urlopen_unusual_loopback_notation_is_blocked(host: str, connects: list[Any]) -> None:
    assert rejected(f"http://{host}/").error_class == "blocked_address"
    assert connects == []


@pytest.mark.parametrize(
    "address",
    [
        *["127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200"],
        *["0.0.0.0", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"],  # noqa: S104
        *["192.0.0.192", "192.88.99.1", "168.63.129.16", "::", "::1", "::7f00:1", "fe80::1", "fe80::1%lo", "fc00::1"],
        *["fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "2001::1", "3fff::1", "4000::1"],
        *["::ffff:10.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::", "2002:a00:1::1", "64:ff9b::7f00:1"],
        *["64:ff9b::a9fe:a9fe", "64:ff9b:1::1"],
    ],
)
def test_urlopen_name_with_private_address_is_blocked(address: str, connects: list[Any]) -> None:
    assert not is_public(address)
    for answers in ([address], [PUBLIC, address], [address, PUBLIC]):
        resolve = names({"evil.example": [(each, 0) for each in answers]})
        error = rejected("http://evil.example/", resolve=resolve)
        assert error.error_class == "blocked_address"
        assert f"{address} (from evil.example) is not public" in str(error)
    assert connects == []


@pytest.mark.parametrize(
    "address", [PUBLIC, "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::1"]
)
def test_is_public_public_address_returns_true(address: str) -> None:
    assert is_public(address)


def test_urlopen_connects_to_the_checked_address(connects: list[Any]) -> None:
    queries: list[str] = []
    with LoopbackServer({"/": Reply(body=b"image")}) as server:
        resolve = names({"images.example": [("127.0.0.1", server.port)]}, queries)
        body = fetch("http://images.example/", resolve=resolve, allow_hosts=("images.example:80",))
        assert server.hosts == ["images.example"]
    assert body == b"image"
    assert queries == ["images.example"]  # a second query could return another address
    assert connects == [("127.0.0.1", server.port)]


def test_urlopen_unreachable_address_tries_the_next() -> None:
    with socket.socket() as unused, LoopbackServer({"/": Reply(body=b"image")}) as server:
        unused.bind(("127.0.0.1", 0))
        resolve = names({"two.example": [("127.0.0.1", unused.getsockname()[1]), ("127.0.0.1", server.port)]})
        assert fetch("http://two.example/", resolve=resolve, allow_hosts=("two.example:80",)) == b"image"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_urlopen_redirect_to_loopback_is_blocked(status: int) -> None:
    inner = LoopbackServer({"/": Reply(body=b"internal")})
    with inner, LoopbackServer({"/": Reply.redirect(inner.url("/"), status)}) as outer:
        assert rejected(outer.url("/"), allow_hosts=(outer.host,)).error_class == "blocked_address"
        assert outer.requests == ["/"]
        assert inner.requests == []


def test_urlopen_redirect_target_is_resolved_and_checked() -> None:
    queries: list[str] = []
    with LoopbackServer({"/": Reply.redirect("http://inner.example/")}) as server:
        table = {"outer.example": [("127.0.0.1", server.port)], "inner.example": [(PUBLIC, 0), ("10.0.0.1", 0)]}
        error = rejected("http://outer.example/", resolve=names(table, queries), allow_hosts=("outer.example:80",))
    assert error.error_class == "blocked_address"
    assert queries == ["outer.example", "inner.example"]


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x"])
def test_urlopen_redirect_to_other_scheme_is_blocked(target: str) -> None:
    with LoopbackServer({"/": Reply.redirect(target)}) as server:
        assert rejected(server.url("/"), allow_hosts=(server.host,)).error_class == "blocked_scheme"


def test_urlopen_follows_redirects_up_to_the_limit() -> None:
    replies = {f"/{hop}": Reply.redirect(f"/{hop + 1}") for hop in range(4)}
    with LoopbackServer({**replies, "/4": Reply(body=b"end"), "/loop": Reply.redirect("/loop")}) as server:
        allowed = (server.host,)
        assert fetch(server.url("/1"), allow_hosts=allowed) == b"end"
        assert rejected(server.url("/0"), allow_hosts=allowed).error_class == "too_many_redirects"
        assert rejected(server.url("/loop"), allow_hosts=allowed).error_class == "too_many_redirects"
        assert server.requests.count("/loop") == 4


def test_urlopen_redirect_without_location_raises_http_error() -> None:
    with LoopbackServer({"/": Reply(status=302)}) as server, pytest.raises(HTTPError, match="HTTP Error 302"):
        fetch(server.url("/"), allow_hosts=(server.host,))


@pytest.mark.parametrize("status", [404, 410, 503])
def test_urlopen_error_status_raises_http_error(status: int) -> None:
    server = LoopbackServer({"/": Reply(status=status, body=b"x" * 5000)})
    with server, pytest.raises(HTTPError, match=f"HTTP Error {status}"):
        fetch(server.url("/"), allow_hosts=(server.host,))


def chunks(block: bytes) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    yield from repeat(b"%x\r\n%s\r\n" % (len(block), block))


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=b"x" * 1001),
        Reply(body=lambda: repeat(b"x" * 4096)),
        Reply(body=lambda: chunks(b"xyz"), raw=True),
        Reply(body=lambda: repeat(b"x"), headers={"Content-Length": str(10**12)}),
    ],
    ids=["one byte more", "endless", "endless chunks", "declared"],
)
def test_urlopen_large_body_is_body_too_large(reply: Reply) -> None:
    with LoopbackServer({"/": reply}) as server:
        started = time.monotonic()
        assert rejected(server.url("/"), allow_hosts=(server.host,)).error_class == "body_too_large"
        assert time.monotonic() - started < 2


def test_urlopen_large_content_length_is_rejected_before_the_body() -> None:
    def nothing() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n"
        time.sleep(1)

    with LoopbackServer({"/": Reply(body=nothing, raw=True)}) as server:
        error = rejected(server.url("/"), allow_hosts=(server.host,), timeout_s=0.5)
        assert error.error_class == "body_too_large"


def test_urlopen_redirect_body_is_not_read() -> None:
    endless = Reply(body=lambda: repeat(b"x" * 4096), status=302, headers={"Location": "/end"})
    with LoopbackServer({"/": endless, "/end": Reply(body=b"end")}) as server:
        assert fetch(server.url("/"), allow_hosts=(server.host,)) == b"end"


def test_urlopen_body_at_limit_is_read_whole_or_in_parts() -> None:
    with LoopbackServer({"/": Reply(body=b"x" * 1000), "/open": Reply(body=lambda: iter([b"x" * 1000]))}) as server:
        assert len(fetch(server.url("/"), allow_hosts=(server.host,))) == 1000
        assert len(fetch(server.url("/open"), allow_hosts=(server.host,))) == 1000
        limits = replace(LIMITS, allow_hosts=(server.host,))
        with guarded(limits), urllib.request.urlopen(server.url("/")) as response:
            assert [len(response.read(600)), len(response.read(600)), len(response.read(600))] == [600, 400, 0]


def drip(head: bytes = b"") -> Iterator[bytes]:
    yield head
    while True:
        time.sleep(0.05)
        yield b"x"


def hold() -> Iterator[bytes]:
    time.sleep(1.5)
    yield b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    "body",
    [
        lambda: drip(b"HTTP/1.1 200 OK\r\n\r\n"),
        lambda: drip(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"),
        lambda: drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n"),
        lambda: drip(b"HTTP/1.1 200 OK\r\nX-Slow: "),
        lambda: drip(b"HTTP"),
        hold,
    ],
    ids=["body", "declared body", "chunks", "headers", "status line", "silence"],
)
def test_urlopen_slow_server_is_deadline_exceeded(body: Callable[[], Iterator[bytes]]) -> None:
    with LoopbackServer({"/": Reply(body=body, raw=True)}) as server:
        started = time.monotonic()
        error = rejected(server.url("/"), allow_hosts=(server.host,), deadline_s=0.3)
        assert error.error_class == "deadline_exceeded"
        assert 0.25 < time.monotonic() - started < 1.3


def test_urlopen_redirects_share_one_deadline() -> None:
    clock = FakeClock()

    def slow() -> Iterator[bytes]:
        clock.sleep(2)
        yield b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n"

    with LoopbackServer({"/": Reply(body=slow, raw=True)}) as server:
        error = rejected(server.url("/"), allow_hosts=(server.host,), clock=clock, max_redirects=50)
        assert error.error_class == "deadline_exceeded"
        assert len(server.requests) <= 3


def test_urlopen_each_url_has_its_own_deadline() -> None:
    clock = FakeClock()

    def slow() -> Iterator[bytes]:
        clock.sleep(0.3 * LIMITS.deadline_s)
        yield b"x"

    server = LoopbackServer({"/": Reply(body=slow)})
    with server, guarded(replace(LIMITS, allow_hosts=(server.host,)), clock=clock):
        for _ in range(4):
            with urllib.request.urlopen(server.url("/")) as response:
                assert response.read() == b"x"


def test_urlopen_silent_server_is_timeout() -> None:
    with LoopbackServer({"/": Reply(body=hold, raw=True)}) as server:
        assert rejected(server.url("/"), allow_hosts=(server.host,), timeout_s=0.2).error_class == "timeout"
        with guarded(replace(LIMITS, allow_hosts=(server.host,))), pytest.raises(FetchError, match=r"timeout_s=0\.1"):
            urllib.request.urlopen(server.url("/"), timeout=0.1)


def test_urlopen_slow_name_server_is_deadline_exceeded(connects: list[Any]) -> None:
    clock = FakeClock()

    def resolve(*_: Any, **__: Any) -> list[tuple[Any, ...]]:
        clock.sleep(LIMITS.deadline_s)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, 80))]

    assert rejected("http://slow.example/", resolve=resolve, clock=clock).error_class == "deadline_exceeded"
    assert connects == []


def test_urlopen_name_without_address_is_dns_error() -> None:
    assert rejected("http://nowhere.example/", resolve=names({})).error_class == "dns_error"
    assert rejected("http://nowhere.example/", resolve=names({"nowhere.example": []})).error_class == "dns_error"


@pytest.mark.parametrize(
    "body",
    [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"],
    ids=["closed", "not HTTP", "truncated"],
)
def test_urlopen_invalid_response_is_connection_error(body: bytes) -> None:
    with LoopbackServer({"/": Reply(body=body, raw=True)}) as server:
        assert rejected(server.url("/"), allow_hosts=(server.host,)).error_class == "connection_error"


def test_urlopen_closed_port_is_connection_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        assert rejected(f"http://{host}/", allow_hosts=(host,)).error_class == "connection_error"


@pytest.mark.parametrize(
    "url",
    [
        *["http:///x.png", "http://me:secret@127.0.0.1/", "http://127.0.0.1:port/", "http://127.0.0.1:99999/"],
        *["http://[::1/", "http://a..b/", f"http://{'a' * 64}.example/", f"http://{'é' * 64}.example/", "https://?x"],
    ],
)
def test_urlopen_malformed_url_is_invalid_url(url: str) -> None:
    assert rejected(url).error_class == "invalid_url"


def test_urlopen_quotes_any_character_in_urls_and_redirects() -> None:
    quoted = "/caf%C3%A9%20a%7Cb.png?q=%C3%BC"
    redirect = b"HTTP/1.1 302 Found\r\nLocation: /caf\xc3\xa9%20a|b.png?q=\xc3\xbc#top\r\n\r\n"
    replies = {quoted.replace("%7C", "|"): Reply(body=b"image"), "/": Reply(body=redirect, raw=True)}
    with LoopbackServer(replies) as server:
        assert fetch(server.url("/café%20a|b.png?q=ü#top"), allow_hosts=(server.host,)) == b"image"
        assert fetch(server.url("/"), allow_hosts=(server.host,)) == b"image"
        resolve = names({"xn--bcher-kva.example": [("127.0.0.1", server.port)]})
        allowed = ("xn--bcher-kva.example:80",)
        assert fetch("http://Bücher.example/", resolve=resolve, allow_hosts=(*allowed, server.host)) == b"image"


def test_urlopen_ignores_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with LoopbackServer({"/": Reply(body=b"image")}) as server:
        assert fetch(server.url("/"), allow_hosts=(server.host,)) == b"image"


def test_urlopen_with_data_raises_value_error() -> None:
    with guarded(LIMITS), pytest.raises(ValueError, match="does not send data"):
        urllib.request.urlopen("http://127.0.0.1/", data=b"x")


def test_urlopen_tls_verifies_the_requested_name(tmp_path: Path) -> None:
    path = certificate(tmp_path, "images.example")
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(path)
    indicated: list[str | None] = []
    server_side.sni_callback = lambda _, name, __: indicated.append(name)
    client_side = ssl.create_default_context(cafile=str(path))
    with LoopbackServer({"/": Reply(body=b"image")}, tls=server_side) as server:
        resolve = names({name: [("127.0.0.1", server.port)] for name in ("images.example", "other.example")})
        allowed = {"resolve": resolve, "allow_hosts": ("images.example:443", "other.example:443")}
        assert fetch("https://images.example/", tls=client_side, **allowed) == b"image"
        other = rejected("https://other.example/", tls=client_side, **allowed)
        untrusted = rejected("https://images.example/", **allowed)
    assert indicated == ["images.example", "other.example", "images.example"]
    assert other.error_class == untrusted.error_class == "connection_error"
    assert "certificate" in str(other).lower()


def test_guarded_restores_the_previous_opener() -> None:
    before = urllib.request._opener
    with guarded(LIMITS) as outer:
        with guarded(LIMITS) as inner:
            assert urllib.request._opener is inner
        assert urllib.request._opener is outer
        with pytest.raises(RuntimeError), guarded(LIMITS):
            raise RuntimeError
        assert urllib.request._opener is outer
    assert urllib.request._opener is before


def test_guarded_second_thread_waits_for_the_first() -> None:
    before = urllib.request._opener
    entered, installed = threading.Event(), []

    def second() -> None:
        with guarded(LIMITS, tls=TLS) as opener:
            entered.set()
            time.sleep(0.1)
            installed.append(urllib.request._opener is opener)

    with guarded(LIMITS):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.3)
    thread.join()
    assert installed == [True]
    assert urllib.request._opener is before


def test_guarded_opener_serves_many_threads() -> None:
    replies = {f"/{index}": Reply(body=b"x" * index) for index in range(100)}
    server = LoopbackServer({**replies, "/out": Reply.redirect("http://10.0.0.1/")})

    def get(path: str) -> int:
        try:
            with urllib.request.urlopen(server.url(path)) as response:
                return len(response.read())
        except FetchError:
            return -1

    with server, guarded(replace(LIMITS, allow_hosts=(server.host,))), ThreadPoolExecutor(32) as pool:
        assert list(pool.map(get, [*replies, "/out"] * 3)) == [*range(100), -1] * 3


def test_fetch_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(FetchError("timeout", "no data received")))  # noqa: S301  # trusted bytes
    assert (str(error), error.error_class) == ("timeout: no data received", "timeout")
