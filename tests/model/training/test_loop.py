"""The training loop: what it learns, logs and saves, its learning rate, and the randomness it depends on."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models
from support.fakes import FolderCheckpoints, Killed, MetricsLog
from support.training_runs import BATCH, CONDITIONING, SHORT, Interrupted, require_equal, run, training_set
from torch import nn

from model.configs import ConditioningConfig, TrainingConfig
from model.diffusion.flow_matching import Prediction
from model.diffusion.vq_diffusion import Transitions
from model.errors import ModelError
from model.images import to_model_range
from model.networks.dit import build_transformer
from model.training.batch import Batch
from model.training.loop import train
from model.training.muon import Muon
from model.training.objectives.autoencoder import AutoencoderObjective
from model.training.objectives.flow_matching import FlowMatching
from model.training.objectives.vq_diffusion import MaskAndReplace
from model.training.step import build_optimizers


class SameOrder:
    """Data whose batches are the same for every seed."""

    def batch(self, step: int, *, seed: int, **share: int) -> Batch:
        return training_set().batch(step, seed=0, **share)


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
