"""Training stage with one worker in the calling process instead of Ray."""

import dataclasses
import io
import itertools
import json
import math
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
from safetensors.torch import load_file, save_file
from support import tiny_models, tiny_training
from support.object_stores import Bucket
from support.tiny_training import COUNT, POOL, small_kl

from infra import artifacts, storage
from infra.compute import preemption, ray_train
from infra.errors import EncoderMismatchError, InputError, IntegrityError
from model.configs import ConditioningConfig, TrainingConfig, TransformerConfig, UNetConfig, VQTransformerConfig
from model.images import image_to_array
from model.networks.build import config_of_network
from model.networks.editor import is_editor, widen_input
from model.networks.image_tokens import takes_images
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder
from model.networks.vq_transformer import VQTransformer
from model.pipeline import KNNDiffusionPipeline, new_pipeline
from model.saved_generator import pretrained_folder
from model.training.loop import InterruptedTrainingError
from model.training.objectives.flow_matching import FlowMatching
from model.training.objectives.restoration import Restoration
from model.training.objectives.vq_diffusion import MaskAndReplace
from tasks.references.domain_folder import DomainFolder
from tasks.references.generator import generator_folder
from tasks.references.types import Generator, StageResult
from tasks.train import metrics, worker
from tasks.train.config import TrainConfig
from tasks.train.inputs import TrainingInputs
from tasks.train.setup import build_setup, objective_of
from tasks.train.task import train

SHORT = TrainingConfig(
    images=24, batch_size=4, warmup_images=8, checkpoint_images=8, log_images=8, grid_images=24, ema_decay=0.5
)
SMALL = tiny_models.size(image_size=16)
WITH_IMAGES = tiny_models.size(image_size=16, neighbour_images=2)
VQ = AutoencoderConfig(image_size=16, downscale=4, codes=16, code_width=4, channels=(8, 8, 8))
CODES = VQTransformerConfig(codes=16, tokens=16, timesteps=10, layers=1, heads=1, head_width=16)
UNET = UNetConfig(image_size=16, widths=(32, 64), layers=1)
LATENTS = tiny_models.size(image_size=8, channels=4, patch_size=2)
VQ_LATENTS = tiny_models.size(image_size=4, channels=VQ.code_width, patch_size=2)


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


def configured(**changes: Any) -> TrainConfig:
    conditioning = ConditioningConfig(neighbours=2, pool=POOL)
    return TrainConfig(**{"conditioning": conditioning, "training": SHORT, "cpus_per_worker": 1} | changes)


def trained(inputs: TrainingInputs, base: Path, *, run: Any = None, **changes: Any) -> StageResult[Generator]:
    return train(inputs, DomainFolder(uri=str(base), cache=base / "cache"), configured(**changes), run=run)


def opened(outcome: StageResult[Generator], base: Path) -> KNNDiffusionPipeline:
    return KNNDiffusionPipeline.open(generator_folder(outcome.reference, base / "cache"))


def autoencoders(folder: Path) -> dict[str, str]:
    """Save an autoencoder of each kind."""
    saved_autoencoders: dict[str, Any] = {"kl": small_kl(), "vq": build_autoencoder(VQ, seed=0)}
    for name, autoencoder in saved_autoencoders.items():
        autoencoder.save_pretrained(folder / name)
    return {name: str(folder / name) for name in saved_autoencoders}


def save_generator(folder: Path, *, network: Any = None, **defaults: Any) -> str:
    """Save a generator to fine-tune."""
    network = network or tiny_models.network(image_size=16)
    new_pipeline(network, tiny_models.identity(), **{"neighbours": 3} | defaults).save_pretrained(folder)
    return str(folder)


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


