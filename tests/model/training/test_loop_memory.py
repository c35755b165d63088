"""The training loop with limited memory: batches in pieces, and errors that say what to change."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models
from support.training_runs import BATCH, CONDITIONING, SHORT, run
from torch import nn

from model.configs import TrainingConfig
from model.diffusion.vq_diffusion import Transitions
from model.errors import ModelError
from model.networks.vq_transformer import VQTransformerConfig, build_vq_transformer
from model.training.batch import Batch
from model.training.data import TrainingRows, TrainingSet
from model.training.objectives.flow_matching import FlowMatching
from model.training.objectives.vq_diffusion import MaskAndReplace


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
