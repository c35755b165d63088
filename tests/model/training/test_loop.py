import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models
from support.fakes import FolderCheckpoints, Killed, MetricsLog
from torch import nn

from model.diffusion.conditioning import ConditioningConfig
from model.diffusion.flow_matching import Prediction
from model.diffusion.vq_diffusion import Transitions
from model.errors import ModelError
from model.images import to_model_range
from model.networks.dit import build_transformer
from model.networks.vq_transformer import VQTransformerConfig, build_vq_transformer
from model.training.batch import Batch
from model.training.data import TrainingRows, TrainingSet
from model.training.interfaces import TrainingConfig, TrainingData
from model.training.loop import InterruptedTrainingError, train
from model.training.muon import Muon
from model.training.objectives.autoencoder import AutoencoderObjective
from model.training.objectives.flow_matching import FlowMatching
from model.training.objectives.vq_diffusion import MaskAndReplace
from model.training.step import build_optimizers

BATCH = 4
SHORT = TrainingConfig(
    images=12 * BATCH,
    batch_size=BATCH,
    warmup_images=4 * BATCH,
    checkpoint_images=4 * BATCH,
    log_images=2 * BATCH,
)
CONDITIONING = ConditioningConfig(neighbours=2, pool=2)


def training_set(images: int = 10, *, neighbours: Sequence[int] = (1, 2)) -> TrainingSet:
    """Return random images of 8 px, each with the next two as neighbours."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)
    ids = (np.arange(images)[:, None] + neighbours) % images
    rows = TrainingRows(images=pixels, embeddings=tiny_models.unit_rows(images), neighbours=ids)
    return TrainingSet(rows, tiny_models.unit_rows(images))


class Interrupted:
    """Data that scales its batches by ``value``, or kills the run if it is None, from step ``at`` on."""

    def __init__(self, at: int, value: float | None = None) -> None:
        self.data, self.at, self.value, self.requests = training_set(), at, value, list[dict[str, int]]()

    def batch(self, step: int, **share: int) -> Batch:
        batch = self.data.batch(step, **share)
        if len(batch.images) == 1:  # a batch that only counts FLOPs
            return batch
        self.requests.append({"step": step, **share})
        if step < self.at:
            return batch
        if self.value is None:
            raise Killed
        return dataclasses.replace(batch, images=batch.images * self.value)


class SameOrder:
    """Data whose batches are the same for every seed."""

    def batch(self, step: int, *, seed: int, **share: int) -> Batch:
        return training_set().batch(step, seed=0, **share)


def run(
    folder: Path,
    data: TrainingData | None = None,
    *,
    config: TrainingConfig = SHORT,
    network: nn.Module | None = None,
    conditioning: ConditioningConfig = CONDITIONING,
    prediction: Prediction = "velocity",
    objective: Any = None,
    checkpoints: FolderCheckpoints | None = None,
    **options: Any,
) -> tuple[nn.Module, nn.Module, MetricsLog]:
    """Train a tiny network. Return the network, its average and the metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    network = network or build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=0)
    metrics = MetricsLog()
    average = train(
        network,
        objective or FlowMatching(conditioning, prediction),
        data or training_set(),
        config,
        checkpoints=checkpoints or FolderCheckpoints(folder),
        metrics=metrics,
        **options,
    )
    return network, average, metrics


def require_equal(first: nn.Module, second: nn.Module) -> None:
    """Assert that the weights are bit-identical."""
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("prediction", "patch_size", "head_width", "steps", "fall"),
    [("velocity", 2, 32, 400, 4), ("sample", 4, 64, 250, 12)],
)
def test_train_two_images_are_learned_and_generated_from_their_embeddings(
    tmp_path: Path, prediction: Prediction, patch_size: int, head_width: int, steps: int, fall: float
) -> None:
    data = training_set(2, neighbours=[0])
    config = TrainingConfig(
        images=2 * steps,
        batch_size=2,
        learning_rate=1e-2,
        warmup_images=20,
        ema_decay=0.98,
        checkpoint_images=10**9,
        log_images=40,
    )
    network = build_transformer(
        tiny_models.size(patch_size=patch_size, head_width=head_width), embedding_dimension=tiny_models.WIDTH, seed=0
    )
    all_shown = ConditioningConfig(
        neighbours=1, pool=1, fewer_neighbours=0, drop_all=0, drop_query=0, drop_neighbours=0, gap_probability=0
    )
    _, average, metrics = run(
        tmp_path, data, config=config, network=network, conditioning=all_shown, prediction=prediction
    )

    assert metrics["loss"][-1] < metrics["loss"][0] / fall

    pipeline = tiny_models.pipeline(
        tiny_models.database(tmp_path, tiny_models.unit_rows(2)), prediction=prediction, neighbours=1
    )
    pipeline.register_modules(transformer=average)
    batch = data.batch(0, seed=0, size=2)
    generated = pipeline(batch.query, guidance_scale=1, generator=torch.Generator().manual_seed(0)).images
    images = to_model_range(torch.from_numpy(np.stack([np.array(image) for image in generated])))
    errors = (images[:, None] - batch.images).square().mean((2, 3, 4))
    assert errors.diagonal().max() < min(errors[0, 1], errors[1, 0]) / 4


