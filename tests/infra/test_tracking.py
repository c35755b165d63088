"""Tests of MLflow runs: parameters, metrics, files and unreachable servers."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Run as StoredRun
from mlflow.tracking import MlflowClient

from infra.errors import TransientError
from infra.settings import Settings
from infra.tracking import Run, connect, experiment_id, start_run


def stored(run: Run) -> StoredRun:
    return MlflowClient(run.tracking_uri).get_run(run.run_id)


def history(run: Run, metric: str) -> list[tuple[int, float]]:
    values = MlflowClient(run.tracking_uri).get_metric_history(run.run_id, metric)
    return [(value.step, value.value) for value in values]


def test_log_stores_metrics_by_step(mlflow_settings: Settings) -> None:
    with start_run(mlflow_settings, experiment="twemoji", name="train") as run:
        assert run.tracking_uri == mlflow_settings.tracking_uri
        assert stored(run).info.status == "RUNNING"
        run.log(step=10, values={"loss": 0.5, "images_per_s": 120})
        run.log(step=20, values={"loss": 0.25})
    assert history(run, "loss") == [(10, 0.5), (20, 0.25)]
    assert history(run, "images_per_s") == [(10, 120.0)]
    finished = stored(run)
    assert (finished.info.run_name, finished.info.status) == ("train", "FINISHED")
    assert finished.data.metrics == {"loss": 0.25, "images_per_s": 120.0}
    assert finished.info.end_time >= finished.info.start_time


def test_params_stores_nested_settings_with_dotted_names(mlflow_settings: Settings) -> None:
    with start_run(mlflow_settings, experiment="twemoji", name="train") as run:
        run.params({"k": 10, "train": {"lr": 1e-4, "ema": {"halflife_images": None}}, "empty": {}, "hosts": ("a", "b")})
        run.params({"long": "x" * 7000})
    params = stored(run).data.params
    assert params.pop("long") == "x" * 6000
    assert params == {"k": "10", "train.lr": "0.0001", "train.ema.halflife_images": "None", "hosts": "('a', 'b')"}


def test_file_stores_files_in_the_artifact_store(mlflow_settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "samples.png").write_bytes(b"\x89PNG")
    with start_run(mlflow_settings, experiment="twemoji", name="draw") as run:
        run.file(tmp_path / "samples.png")
        run.file(tmp_path / "samples.png", "samples")
    (tmp_path / "samples.png").unlink()
    copies = list(Path(mlflow_settings.artifacts_uri).rglob("samples.png"))
    assert [path.read_bytes() for path in copies] == [b"\x89PNG"] * 2
    client = MlflowClient(run.tracking_uri)
    assert [entry.path for entry in client.list_artifacts(run.run_id)] == ["samples", "samples.png"]
    assert [entry.path for entry in client.list_artifacts(run.run_id, "samples")] == ["samples/samples.png"]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), SystemExit(3)])
def test_start_run_with_an_error_marks_the_run_failed_and_keeps_metrics(
    error: BaseException, mlflow_settings: Settings
) -> None:
    runs = []
    with (
        pytest.raises(type(error)) as caught,
        start_run(mlflow_settings, experiment="twemoji", name="train") as run,
    ):
        runs.append(run)
        run.log(step=1, values={"loss": 2.0})
        raise error
    assert caught.value is error
    failed = stored(runs[0])
    assert failed.info.status == "FAILED"
    assert failed.data.metrics == {"loss": 2.0}


def test_start_run_reuses_an_experiment(mlflow_settings: Settings) -> None:
    def experiment_of(name: str) -> str:
        with start_run(mlflow_settings, experiment=name, name="a") as run:
            return str(stored(run).info.experiment_id)

    first = experiment_of("twemoji")
    assert experiment_of("twemoji") == first
    assert experiment_of("stickers") != first
    client = MlflowClient(mlflow_settings.tracking_uri)
    assert len(client.search_runs([first])) == 2
    assert client.get_experiment(first).artifact_location == mlflow_settings.artifacts_uri


def test_experiment_id_created_concurrently_by_another_process_is_returned(mlflow_settings: Settings) -> None:
    class Late(MlflowClient):
        """Client whose first lookup precedes the creation of the experiment by another process."""

        has_looked = False

        def get_experiment_by_name(self, name: str) -> Any:
            first, self.has_looked = not self.has_looked, True
            return None if first else super().get_experiment_by_name(name)

    created = MlflowClient(mlflow_settings.tracking_uri).create_experiment("twemoji")
    assert experiment_id(Late(mlflow_settings.tracking_uri), "twemoji", mlflow_settings) == created


def test_start_run_in_another_run_is_independent(mlflow_settings: Settings) -> None:
    with (
        start_run(mlflow_settings, experiment="twemoji", name="outer") as outer,
        start_run(mlflow_settings, experiment="twemoji", name="inner") as inner,
    ):
        outer.log(step=1, values={"loss": 1.0})
        inner.log(step=1, values={"loss": 2.0})
    assert stored(outer).data.metrics == {"loss": 1.0}
    assert stored(inner).data.metrics == {"loss": 2.0}
    assert mlflow.active_run() is None


def test_run_logs_from_another_process(mlflow_settings: Settings) -> None:
    with start_run(mlflow_settings, experiment="twemoji", name="train") as run:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        worker = "import pickle, sys; pickle.load(sys.stdin.buffer).log(step=7, values={'loss': 0.125})"
        subprocess.run(
            [sys.executable, "-c", worker],
            input=pickle.dumps(run),
            env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
            check=True,
        )
    assert history(run, "loss") == [(7, 0.125)]


def test_connect_creates_the_folder_of_a_new_database(
    tmp_path: Path, mlflow_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/not/there/yet/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    connect(Settings(root=mlflow_settings.root))
    assert (tmp_path / "not/there/yet").is_dir()
    assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == uri


def test_start_run_without_a_server_raises_transient_error(
    mlflow_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:  # bound but not listening
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with (
            pytest.raises(TransientError) as caught,
            start_run(Settings(), experiment="twemoji", name="train"),
        ):
            pytest.fail("there is no run")
    assert str(caught.value).startswith(f"MLflow at {uri} does not answer: ")


class RecordingClient:
    """Fake of MLflow's client without experiments. ``locations`` lists the artifact stores of created ones."""

    def __init__(self) -> None:
        self.locations: list[str | None] = []

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str, artifact_location: str | None) -> str:
        self.locations.append(artifact_location)
        return "1"


@pytest.mark.parametrize(
    ("given", "location"),
    [
        ({"MLFLOW_TRACKING_URI": "http://mlflow:5000"}, None),
        ({"MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_ARTIFACTS": "s3://bucket/mlflow"}, "s3://bucket/mlflow"),
        ({"MLFLOW_TRACKING_URI": "sqlite:////tmp/mlflow.db"}, "/data/mlflow"),
    ],
)
def test_new_experiment_on_a_server_leaves_the_artifact_store_to_it(
    given: dict[str, str], location: str | None
) -> None:
    client = RecordingClient()
    experiment_id(client, "register", Settings(root="/data", **given))  # type: ignore[arg-type]
    assert client.locations == [location]
