"""The training stage with Ray's part played by the calling process."""

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
from model.diffusion.conditioning import ConditioningConfig
from model.images import image_to_array
from model.networks.build import config_of_network
from model.networks.dit import TransformerConfig
from model.networks.editor import is_editor, widen_input
from model.networks.unet import UNetConfig
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder
from model.networks.vq_transformer import VQTransformer, VQTransformerConfig
from model.pipeline import KNNDiffusionPipeline, new_pipeline
from model.saved_generator import pretrained_folder
from model.training.interfaces import TrainingConfig
from model.training.loop import InterruptedTrainingError
from model.training.objectives.flow_matching import FlowMatching
from model.training.objectives.restoration import Restoration
from model.training.objectives.vq_diffusion import MaskAndReplace
from tasks.references.types import Generator, StageResult
from tasks.train import task as training
from tasks.train.data import TrainingInputs
from tasks.train.setup import TrainConfig, build_setup, objective_of
from tasks.train.task import generator_folder, train

SHORT = TrainingConfig(
    images=24, batch_size=4, warmup_images=8, checkpoint_images=8, log_images=8, grid_images=24, ema_decay=0.5
)
SMALL = tiny_models.size(image_size=16)
VQ = AutoencoderConfig(image_size=16, downscale=4, codes=16, code_width=4, channels=(8, 8, 8))
CODES = VQTransformerConfig(codes=16, tokens=16, timesteps=10, layers=1, heads=1, head_width=16)
UNET = UNetConfig(image_size=16, widths=(32, 64), layers=1)
LATENTS = tiny_models.size(image_size=8, channels=4, patch_size=2)
VQ_LATENTS = tiny_models.size(image_size=4, channels=VQ.code_width, patch_size=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    return tiny_training.stored_inputs(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker: this process."""

    def run(loop: Callable[[dict[str, Any]], None], config: dict[str, Any], **_: Any) -> None:
        loop(config)

    monkeypatch.setattr(ray_train, "train", run)
    monkeypatch.setattr(ray_train, "worker_rank", lambda: (0, 1))


class Run:
    """A tracked run in memory."""

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
    return train(inputs, str(base), configured(**changes), cache=base / "cache", run=run)


def opened(outcome: StageResult[Generator], base: Path) -> KNNDiffusionPipeline:
    return KNNDiffusionPipeline.open(generator_folder(outcome.reference, base / "cache"))


def autoencoders(folder: Path) -> dict[str, str]:
    """A saved autoencoder of each kind."""
    made: dict[str, Any] = {"kl": small_kl(), "vq": build_autoencoder(VQ, seed=0)}
    for name, autoencoder in made.items():
        autoencoder.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


def saved(folder: Path, *, network: Any = None, **defaults: Any) -> str:
    """A generator to start from."""
    network = network or tiny_models.network(image_size=16)
    new_pipeline(network, tiny_models.identity(), **{"neighbours": 3} | defaults).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["transformer", "unet", "editor", "latents", "latents of a VQModel", "codes"])
@pytest.mark.usefixtures("alone")
def test_every_network_is_trained_saved_and_draws(inputs: TrainingInputs, tmp_path: Path, kind: str) -> None:
    folders = autoencoders(tmp_path)
    changes: dict[str, Any] = {
        "transformer": {"network": SMALL},
        "unet": {"network": UNET},
        "editor": {"network": SMALL, "editing": True},
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
        assert sheet.size == (4 * 2 * 16, 2 * 16), "the first shard's five pictures, each beside what is drawn for it"
        cells = np.asarray(sheet).reshape(2, 16, 8, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, 16, 16, 3)
    if changes["network"] in (SMALL, UNET):
        pictures = [image_to_array(tiny_training.picture(number), 16) for number in range(5)]
        assert {cell.tobytes() for cell in pictures} == {cell.tobytes() for cell in cells[:10:2]}
    assert (cells[10:] == 255).all()
    pipeline = opened(outcome, tmp_path)
    assert is_editor(pipeline.transformer) == (kind == "editor")
    assert config_of_network(pipeline.transformer, "velocity") == changes["network"]
    assert pipeline.config.neighbours == 2
    pipeline.swap_database(tiny_models.database(tmp_path / "db", tiny_models.unit_rows(COUNT)))
    query = torch.from_numpy(tiny_models.unit_rows(2)).float()
    images = pipeline(query, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(16, 16)] * 2


@pytest.mark.usefixtures("alone")
def test_a_run_that_hears_a_signal_keeps_its_step_and_goes_on_from_it(
    inputs: TrainingInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = trained(inputs, tmp_path / "whole", network=SMALL).reference.manifest()
    asked = iter([False, False, True])
    monkeypatch.setattr(preemption, "stop_requested", lambda: next(asked))
    with pytest.raises(InterruptedTrainingError, match="stopped after 12 images"):
        trained(inputs, tmp_path / "broken", network=SMALL)
    (folder,) = (tmp_path / "broken").glob("generator/*/checkpoints/shards")
    assert [path.stem for path in sorted(folder.iterdir())] == ["000000002", "000000003"]
    monkeypatch.setattr(preemption, "stop_requested", lambda: False)
    resumed = trained(inputs, tmp_path / "broken", network=SMALL).reference.manifest()
    assert resumed.digest == unbroken.digest


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.usefixtures("alone")
def test_a_run_killed_after_its_last_checkpoint_is_finished_with_the_numbers_it_had(
    inputs: TrainingInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    run = Run()
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(training, "save_pipeline", None)
        trained(inputs, tmp_path, run=run, network=SMALL)
    if not kept:  # as by an earlier release
        (*_, marker) = sorted(tmp_path.glob("generator/*/checkpoints/shards/*.json"))
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"info": {"step": 6}}))
    outcome = trained(inputs, tmp_path, run=run, network=SMALL)
    info = outcome.reference.manifest().info
    assert [images for images, _ in run.values] == [8, 16, 24], "nothing was trained again"
    last = run.values[-1][1] if kept else {}
    assert {name: value for name, value in info.items() if name in run.values[-1][1]} == last
    assert outcome.note.startswith("24 images seen, ") == kept
    assert ("loss" in outcome.note) == kept


@pytest.mark.usefixtures("alone")
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    inputs: TrainingInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unbroken = trained(inputs, tmp_path / "whole", network=SMALL).reference.manifest()
    base, run = tmp_path / "broken", Run()
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(training, "save_pipeline", None)
        trained(inputs, base, network=SMALL)
    (folder,) = base.glob("generator/*/checkpoints")
    (older, newest) = sorted(folder.glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])
    assert trained(inputs, base, run=run, network=SMALL).reference.manifest().digest == unbroken.digest
    assert [images for images, _ in run.values] == [24]
    (told,) = (message for message in caplog.messages if message.startswith("checkpoint "))
    assert told.startswith("checkpoint 000000006 is damaged, the one before is taken: ")
    for stored in ("manifest.json", "shards/pipeline.json"):
        (folder.parent / stored).unlink()
    older.unlink()
    (folder / "shards" / "000000006.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"no checkpoint in .*/checkpoints is whole; delete that folder to start"):
        trained(inputs, base, network=SMALL)


@pytest.mark.usefixtures("alone")
def test_training_goes_on_while_the_tracking_server_is_down(
    inputs: TrainingInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = itertools.count()

    class Down(Run):
        """Down at 12 and 16 images, and for files; each call takes a second."""

        asked: ClassVar[list[int]] = []

        def log(self, *, step: int, values: dict[str, float]) -> None:
            self.asked.append(step)
            if step in (12, 16):
                raise MlflowException("no answer from http://user:secret@host")
            super().log(step=step, values=values)

        def file(self, path: Path, folder: str | None = None) -> None:
            raise ConnectionError("no answer")

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(training, "OUTAGE_PAUSE", 0)
    run, often = Down(), dataclasses.replace(SHORT, log_images=4)
    outcome = trained(inputs, tmp_path, run=run, network=SMALL, training=often)
    assert outcome.reference.manifest().info["images_seen"] == 24
    assert [images for images, _ in run.values] == [4, 8, 20, 24]
    warnings = [message for message in caplog.messages if message.startswith("MLflow does not answer")]
    assert [message.rpartition(": ")[2] for message in warnings] == [
        "no answer from http://user:***@host",
        "no answer",
    ], "once an outage, and no password"

    monkeypatch.setattr(training, "OUTAGE_PAUSE", 3)
    Down.asked.clear()
    trained(inputs, tmp_path / "again", run=Down(), network=SMALL, training=often)
    assert Down.asked == [4, 8, 12, 24], "left alone for three times as long as it did not answer"


@pytest.mark.usefixtures("alone")
def test_the_same_request_is_skipped_wherever_its_folders_are(inputs: TrainingInputs, tmp_path: Path) -> None:
    first, copy = saved(tmp_path / "a"), saved(tmp_path / "b")
    made = trained(inputs, tmp_path, start_from=first)
    assert trained(inputs, tmp_path, start_from=copy).skipped
    as_fits = {"pieces": 2, "compile": False, "bfloat16_copy": False, "sharding": "fsdp"}
    elsewhere = dataclasses.replace(SHORT, grid_images=8, log_images=4, checkpoint_images=4, **as_fits)
    resources = {"workers": 2, "cpus_per_worker": 2, "use_gpu": True}
    assert trained(inputs, tmp_path, start_from=first, training=elsewhere, **resources).skipped
    asked = made.reference.manifest().info["asked"]
    assert (asked["workers"], asked["training"]["pieces"], asked["start_from"]) == (1, 1, first), "how it was made"
    for changed in ({"batch_size": 8}, {"seed": 1}):
        stepped = dataclasses.replace(SHORT, **changed)
        assert not trained(inputs, tmp_path, start_from=first, training=stepped).skipped
    other = saved(tmp_path / "c", network=tiny_models.network(image_size=16, seed=1))
    assert trained(inputs, tmp_path, start_from=other).reference.digest != made.reference.digest


@pytest.mark.usefixtures("alone")
def test_other_settings_beside_the_same_weights_are_another_request(inputs: TrainingInputs, tmp_path: Path) -> None:
    made = [
        trained(inputs, tmp_path, start_from=saved(tmp_path / str(scale), guidance_scale=scale)) for scale in (2, 3)
    ]
    assert [opened(outcome, tmp_path).config.guidance_scale for outcome in made] == [2, 3]

    folder = autoencoders(tmp_path)["kl"]
    latents: dict[str, Any] = {"network": LATENTS, "autoencoder": folder}
    before = trained(inputs, tmp_path, **latents)
    assert trained(inputs, tmp_path, **latents).skipped
    config = Path(folder, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    assert trained(inputs, tmp_path, **latents).reference.digest != before.reference.digest
    assert len(list((tmp_path / "cache" / "encoded").iterdir())) == 2 * len(tiny_training.SIZES)


@pytest.mark.usefixtures("alone")
def test_a_start_that_is_tuned_is_drawn_as_it_was(inputs: TrainingInputs, tmp_path: Path) -> None:
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = opened(trained(inputs, tmp_path, start_from=saved(tmp_path / "start", scheduler=euler)), tmp_path)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    assert pipeline.scheduler.config.shift == 3
    setup = build_setup(configured(network=SMALL), tiny_models.identity())
    assert setup.scheduler is None, "a new one"


def test_a_start_gives_its_size_its_defaults_and_its_weights(tmp_path: Path) -> None:
    network = tiny_models.network(image_size=16, layers=2)
    start = saved(tmp_path, network=network, guidance_scale=3.5, num_inference_steps=7, query="mean", candidates=4)
    setup = build_setup(configured(start_from=start), tiny_models.identity())
    assert setup.size == tiny_models.size(image_size=16, layers=2)
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
    assert build_setup(configured(start_from=start, network=setup.size), tiny_models.identity()).size == setup.size
    with pytest.raises(InputError, match="leave network out to take its own size"):
        build_setup(configured(start_from=start, network=SMALL), tiny_models.identity())
    with pytest.raises(EncoderMismatchError, match="start from random weights"):
        build_setup(configured(start_from=start), tiny_models.identity(name="other", weights="f" * 64))


def test_the_embedded_generator_is_taken_as_it_is() -> None:
    pipeline = KNNDiffusionPipeline.open(pretrained_folder("sticker-generator"))
    setup = build_setup(configured(start_from="sticker-generator"), pipeline.identity)
    assert setup.size == TransformerConfig(image_size=64, patch_size=4, layers=6, heads=8, head_width=64)
    assert is_editor(setup.network)
    assert isinstance(objective_of(configured(start_from="sticker-generator"), setup), FlowMatching)
    assert isinstance(objective_of(configured(start_from="sticker-generator", editing=True), setup), Restoration)


def test_editing_widens_a_network_that_only_draws(tmp_path: Path) -> None:
    start = saved(tmp_path / "base")
    assert is_editor(build_setup(configured(start_from=start, editing=True), tiny_models.identity()).network)
    editor = saved(tmp_path / "editor", network=widen_input(tiny_models.network(image_size=16)))
    for editing in (False, True):
        setup = build_setup(configured(start_from=editor, editing=editing), tiny_models.identity())
        assert is_editor(setup.network), "an editor stays one"
    unet = saved(
        tmp_path / "unet",
        network=build_setup(configured(network=UNetConfig(widths=(32, 32))), tiny_models.identity()).network,
    )
    with pytest.raises(InputError, match="editing is learned by a transformer over pixels"):
        build_setup(configured(start_from=unet, editing=True), tiny_models.identity())


def test_a_start_over_codes_brings_its_autoencoder(tmp_path: Path) -> None:
    network = build_setup(
        configured(network=CODES, autoencoder=autoencoders(tmp_path)["vq"]), tiny_models.identity()
    ).network
    assert isinstance(network, VQTransformer)
    start = saved(tmp_path / "start", network=network, vae=build_autoencoder(VQ, seed=0))
    setup = build_setup(configured(start_from=start), tiny_models.identity())
    assert (setup.size, setup.image_size) == (CODES, 16)
    assert setup.autoencoder is not None
    objective = objective_of(configured(start_from=start), setup)
    assert isinstance(objective, MaskAndReplace)
    assert (objective.transitions.codes, objective.transitions.timesteps) == (16, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": SMALL, "image_size": 32}, "image_size is 32 px, but the network works on pictures of 16 px"),
        ({"network": LATENTS}, "takes 4 channels, a picture has 3; name its autoencoder"),
        ({"network": SMALL, "autoencoder": "kl"}, "takes 3 channels, the autoencoder's latents have 4"),
        (
            {"network": dataclasses.replace(VQ_LATENTS, channels=8), "autoencoder": "vq"},
            "8 channels, .* latents have 4",
        ),
        ({"network": LATENTS, "autoencoder": "kl", "image_size": 8}, "works on pictures of 16 px"),
        ({"network": CODES, "autoencoder": "kl"}, "need a VQModel of 16 codes at 8 px, the autoencoder has no codes"),
        ({"network": dataclasses.replace(CODES, codes=8), "autoencoder": "vq"}, "8 codes.* has 16 codes at 16 px"),
        ({"network": dataclasses.replace(CODES, tokens=64), "autoencoder": "vq"}, "at 32 px, .* has 16 codes at 16 px"),
        ({"network": LATENTS, "autoencoder": "nowhere"}, "nowhere holds no usable autoencoder"),
    ],
)
def test_what_does_not_fit_is_told_before_training(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folders = autoencoders(tmp_path) | {"nowhere": str(tmp_path / "nowhere")}
    if "autoencoder" in changes:
        changes = changes | {"autoencoder": folders[changes["autoencoder"]]}
    with pytest.raises(InputError, match=message):
        build_setup(configured(**changes), tiny_models.identity())


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_an_autoencoder_that_is_not_whole_is_told_before_training(tmp_path: Path, kind: str) -> None:
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
    for told, weights_then in damaged.items():
        save_file(weights_then, weights)
        with pytest.raises(InputError, match=rf"(?s)holds no usable autoencoder.*({told})"):
            build_setup(config, tiny_models.identity())
    save_file(whole, weights)
    assert build_setup(config, tiny_models.identity()).autoencoder is not None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"workers": 0}, "workers"),
        ({"cpus_per_worker": 0}, "cpus_per_worker"),
        ({"window_bytes": 0}, "window_bytes"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan; give a number"),
        ({"network": CODES}, "folder of a VQModel"),
        ({"editing": True, "autoencoder": "x"}, "over pixels"),
        ({"editing": True, "network": UNetConfig()}, "transformer over pixels"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**wrong)


def test_a_kept_file_that_was_damaged_is_replaced_where_the_pipeline_is_opened(
    moto_bucket: Bucket, tmp_path: Path
) -> None:
    stage = artifacts.ArtifactBuilder(f"{moto_bucket.uri}/d", Generator.kind, inputs={}, config={})
    with storage.scratch() as scratch:
        (scratch / "pipeline").mkdir()
        (scratch / "pipeline/weights").write_bytes(b"as they were committed")
        shard = artifacts.commit_shard(stage.uri, "pipeline", scratch, rows=0, info={})
    generator = Generator.of(stage.commit([shard], info={}), stage.uri)
    weights = generator_folder(generator, tmp_path) / "weights"
    weights.write_bytes(b"as a failing disk keeps them")
    assert generator_folder(generator, tmp_path) / "weights" == weights
    assert weights.read_bytes() == b"as they were committed"
    assert [path.name for path in weights.parent.parent.iterdir()] == ["pipeline"]
