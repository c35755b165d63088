"""The training loop after a kill, a stop or values that are not finite: what is saved, and what a run resumes from."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from support.fakes import FolderCheckpoints, Killed
from support.training_runs import BATCH, CONDITIONING, SHORT, Interrupted, require_equal, run
from torch import nn

from model.errors import ModelError
from model.networks.dit import build_transformer
from model.training.batch import Batch
from model.training.loop import InterruptedTrainingError
from model.training.objectives.flow_matching import FlowMatching


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
