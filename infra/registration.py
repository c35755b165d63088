"""Creation of a registered version: its model, run, description and figures."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient

from infra import artifacts, storage
from infra.registry_tags import DIGEST_TAG, FOLDER_TAG, PACKAGE_TAG, RUN_TAG, run_page
from infra.settings import Settings
from infra.storage.errors import storage_errors
from infra.tracking import experiment_id
from infra.wheel import Package

_FIGURES = "figures"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Presentation:
    """Presentation of a version in MLflow.

    Attributes:
        description: Markdown. Links to the run and to the figures are added.
        input_example: Example of an input.
        metrics: Metrics of the run.
        figures: Function that writes images into a folder and returns their paths; they are stored with the run.
    """

    description: str = ""
    input_example: Any = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    figures: Callable[[Path], Sequence[Path]] = lambda folder: ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NewVersion:
    """Content of a version; see :meth:`infra.registry.Registry.register`."""

    name: str
    folder_uri: str
    manifest: artifacts.Manifest
    tags: Mapping[str, str]
    script: Path
    signature: ModelSignature
    files: Mapping[str, Path]
    model_config: Mapping[str, Any]
    run_id: str | None
    presentation: Presentation
    package: Package


def create_version(client: MlflowClient, settings: Settings, new: NewVersion) -> str:
    """Log the model in its run, register it, and return the number of the version."""
    files, run_id = dict(new.files), new.run_id or _new_run(client, settings, new.name)
    if new.package.wheel is not None:
        files["wheel"] = new.package.wheel
    with storage.scratch() as scratch:
        path = scratch / artifacts.MANIFEST
        path.write_text(new.manifest.to_json())
        with mlflow.start_run(run_id=run_id), storage_errors(settings.artifacts_uri):
            info = mlflow.pyfunc.log_model(
                name=new.name.replace(".", "-"),
                python_model=str(new.script),
                artifacts={"manifest": str(path), **{key: str(value) for key, value in files.items()}},
                signature=new.signature,
                pip_requirements=[new.package.requirement],
                model_config=dict(new.model_config),
                input_example=new.presentation.input_example,
            )
            for metric, value in new.presentation.metrics.items():
                client.log_metric(info.run_id, metric, value)
            figures = new.presentation.figures(scratch)
            for figure in figures:
                client.log_artifact(info.run_id, str(figure), _FIGURES)
        run = client.get_run(info.run_id)
    with contextlib.suppress(MlflowException):  # the model exists already
        client.create_registered_model(new.name)
    digest = new.package.sha256
    created = client.create_model_version(
        new.name,
        info.model_uri,
        run_id=info.run_id,
        model_id=info.model_id,
        description=_described(new.presentation.description, run, [figure.name for figure in figures]),
        tags={
            **new.tags,
            RUN_TAG: run_page(run, settings),
            DIGEST_TAG: new.manifest.digest,
            FOLDER_TAG: new.folder_uri,
            **({} if digest is None else {PACKAGE_TAG: digest}),
        },
    )
    return str(created.version)


def _new_run(client: MlflowClient, settings: Settings, name: str) -> str:
    experiment = experiment_id(client, "register", settings)
    return str(client.create_run(experiment, run_name=name).info.run_id)


def _described(text: str, run: Run, figures: Sequence[str]) -> str | None:
    """Add links to a description. They are relative to the server's address, which registration need not know."""
    if not text:
        return None
    page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    images = "".join(
        f"\n![{name}](get-artifact?path={_FIGURES}/{name}&run_uuid={run.info.run_id})\n" for name in figures
    )
    return f"{text}\n[Run]({page}) with metrics and figures\n{images}"
