"""Fixtures of the infra tests: MLflow databases, folders of a domain, and recorded connections."""

import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from support.object_stores import Bucket

from infra.settings import Settings


@pytest.fixture
def mlflow_settings(migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings with a SQLite database of the test. The process is disconnected from MLflow afterwards."""
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(migrated_database, root / "mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.delenv("MLFLOW_ARTIFACTS", raising=False)
    monkeypatch.chdir(tmp_path)
    yield Settings(root=str(root))
    _disconnect()


@pytest.fixture
def project(mlflow_settings: Settings, tmp_path: Path) -> Any:
    """A project with an empty registry."""
    from support.registry_project import Project

    return Project(mlflow_settings, tmp_path)


def _disconnect() -> None:
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    mlflow.set_registry_uri(None)  # type: ignore[arg-type]


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses of all connections. A connection beyond loopback fails the test instead of leaving the machine.

    Threads of earlier tests do not count: Prefect's send logs to a server that has ended.
    """
    addresses: list[Any] = []
    others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    connect = socket.socket.connect

    def record(sock: socket.socket, address: Any) -> None:
        if threading.get_ident() in others:
            return connect(sock, address)
        addresses.append(address[:2])
        assert address[0] in ("127.0.0.1", "::1"), f"connecting to {address}"
        return connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", record)
    return addresses


@pytest.fixture(params=["local", "moto", pytest.param("radosgw", marks=pytest.mark.s3)])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Folder of a domain, local or in an object store."""
    if request.param == "local":
        return str(tmp_path / "twemoji")
    bucket: Bucket = request.getfixturevalue(f"{request.param}_bucket")
    return f"{bucket.uri}/twemoji"
