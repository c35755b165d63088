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


def training_set(pictures: int = 10, *, neighbours: Sequence[int] = (1, 2)) -> TrainingSet:
    """Random pictures of 8 px, each with the next two as neighbours."""
    pixels = np.random.default_rng(0).integers(0, 256, (pictures, 8, 8, 3), dtype=np.uint8)
    ids = (np.arange(pictures)[:, None] + neighbours) % pictures
    rows = TrainingRows(pictures=pixels, embeddings=tiny_models.unit_rows(pictures), neighbours=ids)
    return TrainingSet(rows, tiny_models.unit_rows(pictures))


class Interrupted:
    """Data whose batches are changed, or whose run is killed, from step ``at`` on."""

    def __init__(self, at: int, value: float | None = None) -> None:
        self.data, self.at, self.value, self.asked = training_set(), at, value, list[dict[str, int]]()

    def batch(self, step: int, **share: int) -> Batch:
        batch = self.data.batch(step, **share)
        if len(batch.images) == 1:  # counting the operations of an image is no training
            return batch
        self.asked.append({"step": step, **share})
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
    """Train a tiny network: it, its average, and what was logged."""
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
    """The same weights, bit for bit."""
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("prediction", "patch_size", "head_width", "steps", "fall"),
    [("velocity", 2, 32, 400, 4), ("sample", 4, 64, 250, 12)],
)
def test_two_images_are_learned_and_drawn_from_their_embeddings(
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
    shown = ConditioningConfig(
        neighbours=1, pool=1, fewer_neighbours=0, drop_all=0, drop_query=0, drop_neighbours=0, gap_probability=0
    )
    _, average, metrics = run(tmp_path, data, config=config, network=network, conditioning=shown, prediction=prediction)

    assert metrics["loss"][-1] < metrics["loss"][0] / fall

    pipeline = tiny_models.pipeline(
        tiny_models.database(tmp_path, tiny_models.unit_rows(2)), prediction=prediction, neighbours=1
    )
    pipeline.register_modules(transformer=average)
    batch = data.batch(0, seed=0, size=2)
    drawn = pipeline(batch.query, guidance_scale=1, generator=torch.Generator().manual_seed(0)).images
    pictures = to_model_range(torch.from_numpy(np.stack([np.array(image) for image in drawn])))
    errors = (pictures[:, None] - batch.images).square().mean((2, 3, 4))
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
def test_a_killed_run_ends_as_an_unbroken_one_bit_for_bit(tmp_path: Path, death: dict[str, Any]) -> None:
    whole, whole_average, whole_metrics = run(tmp_path / "whole")

    folder = tmp_path / "broken"
    with pytest.raises(Killed):
        run(
            folder,
            Interrupted(death["data"]) if "data" in death else None,
            checkpoints=FolderCheckpoints(folder, **death.get("checkpoints", {})),
        )
    kept = FolderCheckpoints(folder).steps
    assert (
        kept
        == {8: [4, 8] if "before" not in death.get("checkpoints", {}) else [4], 7: [4], 2: []}[death.get("data", 8)]
    )
    others = build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=99 if kept else 0)
    resumed, resumed_average, resumed_metrics = run(folder, network=others)

    require_equal(resumed, whole)
    require_equal(resumed_average, whole_average)
    assert FolderCheckpoints(folder).steps == [4, 8, 12]
    first = kept[-1] // 2 if kept else 0  # a log every two steps
    assert resumed_metrics["loss"] == whole_metrics["loss"][first:]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    _, average, _ = run(tmp_path)
    untouched = Interrupted(0)
    _, again, metrics = run(tmp_path, untouched)
    require_equal(again, average)
    assert (untouched.asked, metrics.entries) == ([], [])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_checkpoint(tmp_path: Path, value: float) -> None:
    data = Interrupted(5, value)
    network = build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=0)
    with pytest.raises(ModelError, match=r"the loss is (nan|inf) after 24 images.*lower learning_rate"):
        run(tmp_path, data, network=network)
    assert len(data.asked) == 6, "found at the next log, not at the end"
    checkpoints = FolderCheckpoints(tmp_path)
    assert checkpoints.steps == [4]
    state = torch.load(checkpoints.latest(), weights_only=True)
    assert all(weight.isfinite().all() for weight in [*state["network"].values(), *state["average"].values()])
    run(tmp_path)
    assert checkpoints.steps == [4, 8, 12], "and the run goes on from there"