def test_build_setup_takes_size_defaults_and_weights_of_start_from(tmp_path: Path) -> None:
    network = tiny_models.network(image_size=16, layers=2)
    start = save_generator(
        tmp_path, network=network, guidance_scale=3.5, num_inference_steps=7, query="mean", candidates=4
    )
    setup = build_setup(configured(start_from=start), tiny_models.identity())
    assert setup.network_config == tiny_models.size(image_size=16, layers=2)
    assert (setup.image_size, setup.autoencoder) == (16, None)
    assert setup.defaults == {
        "guidance_scale": 3.5,
        "guidance_interval": [0.0, 1.0],
        "num_inference_steps": 7,
        "query": "mean",
        "truncation": 0.86,
        "neighbours": 2,
        "trained_neighbours": 2,
        "candidates": 4,
    }
    for name, weight in setup.network.state_dict().items():
        torch.testing.assert_close(weight, network.state_dict()[name])
    assert all(parameter.requires_grad for parameter in setup.network.parameters())
    assert (
        build_setup(configured(start_from=start, guidance_scale=1.0), tiny_models.identity()).defaults["guidance_scale"]
        == 1
    )
    same = build_setup(configured(start_from=start, network=setup.network_config), tiny_models.identity())
    assert same.network_config == setup.network_config
    with pytest.raises(InputError, match=r"network differs from that of .*; omit network"):
        build_setup(configured(start_from=start, network=SMALL), tiny_models.identity())
    with pytest.raises(EncoderMismatchError, match="start from random weights"):
        build_setup(configured(start_from=start), tiny_models.identity(name="other", weights="f" * 64))


def test_build_setup_accepts_bundled_generator() -> None:
    pipeline = KNNDiffusionPipeline.open(pretrained_folder("sticker-generator"))
    setup = build_setup(configured(start_from="sticker-generator"), pipeline.identity)
    assert setup.network_config == TransformerConfig(image_size=64, patch_size=4, layers=6, heads=8, head_width=64)
    assert is_editor(setup.network)
    assert isinstance(objective_of(configured(start_from="sticker-generator"), setup), FlowMatching)
    assert isinstance(objective_of(configured(start_from="sticker-generator", editing=True), setup), Restoration)


def test_build_setup_adds_image_tokens_to_the_initial_generator(tmp_path: Path) -> None:
    start = save_generator(tmp_path / "base")
    setup = build_setup(configured(start_from=start, network=WITH_IMAGES), tiny_models.identity())
    assert takes_images(setup.network)
    assert setup.network_config == WITH_IMAGES
    again = save_generator(tmp_path / "again", network=setup.network)
    for network in (None, WITH_IMAGES):
        assert build_setup(configured(start_from=again, network=network), tiny_models.identity()).network_config == (
            WITH_IMAGES
        )
    with pytest.raises(InputError, match=r"network differs from that of .*; omit network"):
        wider = dataclasses.replace(WITH_IMAGES, heads=2)
        build_setup(configured(start_from=start, network=wider), tiny_models.identity())


def test_build_setup_for_editing_widens_the_input(tmp_path: Path) -> None:
    start = save_generator(tmp_path / "base")
    assert is_editor(build_setup(configured(start_from=start, editing=True), tiny_models.identity()).network)
    editor = save_generator(tmp_path / "editor", network=widen_input(tiny_models.network(image_size=16)))
    for editing in (False, True):
        setup = build_setup(configured(start_from=editor, editing=editing), tiny_models.identity())
        assert is_editor(setup.network), "an editor is not changed"
    unet = save_generator(
        tmp_path / "unet",
        network=build_setup(configured(network=UNetConfig(widths=(32, 32))), tiny_models.identity()).network,
    )
    with pytest.raises(InputError, match="editing needs a transformer over pixels"):
        build_setup(configured(start_from=unet, editing=True), tiny_models.identity())


