"""Tests of MLflow's SQLite file: kills, full disks, concurrent creation and other versions of MLflow."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from alembic import command
from mlflow.store.db import utils
from mlflow.store.tracking.dbmodels.initial_models import Base
from mlflow.tracking import MlflowClient
from sqlalchemy import create_engine

from infra import registry_database
from infra.errors import InputError, IntegrityError, NotFoundError, TransientError
from infra.registry import Registry
from infra.settings import Settings
from infra.tracking import start_run

OLDER = "bda7b8c39065"  # schema revision of MLflow 2.17, with the tables of runs
CONNECT = "from infra.settings import Settings; from infra.tracking import connect; connect(Settings())"
START_RUN = (
    "from infra.settings import Settings; from infra.tracking import start_run\n"
    "with start_run(Settings(), experiment='shapes', name='a'): pass"
)
LIMITED = (
    "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
    "from infra.settings import Settings; from infra.tracking import connect, mlflow_errors\n"
    "with mlflow_errors(Settings()): connect(Settings())"
)


@pytest.fixture
def settings(mlflow_settings: Settings) -> Settings:
    """Settings with a root that has no registry yet."""
    shutil.rmtree(mlflow_settings.root)
    return mlflow_settings


def database_of(settings: Settings) -> Path:
    return Path(settings.root) / "mlflow.db"


def start_process(settings: Settings, code: str = CONNECT) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "KNN_DIFFUSION_ROOT": settings.root}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


def execute(database: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def create_older(database: Path) -> None:
    """Create a database with the schema of an earlier MLflow, with one run."""
    database.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(f"sqlite:///{database}")
    Base.metadata.create_all(engine)
    config = utils._get_alembic_config(str(engine.url))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, OLDER)
    engine.dispose()
    execute(
        database,
        "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) VALUES (0, 'Default', 'x', "
        "'active')",
        "INSERT INTO runs (run_uuid, name, user_id, source_type, status, lifecycle_stage, experiment_id, artifact_uri, "
        "start_time) VALUES ('r1', 'kept', 'someone', 'LOCAL', 'FINISHED', 'active', 0, 'x', 1)",
    )


def is_usable(settings: Settings) -> bool:
    """Return True if a run can be logged and no temporary files are left."""
    with start_run(settings, experiment="shapes", name="a") as run:
        run.log(step=1, values={"loss": 1.0})
    left = {path.name for path in Path(settings.root).iterdir()} - {"mlflow.db.lock"}
    return left == {"mlflow.db"} and not list(Path(settings.root).glob("mlflow.db-*"))


@pytest.mark.slow
def test_prepare_completes_after_kills_during_creation(settings: Settings) -> None:
    for pause_s in (0.0, 0.5):
        running = start_process(settings)
        while not list(Path(settings.root).glob("mlflow.db*[!k]")) and running.poll() is None:
            time.sleep(0.005)
        time.sleep(pause_s)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        assert running.returncode == -signal.SIGKILL
    assert is_usable(settings)


@pytest.mark.slow
def test_prepare_in_three_processes_creates_one_database(settings: Settings) -> None:
    running = [start_process(settings, START_RUN) for _ in range(3)]
    for one in running:
        assert "Traceback" not in one.communicate()[1]
        assert one.returncode == 0
    client = MlflowClient(settings.tracking_uri)
    (experiment,) = client.search_experiments(filter_string="name = 'shapes'")
    assert len(client.search_runs([experiment.experiment_id])) == 3
    assert is_usable(settings)


def test_prepare_on_a_full_disk_leaves_no_files(settings: Settings) -> None:
    limited = start_process(settings, LIMITED)
    assert "Error: " in limited.communicate()[1].splitlines()[-1]
    assert limited.returncode == 1
    assert {path.name for path in Path(settings.root).iterdir()} <= {"mlflow.db.lock"}


@pytest.mark.parametrize("state", ["no revision", "empty file", "half a migration"])
def test_prepare_replaces_an_incomplete_database_without_data(
    state: str, settings: Settings, migrated_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: list[Path] = []

    def create(database: Path, artifacts_uri: str) -> None:
        """Create an empty database as MLflow's migrations do, which take seconds."""
        assert database.stat().st_size == 0
        created.append(database)
        database.write_bytes(migrated_database.read_bytes())

    monkeypatch.setattr(registry_database, "_initialize", create)
    database = database_of(settings)
    database.parent.mkdir()
    match state:
        case "no revision":
            shutil.copy(migrated_database, database)
            execute(database, "DELETE FROM alembic_version")
        case "half a migration":  # the tables are newer than the revision
            shutil.copy(migrated_database, database)
            execute(database, f"UPDATE alembic_version SET version_num = '{OLDER}'")  # noqa: S608
        case _:
            database.touch()
    assert is_usable(settings)
    assert len(created) == 1