@pytest.mark.parametrize(
    "death",
    [
        pytest.param({"checkpoints": {"killed_at": 8}}, id="just after a checkpoint"),
        pytest.param({"checkpoints": {"killed_at": 8, "before": True}}, id="while a checkpoint is written"),
        pytest.param({"data": 7}, id="between two checkpoints"),
        pytest.param({"data": 2}, id="before the first checkpoint"),
    ],
)
def test_train_killed_and_resumed_ends_with_bit_identical_weights(tmp_path: Path, death: dict[str, Any]) -> None:
    expected, expected_average, expected_metrics = run(tmp_path / "uninterrupted")

    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        run(
            folder,
            Interrupted(death["data"]) if "data" in death else None,
            checkpoints=FolderCheckpoints(folder, **death.get("checkpoints", {})),
        )
    saved = FolderCheckpoints(folder).steps
    assert (
        saved
        == {8: [4, 8] if "before" not in death.get("checkpoints", {}) else [4], 7: [4], 2: []}[death.get("data", 8)]
    )
    network = build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=99 if saved else 0)
    resumed, resumed_average, resumed_metrics = run(folder, network=network)

    require_equal(resumed, expected)
    require_equal(resumed_average, expected_average)
    assert FolderCheckpoints(folder).steps == [4, 8, 12]
    first = saved[-1] // 2 if saved else 0  # values are logged every two steps
    assert resumed_metrics["loss"] == expected_metrics["loss"][first:]


def test_train_finished_run_is_not_repeated(tmp_path: Path) -> None:
    _, average, _ = run(tmp_path)
    unused = Interrupted(0)
    _, again, metrics = run(tmp_path, unused)
    require_equal(again, average)
    assert (unused.requests, metrics.entries) == ([], [])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_train_loss_not_finite_raises_and_keeps_the_last_checkpoint(tmp_path: Path, value: float) -> None:
    data = Interrupted(5, value)
    network = build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=0)
    with pytest.raises(ModelError, match=r"the loss is (nan|inf) after 24 images.*lower learning_rate"):
        run(tmp_path, data, network=network)
    assert len(data.requests) == 6, "detected when values are next logged, not at the end"
    checkpoints = FolderCheckpoints(tmp_path)
    assert checkpoints.steps == [4]
    state = torch.load(checkpoints.latest(), weights_only=True)
    assert all(weight.isfinite().all() for weight in [*state["network"].values(), *state["average"].values()])
    run(tmp_path)
    assert checkpoints.steps == [4, 8, 12], "the run resumes from there"


class BrokenGradient(nn.Module):
    """Flow matching with a gradient of ∞ or 0 · ∞ (NaN) at step ``at``, while the loss is finite."""

    def __init__(self, at: int, factor: float) -> None:
        super().__init__()
        self.inner, self.steps_left, self.factor = FlowMatching(CONDITIONING), at, factor

    def forward(self, network: nn.Module, batch: Batch, rng: Any) -> torch.Tensor:
        loss: torch.Tensor = self.inner(network, batch, rng)
        if len(batch.images) > 1:
            self.steps_left -= 1
            if self.steps_left == -1:
                weight = next(network.parameters())
                loss += self.factor * (weight - weight.detach()).sqrt().sum()
        return loss


