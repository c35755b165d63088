"""Fixtures for tests of changing databases: workers without Ray, and the domain."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.changing_domain import BODY, Living
from support.fakes import LoopbackServer, Reply, WithoutRay


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> WithoutRay:
    fake = WithoutRay()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def living(prefect_server: None, migrated_database: Path, tmp_path: Path) -> Iterator[Living]:
    with LoopbackServer({path: Reply(body=body) for path, body in BODY.items()}) as server:
        yield Living(server, tmp_path, migrated_database)