def test_prepare_of_an_older_database_keeps_its_runs(settings: Settings) -> None:
    database = database_of(settings)
    create_older(database)
    before = database.stat().st_ino
    assert is_usable(settings)
    assert database.stat().st_ino != before
    assert MlflowClient(settings.tracking_uri).get_run("r1").info.run_name == "kept"


def test_prepare_of_a_database_that_cannot_be_upgraded_does_not_change_it(settings: Settings) -> None:
    database = database_of(settings)
    create_older(database)
    execute(database, "DELETE FROM alembic_version")
    before = database.read_bytes()
    with pytest.raises(IntegrityError, match="holds data and cannot be upgraded") as caught:
        registry_database.prepare(database, settings.artifacts_uri)
    assert "\n" not in str(caught.value)
    assert database.read_bytes() == before
    assert not database.with_name("mlflow.db.new").exists()


def test_prepare_of_a_newer_database_raises_input_error(settings: Settings, migrated_database: Path) -> None:
    database = database_of(settings)
    database.parent.mkdir()
    shutil.copy(migrated_database, database)
    execute(database, "UPDATE alembic_version SET version_num = 'f00d'")
    with pytest.raises(InputError, match="install the newer MLflow"):
        registry_database.prepare(database, settings.artifacts_uri)


def test_prepare_of_another_file_raises_input_error(settings: Settings) -> None:
    database_of(settings).parent.mkdir()
    database_of(settings).write_text("something else" * 100)
    with pytest.raises(InputError, match="is not a readable SQLite database"):
        registry_database.prepare(database_of(settings), settings.artifacts_uri)


def test_prepare_of_a_locked_database_raises_transient_error(
    settings: Settings, migrated_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_database, "_BUSY_S", 0.1)
    database_of(settings).parent.mkdir()
    shutil.copy(migrated_database, database_of(settings))
    with contextlib.closing(sqlite3.connect(database_of(settings))) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(TransientError, match="database is locked"):
            registry_database.prepare(database_of(settings), settings.artifacts_uri)


def test_prepare_during_another_prepare_raises_transient_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_database, "LOCK_S", 0.1)
    database_of(settings).parent.mkdir()
    with (
        registry_database.FileLock(f"{database_of(settings)}.lock"),
        pytest.raises(TransientError, match="locked by another process"),
    ):
        registry_database.prepare(database_of(settings), settings.artifacts_uri)


def test_prepare_creates_a_file_without_access_for_other_users(settings: Settings) -> None:
    database_of(settings).parent.mkdir()
    registry_database.prepare(database_of(settings), settings.artifacts_uri)
    assert database_of(settings).stat().st_mode & 0o007 == 0


def test_registry_without_a_database_is_empty_and_creates_no_file(settings: Settings) -> None:
    registry = Registry(settings)
    assert registry.versions("database") == []
    with pytest.raises(NotFoundError, match="registered: none"):
        registry.pull("shapes", kind="database")
    assert not Path(settings.root).exists()


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////a/mlflow.db", Path("/a/mlflow.db")),
        ("sqlite:///mlflow.db?timeout=3", Path("mlflow.db")),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("postgresql://host/mlflow", None),
        ("http://127.0.0.1:5000", None),
    ],
)
def test_path_of_returns_the_file_of_a_sqlite_uri(uri: str, path: Path | None) -> None:
    assert registry_database.path_of(uri) == path