@pytest.mark.parametrize(("factor", "norm"), [(0, "nan"), (1, "inf")])
@pytest.mark.parametrize(("at", "saved"), [(7, [4]), (11, [4, 8])])
def test_train_gradient_not_finite_raises_before_saving_a_checkpoint(
    tmp_path: Path, factor: float, norm: str, at: int, saved: list[int]
) -> None:
    message = f"the gradient norm is {norm} after {(at + 1) * BATCH} images.*lower learning_rate"
    with pytest.raises(ModelError, match=message):
        run(tmp_path, objective=BrokenGradient(at, factor))
    checkpoints = FolderCheckpoints(tmp_path)
    assert checkpoints.steps == saved
    run(tmp_path)
    assert checkpoints.steps == [4, 8, 12], "a run without the fault resumes from there"


@pytest.mark.parametrize("other", [{"head_width": 32}, {"layers": 2}, {"patch_size": 2}])
def test_train_checkpoint_of_another_network_raises(tmp_path: Path, other: dict[str, Any]) -> None:
    run(tmp_path)
    network = build_transformer(tiny_models.size(**other), embedding_dimension=tiny_models.WIDTH, seed=0)
    with pytest.raises(
        ModelError, match=r"(?s)checkpoint is damaged or belongs to another network: .*12\.pt.*delete its folder"
    ):
        run(tmp_path, network=network)


def test_train_batch_size_not_divisible_among_workers_raises(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="batch_size is not a multiple of workers × pieces: 4, 3"):
        run(tmp_path, world=3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": 31},
        {"images": 0, "batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"gradient_clip": 0.0},
        {"gradient_clip": math.nan},
        {"weight_decay": -0.01},
        {"weight_decay": math.nan},
        {"weight_decay": math.inf},
        {"warmup_images": -1},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"pieces": 3},
        {"pieces": 0},
        {"checkpoint_images": 0},
        {"log_images": 0},
        {"grid_images": 0},
        {"decay_images": 32},
        {"schedule": "constant", "decay_images": 40_001},
    ],
)
def test_training_config_invalid_field_raises(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        TrainingConfig(**wrong)


def test_train_requests_one_share_per_step_and_ignores_leftover_images(tmp_path: Path) -> None:
    data = Interrupted(1_000)
    run(tmp_path, data, config=dataclasses.replace(SHORT, images=12 * BATCH + 3, seed=5))
    assert data.requests == [{"step": step, "seed": 5, "size": BATCH, "part": 0, "parts": 1} for step in range(12)]


def test_train_logs_and_saves_at_the_configured_images(tmp_path: Path) -> None:
    config = dataclasses.replace(
        SHORT, images=44, log_images=10, checkpoint_images=18
    )  # not multiples of the batch size
    _, _, metrics = run(tmp_path, config=config)
    assert FolderCheckpoints(tmp_path).steps == [5, 9]
    # Every 10 images, before each checkpoint (its loss is checked first), and at the end.
    assert [images for images, _ in metrics.entries] == [12, 20, 32, 36, 40, 44]
    assert all(0.5 < loss < 5 for loss in metrics["loss"])
    assert min(metrics["images_per_s"]) > 0


def test_train_learning_rate_warms_up_and_decays_by_a_cosine_to_2_percent(tmp_path: Path) -> None:
    config = dataclasses.replace(
        SHORT, images=40 * BATCH, log_images=BATCH, learning_rate=0.01, checkpoint_images=10**9
    )
    rates = run(tmp_path, config=config)[2]["learning_rate"]
    assert len(rates) == 40
    assert rates[0] == pytest.approx(0.01 / 4)
    assert rates.index(max(rates)) == 3
    assert rates[20] == pytest.approx(0.01 * 0.51)
    assert all(late < early for early, late in itertools.pairwise(rates[3:]))
    assert 0.01 / 50 < rates[-1] < 0.01 / 45


def test_train_returns_the_frozen_average(tmp_path: Path) -> None:
    network, average, _ = run(tmp_path)
    assert not average.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(average.parameters(), network.parameters(), strict=True))
    network, average, _ = run(tmp_path / "no average", config=dataclasses.replace(SHORT, ema_decay=0.0))
    require_equal(average, network)


