"""The HTTP server of one process: its socket, signals, and the order of a shutdown."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from infra.errors import InputError, StageError
from tasks.serve.api.config import ApiConfig
from tasks.serve.api.connection import Connection

if TYPE_CHECKING:
    from tasks.serve.service.engine import Engine

KEEP_ALIVE_S = 5
FLUSH_S = 3
"""Part of the drain time that is left to send the last responses and to end the threads."""
_BACKLOG = 2_048
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """Result of a server that has ended.

    Attributes:
        signal: The signal that ended it; None if it ended by itself.
        drained: True if all accepted requests were finished in time. Else a thread may still run one.
    """

    signal: signal.Signals | None
    drained: bool

    @property
    def exit_code(self) -> int:
        """Exit code of the process: 130 after Ctrl-C, else 0."""
        return 130 if self.signal == signal.SIGINT else 0


class _Server(uvicorn.Server):
    """A server that leaves the signals to :func:`run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle no signals."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket, so that a used port is reported before models load. Clients wait until they have.

    Raises ``InputError`` if the address cannot be bound.
    """
    name = host.strip("[]")
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    # With the protocol left out, asyncio does not turn off Nagle's algorithm, and each response takes 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((name, port))
        bound.listen(_BACKLOG)  # with SO_REUSEADDR, another process may bind the port until one listens
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host and --port cannot be used: {host}:{port} ({reason}); give another port") from error
    return bound


def address_of(bound: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    app: FastAPI, engine: "Engine", bound: socket.socket, config: ApiConfig, on_ready: Callable[[], None]
) -> Ending:
    """Serve until a signal arrives.

    After the signal, the service is not ready at once and rejects new requests; accepted ones finish within
    ``config.drain_s``. Then the process ends, even if a thread hangs. A second signal ends it at once.

    Raises ``StageError`` if the application does not start.
    """
    return asyncio.run(_run(app, engine, bound, config, on_ready))


async def _run(
    app: FastAPI, engine: "Engine", bound: socket.socket, config: ApiConfig, on_ready: Callable[[], None]
) -> Ending:
    server = _Server(uvicorn_config(app))
    with _signals() as received:
        serving = asyncio.create_task(_serve(server, bound))
        announcing = asyncio.create_task(_announce(engine, server, on_ready))
        ends: set[asyncio.Future[Any]] = {serving, received}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        announcing.cancel()
        drained = True
        if not serving.done():  # the port stays open meanwhile: probes and new requests are answered with 503
            _end_process_after(config.drain_s, Ending(signal=received.result(), drained=False).exit_code)
            app.state.closed = True
            drained = await _drain(app, engine, time.monotonic() + config.drain_s - FLUSH_S)
            server.should_exit = True
        await serving
        return Ending(signal=received.result() if received.done() else None, drained=drained)


async def _serve(server: uvicorn.Server, bound: socket.socket) -> None:
    """Serve until ``server.should_exit``. Raises ``StageError`` if the application does not start."""
    with contextlib.suppress(SystemExit):  # of newer versions of Uvicorn; older ones return
        await server.serve(sockets=[bound])
    if not server.started:
        raise StageError("the service did not start; see the error above")


async def _drain(app: FastAPI, engine: "Engine", deadline: float) -> bool:
    """Accept no more requests and wait for the accepted ones. Return True if they finished before ``deadline``."""
    await asyncio.to_thread(engine.close, max(0.0, deadline - time.monotonic()))
    swapped: bool = await app.state.swaps.close(deadline)
    return swapped and time.monotonic() < deadline


def uvicorn_config(app: FastAPI) -> uvicorn.Config:
    """Return the configuration of the server. It logs no requests, because they name clients."""
    return uvicorn.Config(
        app,
        http=Connection,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=FLUSH_S - 1,
    )


@contextlib.contextmanager
def _signals() -> Iterator["asyncio.Future[signal.Signals]"]:
    """Yield a future of the first SIGINT or SIGTERM. The second one has its default effect."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[signal.Signals] = loop.create_future()

    def set_received(number: int) -> None:
        if not received.done():
            received.set_result(signal.Signals(number))

    def handle(number: int, frame: FrameType | None) -> None:
        for one in _SIGNALS:
            signal.signal(one, end)
        loop.call_soon_threadsafe(set_received, number)

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _announce(engine: "Engine", server: uvicorn.Server, on_ready: Callable[[], None]) -> None:
    """Call ``on_ready`` once the server listens and the engine is warm."""
    while not (server.started and engine.ready):
        await asyncio.sleep(0.05)
    on_ready()


def _end_process_after(seconds: float, status: int) -> None:
    """End the process after some seconds unless it has ended: an interpreter that exits joins threads without a limit.

    A download of a version or an exporter of traces may run in such a thread.
    """

    def end() -> None:
        sys.stderr.write(f"knn-diffusion: stopped; a thread did not end within {seconds:g} s\n")
        end_process(status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def end_process(status: int) -> None:
    """End the process although a thread still runs a batch, which would abort an orderly exit of the interpreter."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
