"""Connection reuse of the guarded opener: each thread keeps its last connection."""

import contextlib
import gc
import socket
import ssl
import time
import urllib.request
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.certificates import certificate
from support.fakes import FakeClock, LoopbackServer, Reply

from infra.download.limits import FetchError, Limits
from infra.download.safe_urlopen import guarded


def limits(*servers: LoopbackServer, **changes: Any) -> Limits:
    hosts = tuple(server.host for server in servers)
    usual = {"max_body_bytes": 200_000, "deadline_s": 5.0, "timeout_s": 2.0, "max_redirects": 3}
    return Limits(allow_hosts=hosts, **{**usual, **changes})


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url) as response:
        return bytes(response.read())


def slowly() -> Iterator[bytes]:
    for _ in range(4):
        time.sleep(0.15)
        yield b"."


REPLIES = {"/a": Reply(body=b"first"), "/b": Reply(body=b"second"), "/empty": Reply(), "/gone": Reply(status=404)}


def test_urlopen_same_host_reuses_the_connection(connects: list[Any]) -> None:
    with LoopbackServer(REPLIES, keeps_alive=True) as server, guarded(limits(server)):
        assert [fetch(server.url(path)) for path in ("/a", "/b", "/empty", "/a")] == [
            b"first",
            b"second",
            b"",
            b"first",
        ]
    assert connects == [("127.0.0.1", server.port)]


def test_urlopen_same_tls_host_reuses_the_connection(connects: list[Any], tmp_path: Path) -> None:
    path = certificate(tmp_path, "images.example")
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(path)
    client_side = ssl.create_default_context(cafile=str(path))
    with LoopbackServer(REPLIES, tls=server_side, keeps_alive=True) as server:

        def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))]

        allowed = replace(limits(), allow_hosts=("images.example:443",))
        with guarded(allowed, resolve=resolve, tls=client_side):
            found = [fetch(f"https://images.example{path}") for path in ("/a", "/b", "/a")]
    assert found == [b"first", b"second", b"first"]
    assert len(connects) == 1


def test_urlopen_other_host_opens_a_new_connection(connects: list[Any]) -> None:
    with (
        LoopbackServer(REPLIES, keeps_alive=True) as one,
        LoopbackServer(REPLIES, keeps_alive=True) as other,
        guarded(limits(one, other)),
    ):
        assert [fetch(server.url("/a")) for server in (one, other, other, one)] == [b"first"] * 4
    assert [port for _, port in connects] == [one.port, other.port, one.port]


def test_urlopen_each_thread_has_its_own_connection(connects: list[Any]) -> None:
    with LoopbackServer(REPLIES, keeps_alive=True) as server, guarded(limits(server)), ThreadPoolExecutor(4) as pool:
        urls = [server.url(path) for path in ("/a", "/b") * 50]
        assert list(pool.map(fetch, urls)) == [b"first", b"second"] * 50
    assert 1 <= len(connects) <= 4


def test_urlopen_closed_connection_is_reopened(connects: list[Any]) -> None:
    replies = {"/a": Reply(body=b"first", hangs_up=True)}
    with LoopbackServer(replies, keeps_alive=True) as server, guarded(limits(server)):
        assert [fetch(server.url("/a")) for _ in range(3)] == [b"first"] * 3
    assert len(connects) == 3
    assert server.requests == ["/a"] * 3, "the request on the closed connection never arrived"


def test_urlopen_unread_response_is_not_read_as_the_next(connects: list[Any]) -> None:
    forged = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
    with LoopbackServer({**REPLIES, "/long": Reply(body=forged)}, keeps_alive=True) as server, guarded(limits(server)):
        urllib.request.urlopen(server.url("/long")).close()
        assert fetch(server.url("/a")) == b"first"
    assert len(connects) == 2


def test_urlopen_unsolicited_data_is_not_read_as_the_next_response(connects: list[Any]) -> None:
    twice = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n%s"

    def body() -> Iterator[bytes]:
        yield twice % b"mine"
        time.sleep(0.05)
        yield twice % b"more"

    replies = {**REPLIES, "/two": Reply(body=body, raw=True)}
    with LoopbackServer(replies, keeps_alive=True) as server, guarded(limits(server)):
        assert fetch(server.url("/two")) == b"mine"
        time.sleep(0.15)
        assert [fetch(server.url(path)) for path in ("/a", "/b")] == [b"first", b"second"]
    assert len(connects) == 2


def test_urlopen_long_idle_connection_is_not_reused(connects: list[Any]) -> None:
    clock = FakeClock()
    with LoopbackServer(REPLIES, keeps_alive=True) as server, guarded(limits(server), clock=clock):
        assert fetch(server.url("/a")) == b"first"
        clock.sleep(11)
        assert fetch(server.url("/a")) == b"first"
    assert len(connects) == 2


def test_urlopen_many_hosts_keep_one_socket_per_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    connect = socket.socket.connect

    def recorded(sock: socket.socket, address: Any) -> None:
        opened.append(weakref.ref(sock))
        connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", recorded)
    gc.disable()  # it would close leaked sockets
    try:
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(LoopbackServer(REPLIES, keeps_alive=True)) for _ in range(12)]
            stack.enter_context(guarded(limits(*servers)))
            for server in servers:
                fetch(server.url("/a"))
            assert len([sock for sock in opened if sock() is not None and sock().fileno() >= 0]) == 1
            assert len(opened) == 12
    finally:
        gc.enable()


def test_urlopen_after_too_large_body_opens_a_new_connection(connects: list[Any]) -> None:
    replies = {**REPLIES, "/large": Reply(body=b"." * 300)}
    with LoopbackServer(replies, keeps_alive=True) as server, guarded(limits(server, max_body_bytes=100)):
        assert fetch(server.url("/a")) == b"first"
        with pytest.raises(FetchError, match="body_too_large"):
            fetch(server.url("/large"))
        assert fetch(server.url("/b")) == b"second"
    assert len(connects) == 2


def test_urlopen_two_open_responses_do_not_mix() -> None:
    with (
        LoopbackServer(REPLIES, keeps_alive=True) as server,
        guarded(limits(server)),
        urllib.request.urlopen(server.url("/a")) as one,
        urllib.request.urlopen(server.url("/b")) as other,
    ):
        assert (other.read(), one.read()) == (b"second", b"first")


def test_urlopen_reused_connection_has_a_deadline_per_url() -> None:
    replies = {**REPLIES, "/slow": Reply(body=slowly, headers={"Content-Length": "4"})}
    with LoopbackServer(replies, keeps_alive=True) as server, guarded(limits(server, deadline_s=0.9)):
        assert [fetch(server.url("/slow")) for _ in range(2)] == [b"...."] * 2  # 0.6 s each
        with guarded(limits(server, deadline_s=0.3)), pytest.raises(FetchError, match="deadline_exceeded"):
            fetch(server.url("/slow"))
