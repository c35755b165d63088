"""MLflow runs: parameters, metrics and figures. Models are registered by ``infra.registry``."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from infra import database_server, registry_database, uris
from infra.errors import InputError, TransientError
from infra.quiet import set_quiet
from infra.settings import Settings
from infra.storage.folders import make_folder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """MLflow run that any process can write to: tracking URI and id."""

    tracking_uri: str = dataclasses.field(repr=False)  # may hold a password
    run_id: str

    def log(self, *, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of one step."""
        client = MlflowClient(self.tracking_uri)
        for name, value in values.items():
            client.log_metric(self.run_id, name, value, step=step)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters, with nested names joined by dots. Values are truncated at MLflow's 6,000 characters."""
        client = MlflowClient(self.tracking_uri)
        for name, value in _flat(values):
            client.log_param(self.run_id, name, uris.masked(str(value))[:6000])

    def file(self, path: Path, folder: str | None = None) -> None:
        """Store a figure or a table with the run, in ``folder`` of its artifacts."""
        MlflowClient(self.tracking_uri).log_artifact(self.run_id, str(path), folder)


@contextmanager
def start_run(settings: Settings, *, experiment: str, name: str) -> Iterator[Run]:
    """Start a run in ``experiment``, which is created if needed, and end it as finished or failed.

    Raises ``TransientError`` if the tracking server does not answer.
    """
    with mlflow_errors(settings):
        connect(settings)
        client = MlflowClient(settings.tracking_uri)
        run = client.create_run(experiment_id(client, experiment, settings), run_name=name)
    try:
        yield Run(tracking_uri=settings.tracking_uri, run_id=run.info.run_id)
    except BaseException:
        client.set_terminated(run.info.run_id, "FAILED")
        raise
    client.set_terminated(run.info.run_id, "FINISHED")


def experiment_id(client: MlflowClient, name: str, settings: Settings) -> str:
    """Return the id of an experiment. If needed, create it with the artifact store of the settings.

    An MLflow server chooses the store itself unless ``MLFLOW_ARTIFACTS`` is set. It then serves the files as a proxy
    (``mlflow-artifacts:``), so machines that do not mount the root can read them.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, _artifact_location(settings)))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another process may have created it in between
            if found is None:
                raise error
    return str(found.experiment_id)


def _artifact_location(settings: Settings) -> str | None:
    """Return the artifact store for a new experiment; None leaves the choice to the MLflow server."""
    is_server = settings.tracking_uri.startswith(("http://", "https://"))
    return None if is_server and settings.artifacts is None else settings.artifacts_uri


@contextmanager
def mlflow_errors(settings: Settings) -> Iterator[None]:
    """Raise ``TransientError`` for errors of MLflow, without the password that its URI may contain."""
    try:
        yield
    except (ConnectionError, MlflowException, SQLAlchemyError) as error:
        message = f"MLflow at {uris.masked(settings.tracking_uri)} does not answer: {uris.masked(str(error))}"
        raise TransientError(message) from None


def is_created(settings: Settings) -> bool:
    """Return True if the settings' store exists, so that readers need not create it."""
    database = registry_database.path_of(settings.tracking_uri)
    return database is None or (database.exists() and database.stat().st_size > 0)


def connect(settings: Settings) -> None:
    """Connect this process's MLflow to the settings' store. A SQLite file is created or upgraded if needed.

    Raises:
        InputError: The store cannot be opened as configured, for example because its driver is not installed.
        TransientError: A database server cannot be reached, or another process locks the SQLite file.
    """
    set_quiet()
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    database = registry_database.path_of(settings.tracking_uri)
    if database is not None:
        try:
            make_folder(database.parent)
        except OSError as error:
            folder = database.parent
            raise InputError(
                f"registry cannot be created in {folder}: {error.strerror}; choose another folder as --root"
            ) from error
        registry_database.prepare(database, settings.artifacts_uri)
    database_server.check(settings.tracking_uri)
    mlflow.set_tracking_uri(settings.tracking_uri)
    mlflow.set_registry_uri(settings.tracking_uri)
    # MLflow writes its URI to the environment. A later Settings object, perhaps of another root, would read it there.
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if configured is not None:
        os.environ["MLFLOW_TRACKING_URI"] = configured


def registry_client(settings: Settings) -> MlflowClient:
    """Return a client of the settings' store, after :func:`connect`, which creates the store if it does not exist."""
    connect(settings)
    return MlflowClient(settings.tracking_uri, settings.tracking_uri)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
