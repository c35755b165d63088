"""MLflow runs: parameters, metrics, figures. What is registered, and pulled, is the registry's business."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.tracking import MlflowClient

from infra.errors import TransientError
from infra.settings import Settings, masked


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run that can be written to from any process: where it is tracked, and its id."""

    tracking_uri: str
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
            client.log_param(self.run_id, name, str(value)[:6000])

    def file(self, path: Path) -> None:
        """Keep a figure or a table with the run."""
        MlflowClient(self.tracking_uri).log_artifact(self.run_id, str(path))


@contextmanager
def start_run(settings: Settings, *, experiment: str, name: str) -> Iterator[Run]:
    """A run in ``experiment``, made when it is new; ended as finished or failed. Raises ``TransientError``."""
    connect(settings)
    client = MlflowClient(settings.tracking_uri)
    try:
        found = client.get_experiment_by_name(experiment)
        identifier = found.experiment_id if found else client.create_experiment(experiment, settings.artifacts_uri)
        run = client.create_run(identifier, run_name=name)
    except (ConnectionError, mlflow.exceptions.MlflowException) as error:
        raise TransientError(f"MLflow at {masked(settings.tracking_uri)} does not answer: {error}") from error
    try:
        yield Run(tracking_uri=settings.tracking_uri, run_id=run.info.run_id)
    except BaseException:
        client.set_terminated(run.info.run_id, "FAILED")
        raise
    client.set_terminated(run.info.run_id, "FINISHED")


def connect(settings: Settings) -> None:
    """Point this process's MLflow at the settings' store."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if settings.tracking_uri.startswith("sqlite:///"):
        Path(settings.tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(settings.tracking_uri)
    mlflow.set_registry_uri(settings.tracking_uri)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