def test_train_depends_on_the_seed_and_not_on_the_global_random_state(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, _, _ = run(tmp_path / "1")
    before = torch.random.get_rng_state()
    second, _, _ = run(tmp_path / "2")
    assert torch.equal(torch.random.get_rng_state(), before)
    require_equal(first, second)


def test_train_noise_depends_only_on_the_seed(tmp_path: Path) -> None:
    first, same, other = (
        run(tmp_path / str(number), SameOrder(), config=dataclasses.replace(SHORT, seed=seed))[2]["loss"]
        for number, seed in enumerate((0, 0, 1))
    )
    assert first == same
    assert all(one != another for one, another in zip(first, other, strict=True))


def test_build_optimizers_muon_gets_only_the_matrices_of_the_blocks() -> None:
    network = build_transformer(tiny_models.size(layers=2), embedding_dimension=tiny_models.WIDTH, seed=0)
    adam, muon = build_optimizers(network, SHORT)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    owned = [[names[id(p)] for group in optimizer.param_groups for p in group["params"]] for optimizer in (adam, muon)]
    assert sorted(owned[0] + owned[1]) == sorted(names.values())
    assert all(name.startswith("transformer_blocks.") and name.endswith(".weight") for name in owned[1])
    # Two blocks, each with query, key, value and output of two attentions, and two matrices of the MLP.
    assert len(owned[1]) == 2 * (4 + 4 + 2)
    assert isinstance(muon, Muon)
    assert isinstance(adam, torch.optim.AdamW)


def test_train_constant_schedule_keeps_the_rate_after_the_warmup(tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, schedule="constant", learning_rate=0.01, log_images=BATCH)
    rates = run(tmp_path, config=config)[2]["learning_rate"]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 9)


def test_train_constant_schedule_with_a_decay_falls_linearly_to_0(tmp_path: Path) -> None:
    config = dataclasses.replace(
        SHORT, schedule="constant", learning_rate=0.01, log_images=BATCH, decay_images=4 * BATCH
    )
    rates = run(tmp_path, config=config)[2]["learning_rate"]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 6 + [0.0075, 0.005, 0.0025])


@pytest.mark.parametrize("pieces", [2, 4])
def test_train_in_pieces_gives_the_same_weights(tmp_path: Path, pieces: int) -> None:
    whole, whole_average, metrics = run(tmp_path / "1")
    split, average, split_metrics = run(tmp_path / "2", config=dataclasses.replace(SHORT, pieces=pieces))
    assert split_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    for one, other in ((split, whole), (average, whole_average)):
        for (name, weight), expected in zip(one.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(weight, expected, atol=2e-3, rtol=1e-2, msg=name)


def test_train_vq_objective_history_does_not_depend_on_pieces(tmp_path: Path) -> None:
    size = VQTransformerConfig(codes=8, tokens=4, timesteps=6, layers=1, heads=1, head_width=16)
    codes = np.random.default_rng(0).integers(0, 8, (10, 4))
    ids = (np.arange(10)[:, None] + (1, 2)) % 10
    rows = TrainingRows(images=codes, embeddings=tiny_models.unit_rows(10), neighbours=ids)
    states = []
    for pieces in (1, 4):
        objective = MaskAndReplace(Transitions(codes=8, timesteps=6), CONDITIONING)
        network = build_vq_transformer(size, embedding_dimension=tiny_models.WIDTH, seed=0)
        config = dataclasses.replace(SHORT, images=60 * BATCH, pieces=pieces)
        data = TrainingSet(rows, tiny_models.unit_rows(10))
        run(tmp_path / str(pieces), data, config=config, network=network, objective=objective)
        states.append([objective.history, *network.parameters()])
        assert (objective.seen >= objective.WARM).all(), "times were sampled by the history"
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-2)


