"""The API on an engine in memory: called directly, or served on a port of its own."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from support.fake_engine import FakeEngine

from infra.settings import Settings
from tasks.serve.api import server
from tasks.serve.api.app import create_app
from tasks.serve.api.config import ApiConfig

if TYPE_CHECKING:
    from tasks.serve.service.engine import Engine  # imports torch


def app_of(engine: "FakeEngine | Engine", **api: Any) -> FastAPI:
    """Return the application on ``engine``, without the playground. ``api`` are fields of its config."""
    return create_app(Settings(), engine=engine, api=ApiConfig(**api), page=False)  # type: ignore[arg-type]


@contextmanager
def client(engine: FakeEngine | None = None, **api: Any) -> Iterator[TestClient]:
    """Yield a client that calls the application in this process. Errors inside it are answered, not raised."""
    app = app_of(engine or FakeEngine(), **api)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as called:
        yield called


@contextmanager
def served(engine: "FakeEngine | Engine | None" = None, **api: Any) -> Iterator[str]:
    """Serve the application with the connections of ``knn-diffusion serve``, and yield its address."""
    app = app_of(engine or FakeEngine(), **api)
    with server.bind("127.0.0.1", 0) as bound:
        running = uvicorn.Server(server.uvicorn_config(app))
        thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[bound])))
        address = server.address_of(bound)
        thread.start()
        while not running.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield address
        finally:
            running.should_exit = True
            thread.join()


def read(address: str, sent: bytes, rest: bytes = b"", pause_s: float = 0.0, timeout_s: float = 5.0) -> bytes:
    """Send bytes to a server, after a pause the rest, and return what it sends until it closes the connection."""
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), timeout=timeout_s) as connection:
        if pause_s:
            connection.sendall(sent)
            time.sleep(pause_s)
            connection.sendall(rest)
        else:
            connection.sendall(sent + rest)
        received = b""
        while part := connection.recv(65_536):
            received += part
        return received
