"""The command ``serve``: what it refuses before it loads a model."""

import socket
from pathlib import Path

import pytest
from support.command import refused, run

from tasks.serve.api.keys import VARIABLE


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "service.example"])  # noqa: S104
def test_serve_on_another_interface_without_keys_is_refused(host: str) -> None:
    refused(run("serve", "--host", host), "--host is reachable by others", VARIABLE, "--keys-file", "--allow-anonymous")


def test_serve_refuses_unusable_options_before_it_loads_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(run("serve", "--root", str(tmp_path / "none")), "--root does not exist")
    refused(run("serve", "--device", "tpu"), "--device is unknown: tpu")
    refused(run("serve", "--keys-file", str(tmp_path / "none")), "the file of API keys cannot be read")
    refused(run("serve", "--database", "birds", "--database", "birds"), "database is given twice: birds")
    monkeypatch.setenv(VARIABLE, "short")
    refused(run("serve"), "an API key is shorter than 16 characters")
    assert "short" not in run("serve").stderr.replace("shorter", "")
    assert run("serve", "--port", "65536").exit_code == 2


def test_serve_on_a_used_port_is_refused_before_it_loads_a_model() -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        refused(run("serve", "--port", port), "--host and --port cannot be used", port, "give another port")
