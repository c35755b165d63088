"""Limits of requests and their bodies: number, size, time, and where images are decoded."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from support.fake_engine import FakeEngine
from support.served_app import client, read, served

from tasks.serve.api import limits
from tasks.serve.api.config import ApiConfig
from tasks.serve.api.limits import Bounded, read_json
from tasks.serve.api.problems import ProblemError

JSON = {"Content-Type": "application/json"}


def chunks(size: int) -> Iterator[bytes]:
    """Yield ``size`` bytes; a client sends them without a Content-Length."""
    for _ in range(size // 1_000):
        yield b" " * 1_000


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
