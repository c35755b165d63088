"""Tests of MLflow's store on PostgreSQL: a real server, an unreachable one and a missing driver."""

import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from support.postgres import is_installed, postgres_server

from infra import artifacts, database_server
from infra.errors import InputError, KNNDiffusionError, TransientError
from infra.registry import Registry
from infra.settings import Settings
from infra.tracking import connect, start_run

SCRIPT = "import mlflow\nmlflow.models.set_model(mlflow.pyfunc.PythonModel())\n"
SIGNATURE = ModelSignature(inputs=Schema([ColSpec(DataType.string, "prompt")]))


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Address of a new cluster on a free loopback port."""
    if not is_installed():
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    pytest.importorskip("psycopg", reason="the extra postgres is not installed")
    with postgres_server() as address:
        yield address


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
