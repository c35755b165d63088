"""Connections of the service, on a port: headers, pipelined requests, and clients that are slow or leave."""

import contextlib
import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from support.fake_engine import FakeEngine
from support.served_app import read, served
from support.tiny_service import wait_for

from tasks.serve.api import connection as connections


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHost: loc"])
def test_slow_headers_close_the_connection(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADERS_TIMEOUT_S", 0.1)
    with served() as address:
        begun = time.monotonic()
        assert read(address, sent) == b""
        assert time.monotonic() - begun < 2


HEAD = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CLOSING = b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
WEBSOCKET = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(HEAD + b"X-Long: ", id="header"),
        pytest.param(b"GET /", id="url"),
        pytest.param(CHUNKED + b"0\r\nX-Long: ", id="trailer"),
        pytest.param(CHUNKED + b"1;extension=", id="extension"),
    ],
)
def test_endless_headers_close_the_connection(begun: bytes) -> None:
    with served() as address:
        client = socket.create_connection((urlsplit(address).hostname, urlsplit(address).port), timeout=10)
        client.sendall(begun)
        sent, answer = 0, b""
        with contextlib.suppress(ConnectionError):
            while sent < 2**24:
                client.sendall(b"a" * 16_384)
                sent += 16_384
        with contextlib.suppress(ConnectionError):
            answer = client.recv(65_536)
        client.close()
    assert sent < 2**22, "the connection was closed long before, except for what the buffers of sockets took"
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 Bad Request")


def test_large_body_in_chunks_with_a_trailer_is_read_and_the_trailer_ignored() -> None:
    value = json.dumps({"text": "a"}).encode()
    padded = value + b" " * 200_000
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (padded[:100_000], padded[100_000:]))
    with served() as address:
        answer = read(address, HEAD + CLOSING + chunks + b"0\r\nX-API-Key: no\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")


def test_pipelined_requests_are_answered_in_order_up_to_a_limit() -> None:
    one = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with served() as address:
        answers = read(address, 3 * one + last)
        assert answers.count(b"HTTP/1.1 200 OK") == 4
        assert answers.index(b'"ready"') > answers.rindex(b'"status":"ok"')
        many = read(address, 20 * one)
    assert many.count(b"HTTP/1.1 ") == many.count(b"HTTP/1.1 200 OK") == connections.MAX_PIPELINED + 1


@pytest.mark.parametrize("invalid", [b"no request\r\n\r\n", CHUNKED + b"no size\r\n"], ids=["method", "body"])
def test_requests_before_an_invalid_one_are_answered_and_the_connection_closed(invalid: bytes) -> None:
    one = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with served() as address:
        answers = read(address, 2 * one + invalid)
    assert answers.count(b"HTTP/1.1 ") == answers.count(b"HTTP/1.1 200 OK") == 2


def test_invalid_body_of_a_request_is_refused() -> None:
    with served() as address:
        answer = read(address, CHUNKED + b"no size\r\n")
    assert answer.startswith(b"HTTP/1.1 400 Bad Request")


@pytest.mark.parametrize("protocol", [b"h2c", b"h2c, websocket"])
@pytest.mark.parametrize("pause_s", [0, 0.2])
def test_upgrade_to_another_protocol_is_ignored_and_the_body_read(protocol: bytes, pause_s: float) -> None:
    body = json.dumps({"text": "a"}).encode()
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: AAAA\r\n" % protocol
    last = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with served() as address:
        answers = read(address, HEAD + upgrade + b"Content-Length: %d\r\n\r\n" % len(body), body + last, pause_s)
    assert answers.count(b"HTTP/1.1 ") == answers.count(b"HTTP/1.1 200 OK") == 2
    assert answers.index(b'"hits"') < answers.index(b'"status":"ok"')


def test_websocket_reaches_the_application_which_has_none_without_the_playground() -> None:
    with served() as address:
        assert read(address, WEBSOCKET).startswith(b"HTTP/1.1 403 Forbidden")


def test_websocket_before_the_response_of_a_request_is_refused() -> None:
    engine, body = FakeEngine(), json.dumps({"prompt": "a"}).encode()
    engine.gate.clear()
    one = HEAD.replace(b"search", b"generate") + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    with served(engine) as address, ThreadPoolExecutor(1) as pool:
        answers = pool.submit(read, address, one + WEBSOCKET)
        wait_for(lambda: bool(engine.submitted))
        engine.gate.set()
        assert answers.result().count(b"HTTP/1.1 ") == answers.result().count(b"HTTP/1.1 200 OK") == 1


def test_white_space_around_the_value_of_a_header_is_ignored() -> None:
    with served() as address:
        answer = read(address, b"GET /livez HTTP/1.1\r\nHost: \tlocalhost \t\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("target", [b"example.org:443", b"/livez"])
def test_connect_is_refused(target: bytes) -> None:
    with served() as address:
        answer = read(address, b"CONNECT %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % target)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request")


@pytest.mark.parametrize("first", [1, 2], ids=["queued later", "queued at once"])
def test_disconnection_cancels_the_running_request_although_others_are_queued(first: int) -> None:
    engine, body = FakeEngine(), json.dumps({"prompt": "a"}).encode()
    engine.gate.clear()
    one = HEAD.replace(b"search", b"generate") + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    with served(engine) as address:
        with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port)) as connection:
            connection.sendall(first * one)
            wait_for(lambda: bool(engine.submitted))
            time.sleep(0.1)  # the service waits for the end of the connection
            connection.sendall((2 - first) * one)
        wait_for(lambda: engine.submitted[0].cancelled)
        engine.gate.set()


def test_slow_headers_of_a_second_request_close_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADERS_TIMEOUT_S", 0.1)
    with served() as address:
        connection = http.client.HTTPConnection(urlsplit(address).netloc)
        connection.request("GET", "/livez")
        connection.getresponse().read()
        begun = time.monotonic()
        connection.sock.sendall(b"GET /livez")
        assert connection.sock.recv(1) == b""
        assert time.monotonic() - begun < 2
        connection.close()


def test_connection_serves_several_requests_beyond_the_time_for_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADERS_TIMEOUT_S", 0.05)
    with served() as address:
        connection = http.client.HTTPConnection(urlsplit(address).netloc)
        connection.connect()
        used = connection.sock
        for _ in range(5):
            connection.request("GET", "/livez")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            time.sleep(0.03)
        assert connection.sock is used
        connection.close()


def test_client_that_does_not_read_its_response_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SEND_TIMEOUT_S", 0.2)
    engine, size = FakeEngine(), 2**24  # more than the buffers of a socket
    monkeypatch.setattr(engine.metrics, "expose", lambda: b"x" * size)
    with served(engine) as address:
        connection = http.client.HTTPConnection(urlsplit(address).netloc)
        connection.connect()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        for _ in range(2):  # reading in time keeps the connection
            connection.request("GET", "/metrics")
            assert len(connection.getresponse().read()) == size
            time.sleep(0.3)
        connection.request("GET", "/metrics")
        time.sleep(1)
        received = 0
        with contextlib.suppress(ConnectionError):
            while part := connection.sock.recv(65_536):
                received += len(part)
        connection.close()
    assert received < size
