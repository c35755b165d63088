"""``knn-diffusion serve`` in a process of its own, with an engine in memory: signals and the order of a shutdown."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.fake_engine import FakeEngine
from support.served_app import app_of

from infra.errors import InputError, StageError
from tasks.serve.api import server
from tasks.serve.api.config import ApiConfig

CHECKOUT = Path(__file__).parents[4]


@contextmanager
def serving(step_s: float, *arguments: str, drain_s: float = 30.0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield the process and the line that it prints when it is ready."""
    script = str(CHECKOUT / "tests/support/serve_fake.py")
    command = [sys.executable, script, str(step_s), str(drain_s), "--port", "0", *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT / 'tests'}:{CHECKOUT}"}
    with subprocess.Popen(
        command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


def run_job(address: str) -> None:
    """Queue a job, and wait until it runs."""
    place = httpx.post(f"{address}/v1/jobs", json={"kind": "generate", "prompt": "a"}).headers["Location"]
    while httpx.get(f"{address}{place}").json()["state"] != "running":
        time.sleep(0.01)


def test_sigterm_finishes_accepted_requests_and_exits_with_0() -> None:
    with serving(0.1, "--database", "birds", "--database", "fish") as (process, line):
        address = line.split()[0]
        assert line == f"{address} serves models:/knn-diffusion/1 with birds, fish\n"
        run_job(address)
        answers: list[httpx.Response] = []
        body = {"prompt": "b"}
        call = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{address}/v1/generate", json=body, timeout=30))
        )
        call.start()
        time.sleep(0.2)  # the request waits behind the job
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 1
        while httpx.get(f"{address}/readyz").status_code != 503:
            assert time.monotonic() < deadline
        refused = httpx.post(f"{address}/v1/search", json={"text": "a"})
        assert (refused.status_code, refused.json()["code"]) == (503, "closing")
        assert httpx.get(f"{address}/livez").status_code == 200
        call.join()
        assert [answer.status_code for answer in answers] == [200]
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_second_signal_ends_the_process_at_once() -> None:
    with serving(30.0) as (process, line):
        run_job(line.split()[0])
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM


def test_request_that_does_not_finish_in_time_is_dropped_and_the_exit_code_is_0() -> None:
    with serving(60.0, drain_s=server.FLUSH_S + 0.2) as (process, line):
        run_job(line.split()[0])
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == "knn-diffusion: stopped; not all requests finished within 3.2 s\n"


def test_swap_that_does_not_finish_in_time_is_refused_and_the_exit_code_is_0() -> None:
    with serving(60.0, "--database", "birds", drain_s=server.FLUSH_S + 0.5) as (process, line):
        address = line.split()[0]
        with ThreadPoolExecutor(2) as pool:  # the second swap waits for the first
            calls = [pool.submit(httpx.post, f"{address}/v1/databases/birds/swap", timeout=30) for _ in range(2)]
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            assert [call.result().status_code for call in calls] == [503, 503]
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == "knn-diffusion: stopped; not all requests finished within 3.5 s\n"


def test_process_ends_at_the_deadline_although_a_thread_hangs() -> None:
    code = (
        "import threading, time; from tasks.serve.api import server; server._end_process_after(0.1, 130); "
        "threading.Thread(target=time.sleep, args=(60,)).start()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == 130
    assert ended.stderr == "knn-diffusion: stopped; a thread did not end within 0.1 s\n"


def test_ctrl_c_prints_one_line_and_exits_with_130() -> None:
    with serving(0.0, "--database", "birds") as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "knn-diffusion: interrupted; the accepted requests were answered\n"


def test_bind_to_a_used_or_foreign_address_is_an_input_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port} "):
            server.bind("127.0.0.1", port)
    with pytest.raises(InputError, match="cannot be used"):
        server.bind("192.0.2.1", 0)


def test_second_service_on_the_same_port_is_refused_before_the_first_serves() -> None:
    with server.bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port} "):
            server.bind("127.0.0.1", port)


def test_application_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(engine, "start", lambda: 1 / 0)
    with server.bind("127.0.0.1", 0) as bound, pytest.raises(StageError, match="did not start"):
        server.run(app_of(engine), engine, bound, ApiConfig(), lambda: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("host", "start"), [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_bound_sockets_send_small_responses_at_once(host: str, start: str) -> None:
    try:
        with server.bind(host, 0) as bound:
            assert server.address_of(bound).startswith(start)
            assert bound.proto == socket.IPPROTO_TCP  # else asyncio leaves Nagle's algorithm on: 40 ms a response
    except InputError:
        assert host == "::1"  # a machine without IPv6