class Steep(nn.Module):
    """Flow matching whose gradient is infinite, or 0 · ∞, at step ``at``, and whose loss shows nothing of it."""

    def __init__(self, at: int, factor: float) -> None:
        super().__init__()
        self.inner, self.left, self.factor = FlowMatching(CONDITIONING), at, factor

    def forward(self, network: nn.Module, batch: Batch, draw: Any) -> torch.Tensor:
        loss: torch.Tensor = self.inner(network, batch, draw)
        if len(batch.images) > 1:
            self.left -= 1
            if self.left == -1:
                weight = next(network.parameters())
                loss += self.factor * (weight - weight.detach()).sqrt().sum()
        return loss


@pytest.mark.parametrize(("factor", "norm"), [(0, "nan"), (1, "inf")])
@pytest.mark.parametrize(("at", "kept"), [(7, [4]), (11, [4, 8])])
def test_a_gradient_that_is_no_number_leaves_nothing_behind_though_the_loss_is_one(
    tmp_path: Path, factor: float, norm: str, at: int, kept: list[int]
) -> None:
    told = f"the gradient's norm is {norm} after {(at + 1) * BATCH} images.*lower learning_rate"
    with pytest.raises(ModelError, match=told):
        run(tmp_path, objective=Steep(at, factor))
    checkpoints = FolderCheckpoints(tmp_path)
    assert checkpoints.steps == kept
    run(tmp_path)
    assert checkpoints.steps == [4, 8, 12], "and a run with better luck goes on from there"


@pytest.mark.parametrize("other", [{"head_width": 32}, {"layers": 2}, {"patch_size": 2}])
def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    run(tmp_path)
    network = build_transformer(tiny_models.size(**other), embedding_dimension=tiny_models.WIDTH, seed=0)
    with pytest.raises(
        ModelError, match=r"(?s)checkpoint .*12\.pt is damaged or of another network.*remove its folder"
    ):
        run(tmp_path, network=network)


def test_a_batch_that_does_not_divide_among_the_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="batch_size 4 does not divide among 3 workers"):
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
    ],
)
def test_a_config_that_trains_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingConfig(**wrong)


def test_every_step_asks_once_for_its_share_and_leftover_images_make_no_step(tmp_path: Path) -> None:
    data = Interrupted(1_000)
    run(tmp_path, data, config=dataclasses.replace(SHORT, images=12 * BATCH + 3, seed=5))
    assert data.asked == [{"step": step, "seed": 5, "size": BATCH, "part": 0, "parts": 1} for step in range(12)]


def test_metrics_and_checkpoints_come_at_their_images(tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, images=44, log_images=10, checkpoint_images=18)  # no multiples of the batch
    _, _, metrics = run(tmp_path, config=config)
    assert FolderCheckpoints(tmp_path).steps == [5, 9]
    # Every tenth image, where a checkpoint is due (its loss is looked at first), and at the end.
    assert [images for images, _ in metrics.entries] == [12, 20, 32, 36, 40, 44]
    assert all(0.5 < loss < 5 for loss in metrics["loss"])
    assert min(metrics["images_per_s"]) > 0


def test_the_learning_rate_warms_up_and_follows_a_cosine_to_a_fiftieth(tmp_path: Path) -> None:
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


def test_what_is_returned_is_the_average_ready_for_use(tmp_path: Path) -> None:
    network, average, _ = run(tmp_path)
    assert not average.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(average.parameters(), network.parameters(), strict=True))
    network, average, _ = run(tmp_path / "no average", config=dataclasses.replace(SHORT, ema_decay=0.0))
    require_equal(average, network)