class LimitedMemory(nn.Module):
    """Flow matching that runs out of memory above ``largest`` images."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.inner, self.largest, self.sizes = FlowMatching(CONDITIONING), largest, list[int]()

    def forward(self, network: nn.Module, batch: Batch, rng: Any) -> torch.Tensor:
        if len(batch.images) > 1 or self.largest == 0:
            self.sizes.append(len(batch.images))
        if self.largest and len(batch.images) > self.largest:
            raise torch.OutOfMemoryError
        loss: torch.Tensor = self.inner(network, batch, rng)
        return loss


def test_train_out_of_memory_doubles_the_pieces_once_and_continues(tmp_path: Path) -> None:
    objective = LimitedMemory(BATCH // 2)
    _, _, metrics = run(tmp_path / "full", objective=objective)
    assert objective.sizes == [BATCH] + [BATCH // 2] * 2 * 12, "all later steps start with halves"
    _, _, expected = run(tmp_path / "free")
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_train_out_of_memory_again_raises_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cpu is out of memory at pieces=2; increase pieces, or choose a smaller"):
        run(tmp_path, objective=LimitedMemory(BATCH // 4))
    one = TrainingConfig(images=3, batch_size=1, checkpoint_images=1)
    odd = dataclasses.replace(one, images=9, batch_size=3)
    with pytest.raises(ModelError, match="out of memory at pieces=1"):
        run(tmp_path, objective=LimitedMemory(2), config=odd)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("model.training.loop.ema_copy", id="the average"),
        pytest.param("model.training.step.matrix_peak", id="the peak measurement"),
        pytest.param("torch.optim.AdamW.step", id="the optimizer states of the first step"),
        pytest.param("model.training.data._Window", id="the window"),
        pytest.param("torch.optim.AdamW.load_state_dict", id="the optimizer states of a checkpoint"),
    ],
)
def test_train_out_of_memory_outside_the_batch_raises_with_the_fix(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    run(tmp_path, config=dataclasses.replace(SHORT, images=4 * BATCH))
    monkeypatch.setattr(where, full)
    with pytest.raises(ModelError, match=r"out of memory for (weights, optimizer states|a window) .*choose a smaller"):
        run(tmp_path)


def test_train_stop_saves_a_checkpoint_and_resumes_with_equal_weights(tmp_path: Path) -> None:
    expected, expected_average, metrics = run(tmp_path / "uninterrupted")
    stops = iter([False] * 5 + [True])
    folder = tmp_path / "stopped"
    with pytest.raises(InterruptedTrainingError, match="stopped after 24 images; run again"):
        run(folder, stop=lambda: next(stops))
    assert FolderCheckpoints(folder).steps == [4, 6]
    resumed, average, resumed_metrics = run(folder)
    require_equal(resumed, expected)
    require_equal(average, expected_average)
    assert resumed_metrics["loss"] == metrics["loss"][3:]


def test_train_logs_grids_of_the_average_at_the_configured_images(tmp_path: Path) -> None:
    grids: list[tuple[int, bool]] = []

    class GridLog(MetricsLog):
        def grid(self, *, images: int, average: nn.Module) -> None:
            grids.append((images, average.training))

    network = build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=0)
    config = dataclasses.replace(SHORT, grid_images=18)
    train(network, FlowMatching(CONDITIONING), training_set(), config,
          checkpoints=FolderCheckpoints(tmp_path), metrics=GridLog())  # fmt: skip
    assert grids == [(20, False), (36, False)]


def test_train_utilisation_is_proportional_to_the_speed(tmp_path: Path) -> None:
    _, _, metrics = run(tmp_path)
    shares = [
        used / speed for used, speed in zip(metrics["model_flops_utilisation"], metrics["images_per_s"], strict=True)
    ]
    assert 0 < min(metrics["model_flops_utilisation"]) < 1
    assert shares == pytest.approx([shares[0]] * len(shares)), "one count and one peak for the whole run"


def test_train_objective_state_is_saved_in_the_checkpoint(tmp_path: Path) -> None:
    class Counting(FlowMatching):
        def __init__(self) -> None:
            super().__init__(CONDITIONING)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, network: nn.Module, batch: Batch, rng: Any) -> torch.Tensor:
            self.count += 1
            return super().forward(network, batch, rng)

    first, second = Counting(), Counting()
    run(tmp_path, objective=first, config=dataclasses.replace(SHORT, images=8 * BATCH))
    assert first.count == 8, "the batch that counts FLOPs is not counted"
    run(tmp_path, objective=second)
    assert second.count == 12


@pytest.mark.parametrize(
    "objective", [MaskAndReplace(Transitions(codes=4, timesteps=4), CONDITIONING), AutoencoderObjective(4)]
)
def test_train_moves_the_objective_to_the_device(tmp_path: Path, objective: nn.Module) -> None:
    class KillingData:
        def batch(self, *_: int, **__: int) -> Batch:
            raise Killed

    network = build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=0)
    with pytest.raises(Killed):
        run(tmp_path, KillingData(), network=network, objective=objective, device="meta")
    assert {part.device.type for part in [*network.parameters(), *objective.buffers()]} == {"meta"}
