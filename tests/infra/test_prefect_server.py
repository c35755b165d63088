"""Tests of the temporary Prefect server of a command."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from infra.errors import StageError
from infra.prefect_server import prefect_api


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("command") / "missing" / "prefect"


@pytest.mark.slow
def test_prefect_api_answers_only_its_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)  # an earlier test of this process may have started a server
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "user:of-another-server")
    monkeypatch.setenv("PREFECT_HOME", str(home))
    with prefect_api():
        url, secret = os.environ["PREFECT_API_URL"], os.environ["PREFECT_API_AUTH_STRING"]
        assert url.startswith("http://127.0.0.1:")
        assert httpx.post(f"{url}/flows/filter", json={}).status_code == 401
        assert httpx.post(f"{url}/flows/filter", json={}, auth=("admin", "admin")).status_code == 401
        name, _, password = secret.partition(":")
        assert httpx.post(f"{url}/flows/filter", json={}, auth=(name, password)).json() == []
        running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert secret not in running
        read = "from prefect import get_client; print(get_client(sync_client=True).read_flows())"
        child = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True)
        assert child.stdout.strip() == "[]"
    assert os.environ["PREFECT_API_AUTH_STRING"] == "user:of-another-server"
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "prefect.db").stat().st_mode & 0o777 == 0o600


def test_prefect_api_that_does_not_start_names_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setattr("infra.prefect_server._SERVER", "print('starting'); int('a'); print('stopped')")
    message = r"does not start \(ValueError: invalid literal.*; set PREFECT_API_URL"
    with pytest.raises(StageError, match=message), prefect_api():
        pass


EVENTS = """
from infra.prefect_server import prefect_api
with prefect_api():
    from prefect.events import emit_event
    for number in range(20):
        emit_event("knn-diffusion.test", resource={"prefect.resource.id": f"test.{number}"})
"""


@pytest.mark.slow
def test_prefect_api_sends_events_before_its_server_ends(tmp_path: Path) -> None:
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_LOGGING_LEVEL": "CRITICAL"}
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run([sys.executable, "-c", EVENTS], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
