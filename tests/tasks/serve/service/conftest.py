"""Fixtures of the service: an engine on tiny models."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import tiny_service

from tasks.serve.service.config import ServiceConfig
from tasks.serve.service.engine import Engine


@pytest.fixture
def versions(tmp_path: Path) -> tiny_service.TinyVersions:
    return tiny_service.TinyVersions(tmp_path, birds=2, cats=1)


@pytest.fixture
def start(versions: tiny_service.TinyVersions) -> Iterator[Callable[..., Engine]]:
    """Start engines that are closed at the end."""
    started: list[Engine] = []

    def start(**options: Any) -> Engine:
        engine = Engine(versions, ServiceConfig(**options))
        started.append(engine)
        engine.start()
        tiny_service.wait_for(lambda: engine.ready or bool(engine.problems()))
        return engine

    yield start
    for engine in started:
        engine.close(0)


@pytest.fixture
def engine(start: Callable[..., Engine]) -> Engine:
    return start()
