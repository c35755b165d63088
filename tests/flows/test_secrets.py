"""Passwords and signatures in URIs are used, and never stored or printed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.changing_domain import NAMES, Living
from support.fakes import LoopbackServer, Reply, WithoutRay

PASSWORDS = ("correct-horse-battery", "another-horse-battery")
SIGNATURE = "0123456789abcdef0123"


def served_list(living: Living, password: str) -> str:
    """Return the URI of a URL list with a password and a signature."""
    path = f"/list.jsonl?sig={SIGNATURE}"
    lines = "".join(json.dumps({"url": living.server.url(name)}) + "\n" for name in NAMES[:5])
    living.server.replies[path] = Reply(body=lines.encode())
    return f"http://reader:{password}@{living.server.host}{path}"


def files_with(folder: Path, word: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


def test_new_domain_stores_no_secret_of_its_list_uri(
    living_on_prefect: Living, ray: WithoutRay, capfd: pytest.CaptureFixture[str]
) -> None:
    living = living_on_prefect
    built = [living.build([], urls=served_list(living, password)) for password in PASSWORDS]
    rebuilt = living.rebuild(urls=served_list(living, PASSWORDS[0]))
    assert built[0].images.reference.rows == 5
    assert rebuilt.unchanged
    assert built[1].images.skipped, "the password is not part of the key"
    assert built[0].images.reference == built[1].images.reference
    stored = built[0].images.reference.manifest().inputs["urls"]["uri"]
    assert stored == f"http://reader:***@{living.server.host}/list.jsonl?sig=***"

    prefect = Path(os.environ["PREFECT_HOME"])
    assert files_with(prefect, f"reader:***@{living.server.host}"), "Prefect stores the parameters of the flow"
    output = "".join(capfd.readouterr())
    for secret in (*PASSWORDS, SIGNATURE):
        assert files_with(living.folder, secret) == []
        assert files_with(prefect, secret) == []
        assert secret not in output


@pytest.mark.slow
def test_failed_command_prints_and_stores_no_secret_of_its_list_uri(prefect_server: None, tmp_path: Path) -> None:
    environment = {**os.environ, "PREFECT_LOGGING_LEVEL": "INFO"}
    with LoopbackServer({}) as server:
        urls = f"http://reader:{PASSWORDS[0]}@{server.host}/absent.csv?X-Amz-Signature={SIGNATURE}"
        command = [sys.executable, "-m", "flows.cli.app", "new-domain", "shapes", "--urls", urls, "--verbose"]
        done: Any = subprocess.run(
            [*command, "--root", str(tmp_path / "data")], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 1
    assert f"http://reader:***@{server.host}/absent.csv?X-Amz-Signature=*** does not exist" in done.stderr
    for secret in (PASSWORDS[0], SIGNATURE):
        assert secret not in done.stdout + done.stderr
        assert files_with(tmp_path, secret) == []
        assert files_with(Path(os.environ["PREFECT_HOME"]), secret) == []