def test_build_setup_from_pipeline_over_codes_uses_its_autoencoder(tmp_path: Path) -> None:
    network = build_setup(
        configured(network=CODES, autoencoder=autoencoders(tmp_path)["vq"]), tiny_models.identity()
    ).network
    assert isinstance(network, VQTransformer)
    start = save_generator(tmp_path / "start", network=network, vae=build_autoencoder(VQ, seed=0))
    setup = build_setup(configured(start_from=start), tiny_models.identity())
    assert (setup.network_config, setup.image_size) == (CODES, 16)
    assert setup.autoencoder is not None
    objective = objective_of(configured(start_from=start), setup)
    assert isinstance(objective, MaskAndReplace)
    assert (objective.transitions.codes, objective.transitions.timesteps) == (16, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": SMALL, "image_size": 32}, "image_size does not fit the network: 32 px, not 16 px"),
        ({"network": LATENTS}, "does not fit RGB images: 4 channels; set autoencoder"),
        ({"network": SMALL, "autoencoder": "kl"}, "3 channels, the latents have 4; set channels=4"),
        (
            {"network": dataclasses.replace(VQ_LATENTS, channels=8), "autoencoder": "vq"},
            "8 channels, the latents have 4",
        ),
        (
            {"network": LATENTS, "autoencoder": "kl", "image_size": 8},
            "image_size does not fit the network: 8 px, not 16 px",
        ),
        ({"network": CODES, "autoencoder": "kl"}, "needs a VQModel of 16 codes at 8 px, the autoencoder has no codes"),
        ({"network": dataclasses.replace(CODES, codes=8), "autoencoder": "vq"}, "8 codes.* has 16 codes at 16 px"),
        ({"network": dataclasses.replace(CODES, tokens=64), "autoencoder": "vq"}, "at 32 px, .* has 16 codes at 16 px"),
        ({"network": LATENTS, "autoencoder": "nowhere"}, "cannot load an autoencoder: .*nowhere"),
    ],
)
def test_build_setup_raises_for_parts_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folders = autoencoders(tmp_path) | {"nowhere": str(tmp_path / "nowhere")}
    if "autoencoder" in changes:
        changes = changes | {"autoencoder": folders[changes["autoencoder"]]}
    with pytest.raises(InputError, match=message):
        build_setup(configured(**changes), tiny_models.identity())


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_build_setup_raises_for_damaged_autoencoder(tmp_path: Path, kind: str) -> None:
    folder = autoencoders(tmp_path)[kind]
    config = configured(network=LATENTS if kind == "kl" else CODES, autoencoder=folder)
    weights = Path(folder) / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    last = "decoder.conv_out.bias"
    damaged: dict[str, dict[str, Any]] = {
        r"1 of \d+ are missing": {name: weight for name, weight in whole.items() if name != last},
        "are NaN or infinite": whole | {last: whole[last] * torch.nan},
        "size mismatch|shape": whole | {last: torch.zeros(7)},
    }
    for message, damaged_weights in damaged.items():
        save_file(damaged_weights, weights)
        with pytest.raises(InputError, match=rf"(?s)cannot load an autoencoder: .*({message})"):
            build_setup(config, tiny_models.identity())
    save_file(whole, weights)
    assert build_setup(config, tiny_models.identity()).autoencoder is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers"),
        ({"cpus_per_worker": 0}, "cpus_per_worker"),
        ({"window_bytes": 0}, "window_bytes"),
        ({"guidance_scale": math.nan}, "guidance_scale is not finite: nan; give a number"),
        ({"network": CODES}, "folder of a VQModel"),
        ({"editing": True, "autoencoder": "x"}, "over pixels"),
        ({"editing": True, "network": UNetConfig()}, "transformer over pixels"),
    ],
)
def test_train_config_raises_for_invalid_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_generator_folder_replaces_damaged_file_in_cache(moto_bucket: Bucket, tmp_path: Path) -> None:
    stage = artifacts.ArtifactBuilder(f"{moto_bucket.uri}/d", Generator.kind, inputs={}, config={})
    with storage.scratch() as scratch:
        (scratch / "pipeline").mkdir()
        (scratch / "pipeline/weights").write_bytes(b"committed bytes")
        shard = artifacts.commit_shard(stage.uri, "pipeline", scratch, rows=0, info={})
    generator = Generator.of(stage.commit([shard], info={}), stage.uri)
    weights = generator_folder(generator, tmp_path) / "weights"
    weights.write_bytes(b"damaged bytes")
    assert generator_folder(generator, tmp_path) / "weights" == weights
    assert weights.read_bytes() == b"committed bytes"
    assert [path.name for path in weights.parent.parent.iterdir()] == ["pipeline"]