def test_a_run_follows_from_its_seed_and_not_from_the_global_state(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, _, _ = run(tmp_path / "1")
    before = torch.random.get_rng_state()
    second, _, _ = run(tmp_path / "2")
    assert torch.equal(torch.random.get_rng_state(), before)
    require_equal(first, second)


def test_the_noise_follows_from_the_seed(tmp_path: Path) -> None:
    first, same, other = (
        run(tmp_path / str(number), SameOrder(), config=dataclasses.replace(SHORT, seed=seed))[2]["loss"]
        for number, seed in enumerate((0, 0, 1))
    )
    assert first == same
    assert all(one != another for one, another in zip(first, other, strict=True))


def test_every_parameter_has_one_optimizer_and_only_the_blocks_matrices_have_muon() -> None:
    network = build_transformer(tiny_models.size(layers=2), embedding_dimension=tiny_models.WIDTH, seed=0)
    adam, muon = build_optimizers(network, SHORT)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    held = [[names[id(p)] for group in optimizer.param_groups for p in group["params"]] for optimizer in (adam, muon)]
    assert sorted(held[0] + held[1]) == sorted(names.values())
    assert all(name.startswith("transformer_blocks.") and name.endswith(".weight") for name in held[1])
    # Query, key, value and output of two attentions, two matrices of the feed-forward, in each of two blocks.
    assert len(held[1]) == 2 * (4 + 4 + 2)
    assert isinstance(muon, Muon)
    assert isinstance(adam, torch.optim.AdamW)


def test_a_constant_rate_stays_after_the_warmup(tmp_path: Path) -> None:
    config = dataclasses.replace(SHORT, schedule="constant", learning_rate=0.01, log_images=BATCH)
    rates = run(tmp_path, config=config)[2]["learning_rate"]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 9)


@pytest.mark.parametrize("pieces", [2, 4])
def test_in_pieces_a_batch_gives_the_same_weights(tmp_path: Path, pieces: int) -> None:
    whole, whole_average, metrics = run(tmp_path / "1")
    split, average, split_metrics = run(tmp_path / "2", config=dataclasses.replace(SHORT, pieces=pieces))
    assert split_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    for one, other in ((split, whole), (average, whole_average)):
        for (name, weight), expected in zip(one.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(weight, expected, atol=2e-3, rtol=1e-2, msg=name)


def test_what_codes_teach_does_not_depend_on_the_pieces(tmp_path: Path) -> None:
    size = VQTransformerConfig(codes=8, tokens=4, timesteps=6, layers=1, heads=1, head_width=16)
    pictures = np.random.default_rng(0).integers(0, 8, (10, 4))
    ids = (np.arange(10)[:, None] + (1, 2)) % 10
    rows = TrainingRows(pictures=pictures, embeddings=tiny_models.unit_rows(10), neighbours=ids)
    found = []
    for pieces in (1, 4):
        objective = MaskAndReplace(Transitions(codes=8, timesteps=6), CONDITIONING)
        network = build_vq_transformer(size, embedding_dimension=tiny_models.WIDTH, seed=0)
        config = dataclasses.replace(SHORT, images=60 * BATCH, pieces=pieces)
        data = TrainingSet(rows, tiny_models.unit_rows(10))
        run(tmp_path / str(pieces), data, config=config, network=network, objective=objective)
        found.append([objective.history, *network.parameters()])
        assert (objective.seen >= objective.WARM).all(), "times were drawn by the history"
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-2)


