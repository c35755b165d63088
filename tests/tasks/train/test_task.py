"""Training stage with one worker in the calling process instead of Ray."""

import dataclasses
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from mlflow.exceptions import MlflowException
from PIL import Image
from support import tiny_models, tiny_training
from support.tiny_training import COUNT
from support.training_configs import (
    CODES,
    LATENTS,
    SHORT,
    SMALL,
    UNET,
    VQ_LATENTS,
    WITH_IMAGES,
    autoencoders,
    configured,
    save_generator,
)

from infra.compute import preemption, ray_train
from infra.errors import IntegrityError
from model.images import image_to_array
from model.networks.build import config_of_network
from model.networks.editor import is_editor
from model.pipeline import KNNDiffusionPipeline
from model.training.loop import InterruptedTrainingError
from tasks.references.domain_folder import DomainFolder
from tasks.references.generator import generator_folder
from tasks.references.types import Generator, StageResult
from tasks.train import metrics, worker
from tasks.train.inputs import TrainingInputs
from tasks.train.setup import build_setup
from tasks.train.task import train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    return tiny_training.stored_inputs(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the worker function in this process."""

    def run(loop: Callable[[dict[str, Any]], None], config: dict[str, Any], **_: Any) -> None:
        loop(config)

    monkeypatch.setattr(ray_train, "train", run)
    monkeypatch.setattr(ray_train, "worker_rank", lambda: (0, 1))


class Run:
    """Tracked run in memory."""

    def __init__(self) -> None:
        self.values: list[tuple[int, dict[str, float]]] = []
        self.files: dict[str, bytes] = {}

    def log(self, *, step: int, values: dict[str, float]) -> None:
        self.values.append((step, dict(values)))

    def file(self, path: Path, folder: str | None = None) -> None:
        self.files[f"{folder}/{path.name}"] = path.read_bytes()


def trained(inputs: TrainingInputs, base: Path, *, run: Any = None, **changes: Any) -> StageResult[Generator]:
    return train(inputs, DomainFolder(uri=str(base), cache=base / "cache"), configured(**changes), run=run)


def opened(outcome: StageResult[Generator], base: Path) -> KNNDiffusionPipeline:
    return KNNDiffusionPipeline.open(generator_folder(outcome.reference, base / "cache"))


@pytest.mark.parametrize(
    "kind",
    ["transformer", "unet", "editor", "images", "editor with images", "latents", "latents of a VQModel", "codes"],
)
@pytest.mark.usefixtures("single_process")
def test_train_saves_pipeline_that_generates_for_every_network(
    inputs: TrainingInputs, tmp_path: Path, kind: str
) -> None:
    folders = autoencoders(tmp_path)
    changes: dict[str, Any] = {
        "transformer": {"network": SMALL},
        "unet": {"network": UNET},
        "editor": {"network": SMALL, "editing": True},
        "images": {"network": WITH_IMAGES},
        "editor with images": {"network": WITH_IMAGES, "editing": True},
        "latents": {"network": LATENTS, "autoencoder": folders["kl"], "image_size": 16},
        "latents of a VQModel": {"network": VQ_LATENTS, "autoencoder": folders["vq"], "image_size": 16},
        "codes": {"network": CODES, "autoencoder": folders["vq"], "image_size": 16},
    }[kind]
    run = Run()
    outcome = trained(inputs, tmp_path, run=run, **changes)

    info = outcome.reference.manifest().info
    assert info["images_seen"] == 24
    assert [images for images, _ in run.values] == [8, 16, 24]
    assert set(run.values[0][1]) == {"loss", "learning_rate", "images_per_s", "model_flops_utilisation"}
    assert list(run.files) == ["samples/000000024.png"]
    with Image.open(io.BytesIO(run.files["samples/000000024.png"])) as sheet:
        assert sheet.size == (4 * 2 * 16, 2 * 16), "five images of the first shard, each next to the generated one"
        cells = np.asarray(sheet).reshape(2, 16, 8, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, 16, 16, 3)
    if changes["network"] in (SMALL, UNET):
        images = [image_to_array(tiny_training.png_image(number), 16) for number in range(5)]
        assert {image.tobytes() for image in images} == {cell.tobytes() for cell in cells[:10:2]}
    assert (cells[10:] == 255).all()
    pipeline = opened(outcome, tmp_path)
    assert is_editor(pipeline.transformer) == ("editor" in kind)
    assert config_of_network(pipeline.transformer, "velocity") == changes["network"]
    assert pipeline.config.neighbours == 2
    pipeline.swap_database(tiny_models.database(tmp_path / "db", tiny_models.unit_rows(COUNT)))
    query = torch.from_numpy(tiny_models.unit_rows(2)).float()
    generated = pipeline(query, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in generated] == [(16, 16)] * 2


@pytest.mark.usefixtures("single_process")
def test_train_resumes_from_checkpoint_saved_on_stop_request(
    inputs: TrainingInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = trained(inputs, tmp_path / "whole", network=SMALL).reference.manifest()
    stops = iter([False, False, True])
    monkeypatch.setattr(preemption, "stop_requested", lambda: next(stops))
    with pytest.raises(InterruptedTrainingError, match="stopped after 12 images"):
        trained(inputs, tmp_path / "broken", network=SMALL)
    (folder,) = (tmp_path / "broken").glob("generator/*/checkpoints/shards")
    assert [path.stem for path in sorted(folder.iterdir())] == ["000000002", "000000003"]
    monkeypatch.setattr(preemption, "stop_requested", lambda: False)
    resumed = trained(inputs, tmp_path / "broken", network=SMALL).reference.manifest()
    assert resumed.digest == uninterrupted.digest


@pytest.mark.parametrize("has_values", [True, False])
@pytest.mark.usefixtures("single_process")
def test_train_resumes_after_last_step_with_metrics_of_checkpoint(
    inputs: TrainingInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_values: bool
) -> None:
    run = Run()
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(worker, "save_pipeline", None)
        trained(inputs, tmp_path, run=run, network=SMALL)
    if not has_values:  # as written by an earlier release
        (*_, marker) = sorted(tmp_path.glob("generator/*/checkpoints/shards/*.json"))
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"info": {"step": 6}}))
    outcome = trained(inputs, tmp_path, run=run, network=SMALL)
    info = outcome.reference.manifest().info
    assert [images for images, _ in run.values] == [8, 16, 24], "no step was repeated"
    last = run.values[-1][1] if has_values else {}
    assert {name: value for name, value in info.items() if name in run.values[-1][1]} == last
    assert outcome.note.startswith("24 images seen, ") == has_values
    assert ("loss" in outcome.note) == has_values


@pytest.mark.usefixtures("single_process")
def test_train_resumes_from_previous_checkpoint_if_newest_is_damaged(
    inputs: TrainingInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uninterrupted = trained(inputs, tmp_path / "whole", network=SMALL).reference.manifest()
    base, run = tmp_path / "broken", Run()
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(worker, "save_pipeline", None)
        trained(inputs, base, network=SMALL)
    (folder,) = base.glob("generator/*/checkpoints")
    (older, newest) = sorted(folder.glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])
    assert trained(inputs, base, run=run, network=SMALL).reference.manifest().digest == uninterrupted.digest
    assert [images for images, _ in run.values] == [24]
    (warning,) = (message for message in caplog.messages if message.startswith("checkpoint "))
    assert warning.startswith("checkpoint 000000006 is damaged; using the previous one: ")
    for stored in ("manifest.json", "shards/pipeline.json"):
        (folder.parent / stored).unlink()
    older.unlink()
    (folder / "shards" / "000000006.json").write_text("{")
    with pytest.raises(
        IntegrityError, match=r"all checkpoints are damaged: .*/checkpoints; delete that folder to train"
    ):
        trained(inputs, base, network=SMALL)


@pytest.mark.usefixtures("single_process")
def test_train_continues_during_outage_of_tracking_server(
    inputs: TrainingInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = itertools.count()

    class FlakyRun(Run):
        """Run whose server is down at 12 and 16 images and for files. Each call takes one second."""

        attempts: ClassVar[list[int]] = []

        def log(self, *, step: int, values: dict[str, float]) -> None:
            self.attempts.append(step)
            if step in (12, 16):
                raise MlflowException("no answer from http://user:secret@host")
            super().log(step=step, values=values)

        def file(self, path: Path, folder: str | None = None) -> None:
            raise ConnectionError("no answer")

    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(metrics, "OUTAGE_PAUSE", 0)
    run, frequent = FlakyRun(), dataclasses.replace(SHORT, log_images=4)
    outcome = trained(inputs, tmp_path, run=run, network=SMALL, training=frequent)
    assert outcome.reference.manifest().info["images_seen"] == 24
    assert [images for images, _ in run.values] == [4, 8, 20, 24]
    warnings = [message for message in caplog.messages if message.startswith("MLflow does not respond")]
    assert [message.rpartition(": ")[2] for message in warnings] == [
        "no answer from http://user:***@host",
        "no answer",
    ], "one warning per outage, without the password"

    monkeypatch.setattr(metrics, "OUTAGE_PAUSE", 3)
    FlakyRun.attempts.clear()
    trained(inputs, tmp_path / "again", run=FlakyRun(), network=SMALL, training=frequent)
    assert FlakyRun.attempts == [4, 8, 12, 24], "paused for three times the duration of the failed call"


@pytest.mark.usefixtures("single_process")
def test_train_skips_same_request_with_moved_folders_or_other_resources(inputs: TrainingInputs, tmp_path: Path) -> None:
    first, copy = save_generator(tmp_path / "a"), save_generator(tmp_path / "b")
    outcome = trained(inputs, tmp_path, start_from=first)
    assert trained(inputs, tmp_path, start_from=copy).skipped
    memory = {"pieces": 2, "compile": False, "bfloat16_copy": False, "sharding": "fsdp"}
    same_weights = dataclasses.replace(SHORT, grid_images=8, log_images=4, checkpoint_images=4, **memory)
    resources = {"workers": 2, "cpus_per_worker": 2, "use_gpu": True}
    assert trained(inputs, tmp_path, start_from=first, training=same_weights, **resources).skipped
    settings = outcome.reference.manifest().info["asked"]
    assert (settings["workers"], settings["training"]["pieces"], settings["start_from"]) == (1, 1, first)
    for changed in ({"batch_size": 8}, {"seed": 1}):
        training_config = dataclasses.replace(SHORT, **changed)
        assert not trained(inputs, tmp_path, start_from=first, training=training_config).skipped
    other = save_generator(tmp_path / "c", network=tiny_models.network(image_size=16, seed=1))
    assert trained(inputs, tmp_path, start_from=other).reference.digest != outcome.reference.digest


@pytest.mark.usefixtures("single_process")
def test_train_key_depends_on_settings_saved_with_the_weights(inputs: TrainingInputs, tmp_path: Path) -> None:
    outcomes = [
        trained(inputs, tmp_path, start_from=save_generator(tmp_path / str(scale), guidance_scale=scale))
        for scale in (2, 3)
    ]
    assert [opened(outcome, tmp_path).config.guidance_scale for outcome in outcomes] == [2, 3]

    folder = autoencoders(tmp_path)["kl"]
    latents: dict[str, Any] = {"network": LATENTS, "autoencoder": folder}
    before = trained(inputs, tmp_path, **latents)
    assert trained(inputs, tmp_path, **latents).skipped
    config = Path(folder, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    assert trained(inputs, tmp_path, **latents).reference.digest != before.reference.digest
    assert len(list((tmp_path / "cache" / "encoded").iterdir())) == 2 * len(tiny_training.SIZES)


@pytest.mark.usefixtures("single_process")
def test_train_keeps_scheduler_of_fine_tuned_pipeline(inputs: TrainingInputs, tmp_path: Path) -> None:
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = opened(
        trained(inputs, tmp_path, start_from=save_generator(tmp_path / "start", scheduler=euler)), tmp_path
    )
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    assert pipeline.scheduler.config.shift == 3
    setup = build_setup(configured(network=SMALL), tiny_models.identity())
    assert setup.scheduler is None, "a new scheduler is created"
