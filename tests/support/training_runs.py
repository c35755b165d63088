"""Short runs of the training loop with a tiny network."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import tiny_models
from support.fakes import FolderCheckpoints, Killed, MetricsLog
from torch import nn

from model.configs import ConditioningConfig
from model.diffusion.flow_matching import Prediction
from model.networks.dit import build_transformer
from model.training.batch import Batch
from model.training.data import TrainingRows, TrainingSet
from model.training.interfaces import TrainingConfig, TrainingData
from model.training.loop import train
from model.training.objectives.flow_matching import FlowMatching

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
