"""What the training loop is told, and what it asks of those who feed it and keep what it makes."""

import dataclasses
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn

from model.step_random import StepRandom
from model.training.batch import Batch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How long and how fast. Lengths are counted in images, so they do not change with the batch."""

    images: int = 40_000
    batch_size: int = 32  # global, over all workers and their pieces
    pieces: int = 1  # of each worker's share, one after the other: gradient accumulation
    learning_rate: float = 3e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_images: int = 1_600
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    ema_decay: float = 0.995
    compile: bool = True  # on CUDA; a CPU compiles for longer than it saves
    bfloat16_copy: bool = True  # on CUDA; False computes under autocast, for objectives that write into the weights
    sharding: Literal["ddp", "fsdp"] = "ddp"  # of several workers: each holds all weights, or a part of them
    checkpoint_images: int = 8_000
    log_images: int = 640
    grid_images: int = 8_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what would train nothing."""
        if self.images < self.batch_size or self.batch_size < 1:
            raise ValueError("images must be at least one batch_size, and batch_size at least 1")
        if self.pieces < 1 or self.batch_size % self.pieces:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {self.pieces} pieces")
        if min(self.checkpoint_images, self.log_images, self.grid_images) < 1:
            raise ValueError("checkpoint_images, log_images and grid_images must be at least 1")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.ema_decay < 1:
            raise ValueError("learning_rate must be above 0 and finite, and ema_decay in [0, 1)")
        if not self.gradient_clip > 0:
            raise ValueError("gradient_clip must be above 0; inf clips nothing")
        if not 0 <= self.weight_decay < math.inf or self.warmup_images < 0:
            raise ValueError("weight_decay must be at least 0 and finite, and warmup_images at least 0")
        if self.seed < 0:
            raise ValueError("seed must be at least 0")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.images // self.batch_size


class TrainingData(Protocol):
    """Where batches come from."""

    def batch(self, step: int, *, seed: int, size: int, part: int = 0, parts: int = 1) -> Batch:
        """One part of a global batch."""
        ...


class Objective(Protocol):
    """What a step minimises: a module, whose own state is kept with the checkpoint.

    The modules in it are functions of tensors alone, which are compiled where the network is.
    """

    def __call__(self, network: nn.Module, batch: Batch, rng: StepRandom) -> torch.Tensor:
        """Mean loss of ``batch``, a scalar."""
        ...


@runtime_checkable
class LearningObjective(Objective, Protocol):
    """One that learns of its losses: of those of a whole step, in however many pieces it is taken."""

    def collecting_losses(self) -> AbstractContextManager[None]:
        """Around all pieces of a step; of one that fails nothing is learned."""
        ...


class Metrics(Protocol):
    """Where numbers and pictures go."""

    def log(self, *, images: int, values: dict[str, float]) -> None:
        """Take the values at ``images`` images seen."""
        ...

    def grid(self, *, images: int, average: nn.Module) -> None:
        """Draw samples of the averaged network at ``images`` images seen, if wanted."""
        ...


class Checkpoints(Protocol):
    """Where state is kept. ``save`` is all-or-nothing; ``latest`` is the newest whole one."""

    def latest(self) -> Path | None:
        """A file that ``save`` was given, or None."""
        ...

    def save(self, step: int, state: Path) -> None:
        """Keep ``state`` as the checkpoint of ``step``."""
        ...

    def scratch(self) -> Path:
        """A file to write the next state to."""
        ...
