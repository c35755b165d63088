"""Tests of the temporary Prefect server of a command."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from infra.prefect_server import prefect_api


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("command") / "prefect"


@pytest.mark.slow
def test_prefect_api_answers_only_its_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)  # an earlier test of this process may have started a server
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "user:of-another-server")
    monkeypatch.setenv("PREFECT_HOME", str(home))
    with prefect_api(home):
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
