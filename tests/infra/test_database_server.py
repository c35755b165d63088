"""Tests of MLflow's store on PostgreSQL: a real server, an unreachable one and a missing driver."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from infra import artifacts, database_server
from infra.errors import InputError, KNNDiffusionError, TransientError
from infra.registry import Registry
from infra.settings import Settings
from infra.tracking import connect, start_run

SCRIPT = "import mlflow\nmlflow.models.set_model(mlflow.pyfunc.PythonModel())\n"
SIGNATURE = ModelSignature(inputs=Schema([ColSpec(DataType.string, "prompt")]))


def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, which Debian does not put on the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def unprivileged() -> pwd.struct_passwd | None:
    """Return the user that runs the server, because PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres")
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("nobody")
    return None


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Address of a new cluster on a free loopback port."""
    folder, user = programs(), unprivileged()
    if folder is None or user is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    pytest.importorskip("psycopg", reason="the extra postgres is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="pg-") as base:  # pytest's own folders are closed to other users
        identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        os.chown(base, user.pw_uid, user.pw_gid)
        options = f"-h 127.0.0.1 -p {port} -k {base} -c fsync=off"
        control = [str(folder / "pg_ctl"), "--pgdata", f"{base}/data", "--silent", "--wait", "--log", f"{base}/log"]
        initialise = [str(folder / "initdb"), "--pgdata", f"{base}/data", "--username=keeper", "--auth=trust"]
        for command in ([*initialise, "--no-sync"], [*control, "--options", options, "start"]):
            subprocess.run(command, cwd=base, check=True, stdout=subprocess.DEVNULL, **identity)  # type: ignore[call-overload]
        try:
            yield f"keeper@127.0.0.1:{port}/postgres"
        finally:
            stop = [*control, "--mode=immediate", "stop"]
            subprocess.run(stop, cwd=base, check=True, stdout=subprocess.DEVNULL, **identity)  # type: ignore[call-overload]


@pytest.fixture
def disconnected() -> Iterator[None]:
    """Disconnect MLflow after the test."""
    yield
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    mlflow.set_registry_uri(None)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_registry_on_postgresql_registers_and_reads_a_version(
    scheme: str, postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disconnected: None
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://{postgres}")
    settings = Settings(root=str(tmp_path / "root"))
    (tmp_path / "script.py").write_text(SCRIPT)
    builder = artifacts.ArtifactBuilder(f"{settings.root}/birds", "database", inputs={}, config={"scheme": scheme})
    builder.commit([], info={})
    name = f"knn-database.{scheme.replace('+', '-')}"
    registered = Registry(settings).register(
        name, builder.uri, script=tmp_path / "script.py", signature=SIGNATURE, tags={"rows": "0"}
    )
    pulled = Registry(settings).pull(f"models:/{name}@champion", kind="database")
    assert (pulled.version, pulled.folder_uri) == (registered.version, builder.uri)
    with start_run(settings, experiment="birds", name="train") as run:
        run.log(step=1, values={"loss": 0.5})


def failure(uri: str, monkeypatch: pytest.MonkeyPatch) -> KNNDiffusionError:
    """Return the error of a connection, which must be one line without the password, within 10 seconds."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started = time.monotonic()
    with pytest.raises(KNNDiffusionError) as caught:
        connect(Settings())
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)
    assert "hunter2hunter2" not in str(caught.value)
    return caught.value


def test_connect_to_a_closed_port_raises_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    with socket.socket() as unused:  # bound but not listening
        unused.bind(("127.0.0.1", 0))
        uri = f"postgresql://keeper:hunter2hunter2@127.0.0.1:{unused.getsockname()[1]}/mlflow"
        error = failure(uri, monkeypatch)
    assert isinstance(error, TransientError)
    assert "check that the server runs" in str(error)
    assert "Connection refused" in str(error)


@pytest.mark.slow
def test_connect_to_a_server_that_does_not_answer_raises_within_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = failure(f"postgresql://keeper:hunter2hunter2@127.0.0.1:{silent.getsockname()[1]}/mlflow", monkeypatch)
    assert isinstance(error, TransientError)
    assert "timeout" in str(error)


@pytest.mark.parametrize(
    ("scheme", "advice"),
    [("postgresql", "pip install 'knn-diffusion[postgres]'"), ("mysql+absent", "install it for mysql+absent")],
)
def test_connect_without_the_driver_raises_error_that_says_what_to_install(
    scheme: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as if it were not installed
    error = failure(f"{scheme}://keeper:hunter2hunter2@127.0.0.1/mlflow", monkeypatch)
    assert isinstance(error, InputError)
    assert advice in str(error)


@pytest.mark.parametrize("uri", ["sqlite:////tmp/mlflow.db", "http://127.0.0.1:1", "https://127.0.0.1:1"])
def test_check_ignores_files_and_mlflow_servers(uri: str) -> None:
    database_server.check(uri)


def test_check_with_a_malformed_uri_raises_input_error() -> None:
    with pytest.raises(InputError, match="not a database URI"):
        database_server.check("postgresql+psycopg://host:port/name")