class Full(nn.Module):
    """Flow matching on a device that holds so many pictures and no more."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.inner, self.largest, self.sizes = FlowMatching(CONDITIONING), largest, list[int]()

    def forward(self, network: nn.Module, batch: Batch, draw: Any) -> torch.Tensor:
        if len(batch.images) > 1 or self.largest == 0:
            self.sizes.append(len(batch.images))
        if self.largest and len(batch.images) > self.largest:
            raise torch.OutOfMemoryError
        loss: torch.Tensor = self.inner(network, batch, draw)
        return loss


def test_out_of_memory_halves_the_batch_once_and_the_run_goes_on(tmp_path: Path) -> None:
    objective = Full(BATCH // 2)
    _, _, metrics = run(tmp_path / "full", objective=objective)
    assert objective.sizes == [BATCH] + [BATCH // 2] * 2 * 12, "all later steps are taken in halves at once"
    _, _, expected = run(tmp_path / "free")
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_out_of_memory_again_ends_the_run_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the cpu is out of memory at pieces=2; raise pieces, or choose a smaller"):
        run(tmp_path, objective=Full(BATCH // 4))
    one = TrainingConfig(images=3, batch_size=1, checkpoint_images=1)
    odd = dataclasses.replace(one, images=9, batch_size=3)
    with pytest.raises(ModelError, match="out of memory at pieces=1"):
        run(tmp_path, objective=Full(2), config=odd)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("model.training.loop.ema_copy", id="the average"),
        pytest.param("model.training.step.matrix_peak", id="the measure of the machine"),
        pytest.param("torch.optim.AdamW.step", id="the first step's states"),
        pytest.param("model.training.data._Window", id="the window"),
        pytest.param("torch.optim.AdamW.load_state_dict", id="a checkpoint's states"),
    ],
)
def test_memory_that_is_out_beside_the_batch_ends_the_run_with_the_mend(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    run(tmp_path, config=dataclasses.replace(SHORT, images=4 * BATCH))
    monkeypatch.setattr(where, full)
    with pytest.raises(ModelError, match=r"out of memory for (weights, optimizer states|a window) .*choose a smaller"):
        run(tmp_path)


def test_a_run_that_is_told_to_stop_keeps_the_step_in_hand_and_goes_on_from_it(tmp_path: Path) -> None:
    whole, whole_average, metrics = run(tmp_path / "whole")
    asked = iter([False] * 5 + [True])
    folder = tmp_path / "stopped"
    with pytest.raises(InterruptedTrainingError, match="stopped after 24 images; run again"):
        run(folder, stop=lambda: next(asked))
    assert FolderCheckpoints(folder).steps == [4, 6]
    resumed, average, resumed_metrics = run(folder)
    require_equal(resumed, whole)
    require_equal(average, whole_average)
    assert resumed_metrics["loss"] == metrics["loss"][3:]


def test_images_come_at_their_images_of_the_average(tmp_path: Path) -> None:
    shown: list[tuple[int, bool]] = []

    class Shown(MetricsLog):
        def grid(self, *, images: int, average: nn.Module) -> None:
            shown.append((images, average.training))

    network = build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=0)
    config = dataclasses.replace(SHORT, grid_images=18)
    train(network, FlowMatching(CONDITIONING), training_set(), config,
          checkpoints=FolderCheckpoints(tmp_path), metrics=Shown())  # fmt: skip
    assert shown == [(20, False), (36, False)]


def test_the_utilisation_is_the_speed_in_the_machines_measure(tmp_path: Path) -> None:
    _, _, metrics = run(tmp_path)
    shares = [
        used / speed for used, speed in zip(metrics["model_flops_utilisation"], metrics["images_per_s"], strict=True)
    ]
    assert 0 < min(metrics["model_flops_utilisation"]) < 1
    assert shares == pytest.approx([shares[0]] * len(shares)), "one count and one peak for the whole run"


def test_what_an_objective_learns_is_kept_with_the_checkpoint(tmp_path: Path) -> None:
    class Counting(FlowMatching):
        def __init__(self) -> None:
            super().__init__(CONDITIONING)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, network: nn.Module, batch: Batch, draw: Any) -> torch.Tensor:
            self.count += 1
            return super().forward(network, batch, draw)

    first, second = Counting(), Counting()
    run(tmp_path, objective=first, config=dataclasses.replace(SHORT, images=8 * BATCH))
    assert first.count == 8, "and counting operations is not told"
    run(tmp_path, objective=second)
    assert second.count == 12


@pytest.mark.parametrize(
    "objective", [MaskAndReplace(Transitions(codes=4, timesteps=4), CONDITIONING), AutoencoderObjective(4)]
)
def test_what_an_objective_holds_goes_where_the_network_goes(tmp_path: Path, objective: nn.Module) -> None:
    class Unread:
        def batch(self, *_: int, **__: int) -> Batch:
            raise Killed

    network = build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=0)
    with pytest.raises(Killed):
        run(tmp_path, Unread(), network=network, objective=objective, device="meta")
    assert {part.device.type for part in [*network.parameters(), *objective.buffers()]} == {"meta"}
