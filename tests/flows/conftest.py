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


@pytest.fixture(scope="session")
def image_server() -> Iterator[LoopbackServer]:
    """The server of all changing domains: the addresses in kept databases must not change."""
    with LoopbackServer({}) as server:
        yield server


@pytest.fixture(scope="session")
def stored_domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the databases that tests start with."""
    return tmp_path_factory.mktemp("stored-domains")


@pytest.fixture
def living(image_server: LoopbackServer, stored_domains: Path, migrated_database: Path, tmp_path: Path) -> Living:
    """A changing domain. Its flows run as plain functions."""
    image_server.reset({path: Reply(body=body) for path, body in BODY.items()})
    return Living(image_server, tmp_path, migrated_database, stored=stored_domains)


@pytest.fixture
def living_on_prefect(living: Living, prefect_server: None) -> Living:
    """A changing domain whose flows run on Prefect."""
    living.on_prefect = True
    return living
