"""MLflow runs: parameters, metrics, figures. What is registered, and pulled, is the registry's business."""

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

from infra import registry_database, uris
from infra.errors import InputError, TransientError
from infra.settings import Settings
from infra.storage.folders import make_folder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run that can be written to from any process: where it is tracked, and its id."""

    tracking_uri: str = dataclasses.field(repr=False)  # may hold a password
    run_id: str

    def log(self, *, step: int, values: Mapping[str, float]) -> None:
        """Add the values of one step."""
        client = MlflowClient(self.tracking_uri)
        for name, value in values.items():
            client.log_metric(self.run_id, name, value, step=step)

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings, nested names joined by dots; MLflow keeps the first 6,000 characters of each."""
        client = MlflowClient(self.tracking_uri)
        for name, value in _flat(values):
            client.log_param(self.run_id, name, uris.masked(str(value))[:6000])

    def file(self, path: Path, folder: str | None = None) -> None:
        """Keep a figure or a table with the run, in ``folder`` of its artifacts."""
        MlflowClient(self.tracking_uri).log_artifact(self.run_id, str(path), folder)


@contextmanager
def start_run(settings: Settings, *, experiment: str, name: str) -> Iterator[Run]:
    """A run in ``experiment``, made when it is new; ended as finished or failed. Raises ``TransientError``."""
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
    """The experiment of that name, made when it is new, with its artifacts where the settings say."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, settings.artifacts_uri))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another process may have created it meanwhile
            if found is None:
                raise error
    return str(found.experiment_id)


@contextmanager
def mlflow_errors(settings: Settings) -> Iterator[None]:
    """Tell a server that does not answer as a ``TransientError``, without the password its URI may hold."""
    try:
        yield
    except (ConnectionError, MlflowException, SQLAlchemyError) as error:
        told = f"MLflow at {uris.masked(settings.tracking_uri)} does not answer: {uris.masked(str(error))}"
        raise TransientError(told) from None


def is_created(settings: Settings) -> bool:
    """Return True if the settings' store exists; one that only reads does not create it."""
    database = registry_database.path_of(settings.tracking_uri)
    return database is None or (database.exists() and database.stat().st_size > 0)


def connect(settings: Settings) -> None:
    """Point this process's MLflow at the settings' store; create or upgrade that where it is a SQLite file."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    database = registry_database.path_of(settings.tracking_uri)
    if database is not None:
        try:
            make_folder(database.parent)
        except OSError as error:
            folder = database.parent
            raise InputError(f"{folder} cannot hold a registry ({error.strerror}); name a folder as --root") from error
        registry_database.prepare(database, settings.artifacts_uri)
    mlflow.set_tracking_uri(settings.tracking_uri)
    mlflow.set_registry_uri(settings.tracking_uri)
    # MLflow has put its URI into the environment, where the next Settings, of another root perhaps, would find it.
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if configured is not None:
        os.environ["MLFLOW_TRACKING_URI"] = configured


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
