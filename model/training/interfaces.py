"""Protocols for data, objective, metrics and checkpoints of a training run."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from model.configs import TrainingConfig
from model.step_random import StepRandom
from model.training.batch import Batch

__all__ = ["Checkpoints", "LearningObjective", "Metrics", "Objective", "TrainingConfig", "TrainingData"]


class TrainingData(Protocol):
    """Source of training batches."""

    def batch(self, step: int, *, seed: int, size: int, part: int = 0, parts: int = 1) -> Batch:
        """Return part ``part`` of ``parts`` of the global batch of ``size`` images at ``step``."""
        ...


class Objective(Protocol):
    """The loss that training minimises: a module whose state is saved in the checkpoint.

    Its child modules must be pure functions of tensors, because they are compiled together with the network.
    """

    def __call__(self, network: nn.Module, batch: Batch, rng: StepRandom) -> torch.Tensor:
        """Return the mean loss of ``batch``, a scalar."""
        ...


@runtime_checkable
class LearningObjective(Objective, Protocol):
    """An objective with statistics of its losses, updated once per step regardless of the number of pieces."""

    def collecting_losses(self) -> AbstractContextManager[None]:
        """Return a context for all pieces of a step. A step that fails does not update the statistics."""
        ...


class Metrics(Protocol):
    """Destination of logged values and sample grids."""

    def log(self, *, images: int, values: dict[str, float]) -> None:
        """Log ``values`` after training on ``images`` images."""
        ...

    def grid(self, *, images: int, average: nn.Module) -> None:
        """Log samples of the averaged network after training on ``images`` images. May do nothing."""
        ...


class Checkpoints(Protocol):
    """Storage of checkpoints. ``save`` is atomic, and ``latest`` is the newest complete checkpoint."""

    def latest(self) -> Path | None:
        """Return the latest checkpoint file, or None if there is none."""
        ...

    def save(self, step: int, state: Path) -> None:
        """Store the file ``state`` as the checkpoint of ``step``."""
        ...

    def scratch(self) -> Path:
        """Return a path to write the next state to."""
        ...
