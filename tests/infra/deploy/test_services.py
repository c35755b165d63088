"""Tests of the commands and environments of the services; none of them is started."""

import importlib.metadata
import stat
import sys
from pathlib import Path

import pytest

from infra.deploy.services import HEARTBEAT_S, Stack, driver_environment, server_python, services
from infra.errors import StageError
from infra.settings import Settings


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "KNN_DIFFUSION_PROMOTION", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return Stack(folder=tmp_path / "stack", checkout=tmp_path, server_python=sys.executable)


def test_services_listen_on_loopback_and_keep_passwords_out_of_commands(stack: Stack, tmp_path: Path) -> None:
    found = services(stack, Settings(root=str(tmp_path), tracking="postgresql://user:secret@db/mlflow"))
    assert [one.name for one in found] == ["ray", "prefect-server", "mlflow", "worker"]
    for one in found[:3]:
        assert "127.0.0.1" in " ".join(one.command)
        assert one.port is not None
    assert not any("secret" in word for one in found for word in one.command)
    assert "secret" in found[2].environment["MLFLOW_BACKEND_STORE_URI"]
    assert "secret" not in repr(found)
    worker = found[-1].environment
    assert worker["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(HEARTBEAT_S)
    assert worker["KNN_DIFFUSION_PROMOTION"] == "event"
    assert worker["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"


def test_services_with_an_mlflow_server_start_none(stack: Stack, tmp_path: Path) -> None:
    settings = Settings(root=str(tmp_path), tracking="https://mlflow.example")
    assert [one.name for one in services(stack, settings)] == ["ray", "prefect-server", "worker"]
    assert driver_environment(stack, settings)["MLFLOW_TRACKING_URI"] == "https://mlflow.example"


def test_services_share_one_ray_token_unless_the_user_has_set_a_mode(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(root=str(tmp_path))
    head, *_, worker = services(stack, settings)
    assert stat.S_IMODE(stack.ray_token.stat().st_mode) == 0o600
    assert head.environment["RAY_AUTH_TOKEN_PATH"] == worker.environment["RAY_AUTH_TOKEN_PATH"] == str(stack.ray_token)
    token = stack.ray_token.read_text()
    services(stack, settings)
    assert stack.ray_token.read_text() == token
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    head, *_ = services(stack, settings)
    assert (head.environment["RAY_AUTH_MODE"], "RAY_AUTH_TOKEN_PATH" in head.environment) == ("disabled", False)


def test_server_python_with_a_failed_installation_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = Stack(folder=tmp_path, checkout=tmp_path)
    assert server_python(stack) == sys.executable, "the installed SQLAlchemy works"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.9")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StageError, match=r"cannot be installed .* as KNN_DIFFUSION_SERVER_PYTHON"):
        server_python(stack)
