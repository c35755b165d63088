"""Limits of bodies and connections: size, time, and where images are decoded."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.requests import Request
from support.fake_engine import FakeEngine
from support.served_app import client, served
from support.tiny_service import wait_for

from tasks.serve.api import limits, server
from tasks.serve.api.config import ApiConfig
from tasks.serve.api.limits import Bounded, read_json
from tasks.serve.api.problems import ProblemError

JSON = {"Content-Type": "application/json"}


def chunks(size: int) -> Iterator[bytes]:
    """Yield ``size`` bytes; a client sends them without a Content-Length."""
    for _ in range(size // 1_000):
        yield b" " * 1_000


def read(address: str, sent: bytes, timeout_s: float = 5.0) -> bytes:
    """Send bytes to a server, and return what it sends until it closes the connection."""
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), timeout=timeout_s) as connection:
        connection.sendall(sent)
        received = b""
        while part := connection.recv(65_536):
            received += part
        return received


def test_body_above_the_limit_is_refused_with_and_without_a_length() -> None:
    with client(max_body_bytes=5_000) as calls:
        for content in (b" " * 6_000, chunks(6_000)):
            response = calls.post("/v1/search", content=content, headers=JSON)
            assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
            assert response.headers["Connection"] == "close"
        openai = calls.post("/v1/images/generations", content=b" " * 6_000, headers=JSON)
        assert (openai.status_code, openai.json()["error"]["code"]) == (413, "body_too_large")
        body = json.dumps({"text": "a"}).encode().ljust(5_000)
        assert calls.post("/v1/search", content=body, headers=JSON).status_code == 200


def test_swap_takes_no_large_body() -> None:
    with client() as calls:
        response = calls.post("/v1/databases/birds/swap", content=b" " * 70_000, headers=JSON)
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


def test_bodies_above_the_limit_of_all_are_refused_until_a_request_ends() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    body = json.dumps({"prompt": "a"}).encode().ljust(4_000)
    with client(engine, max_body_bytes=5_000, max_bodies_bytes=6_000) as calls, ThreadPoolExecutor(1) as pool:
        first = pool.submit(calls.post, "/v1/generate", content=body, headers=JSON)
        while not engine.submitted:
            time.sleep(0.01)
        for content in (body, iter([body]), body):
            refused = calls.post("/v1/generate", content=content, headers=JSON)
            assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
            assert int(refused.headers["Retry-After"]) > 0
        engine.gate.set()
        assert first.result().status_code == 200
        assert calls.post("/v1/generate", content=body, headers=JSON).status_code == 200


def test_images_beyond_those_that_may_wait_for_a_decoder_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_decoder_places", threading.BoundedSemaphore(2))
    free = threading.Event()

    async def calls() -> None:
        waiting = [asyncio.create_task(limits.in_decoder(lambda: free.wait(20))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ProblemError) as refused:
            await limits.in_decoder(lambda: True)
        assert (refused.value.problem.status, refused.value.problem.code) == (429, "queue_full")
        free.set()
        assert await asyncio.gather(*waiting) == [True, True]
        assert await limits.in_decoder(lambda: True)

    asyncio.run(calls())


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"9" * 5_000, "٣".encode()])
def test_odd_content_length_is_no_server_error(length: bytes) -> None:
    with served() as address:
        head = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        answer = read(address, head + length + b"\r\nConnection: close\r\n\r\n{}")
    assert answer.split()[1][:1] == b"4"


def test_slow_body_is_refused_and_the_connection_closed() -> None:
    with served(body_timeout_s=0.1) as address:
        head = (
            b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 20\r\n"
        )
        answer = read(address, head + b"\r\n{")
    assert b"408 Request Timeout" in answer
    assert b"the body did not arrive within 0.1 s" in answer


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHost: loc"])
def test_slow_headers_close_the_connection(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADERS_TIMEOUT_S", 0.1)
    with served() as address:
        begun = time.monotonic()
        assert read(address, sent) == b""
        assert time.monotonic() - begun < 2


HEAD = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CLOSING = b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
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
    assert b"Invalid HTTP request received." in many
    assert many.count(b"HTTP/1.1 200 OK") <= server.MAX_PIPELINED + 1


def test_disconnection_cancels_the_running_request_although_others_are_queued() -> None:
    engine, body = FakeEngine(), json.dumps({"prompt": "a"}).encode()
    engine.gate.clear()
    one = HEAD.replace(b"search", b"generate") + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    with served(engine) as address:
        with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port)) as connection:
            connection.sendall(2 * one)
            wait_for(lambda: bool(engine.submitted))
        wait_for(lambda: engine.submitted[0].cancelled)
        engine.gate.set()


def test_slow_headers_of_a_second_request_close_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADERS_TIMEOUT_S", 0.1)
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
    monkeypatch.setattr(server, "HEADERS_TIMEOUT_S", 0.05)
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
    monkeypatch.setattr(server, "SEND_TIMEOUT_S", 0.2)
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


def test_probes_answer_while_too_many_requests_are_in_progress() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    with served(engine, max_requests=2) as address, ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(httpx.post, f"{address}/v1/generate", json={"prompt": "a"}) for _ in range(2)]
        while len(engine.submitted) < 2:
            time.sleep(0.01)
        refused = httpx.post(f"{address}/v1/search", json={"text": "a"})
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        assert int(refused.headers["Retry-After"]) > 0
        assert httpx.get(f"{address}/livez").status_code == httpx.get(f"{address}/readyz").status_code == 200
        engine.gate.set()
        assert [call.result().status_code for call in calls] == [200, 200]
        assert httpx.post(f"{address}/v1/search", json={"text": "a"}).status_code == 200


def test_client_that_leaves_before_the_end_of_its_body_reaches_no_route() -> None:
    called: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append("app")

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        called.append(message["type"])

    asyncio.run(
        Bounded(app, ApiConfig())({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send)
    )
    assert called == []


@pytest.mark.parametrize(
    ("body", "in_thread"),
    [
        ({"text": "a"}, False),
        ({"text": "a", "image": None}, False),
        ({"image": "eA=="}, True),
        ({"text": "a" * 20_000}, True),
    ],
)
def test_read_json_parses_images_and_long_bodies_off_the_event_loop(body: dict[str, Any], in_thread: bool) -> None:
    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    def parse(value: Any) -> str:
        assert value == body
        return threading.current_thread().name

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json; charset=utf-8")]}
    name = asyncio.run(read_json(Request(scope, receive), parse))
    assert name.startswith("decode") is in_thread
