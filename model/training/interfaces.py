"""Training configuration, and the protocols for data, objective, metrics and checkpoints."""

import dataclasses
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from annotated_types import Ge, Gt, Interval
from torch import nn

from model.errors import ModelError
from model.step_random import StepRandom
from model.training.batch import Batch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Length, rates and intervals of a training run. Lengths are counted in images, independent of the batch size.

    Attributes:
        images: Images to train on, counted with repetitions.
        batch_size: Images per step over all workers and pieces.
        pieces: Parts of each worker's share of a batch, one after the other (gradient accumulation).
        learning_rate: Highest learning rate.
        schedule: Course of the learning rate after the warm-up.
        warmup_images: Images over which the learning rate grows from 0.
        weight_decay: Decay of the weights.
        gradient_clip: Largest norm of the gradients; inf for no clipping.
        ema_decay: Decay of the average of the weights that is saved.
        compile: Compile the network on CUDA. On a CPU compilation takes longer than it saves.
        bfloat16_copy: Train a bfloat16 copy on CUDA. False uses autocast, for objectives that write into the weights.
        sharding: With several workers: each has all weights (ddp), or a part of them (fsdp).
        checkpoint_images: Images between checkpoints.
        log_images: Images between logged metrics.
        grid_images: Images between sample grids.
        seed: Seed of weights, batches and noise.
        decay_images: Images at the end over which a constant learning rate falls linearly to 0.
    """

    images: Annotated[int, Ge(1)] = 40_000
    batch_size: Annotated[int, Ge(1)] = 32
    pieces: Annotated[int, Ge(1)] = 1
    learning_rate: Annotated[float, Gt(0)] = 3e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_images: Annotated[int, Ge(0)] = 1_600
    weight_decay: Annotated[float, Ge(0)] = 0.01
    gradient_clip: Annotated[float, Gt(0)] = 1.0
    ema_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.995
    compile: bool = True
    bfloat16_copy: bool = True
    sharding: Literal["ddp", "fsdp"] = "ddp"
    checkpoint_images: Annotated[int, Ge(1)] = 8_000
    log_images: Annotated[int, Ge(1)] = 640
    grid_images: Annotated[int, Ge(1)] = 8_000
    seed: Annotated[int, Ge(0)] = 0
    # Out of a stage's key unless set, so that stored artifacts keep their keys.
    decay_images: Annotated[int, Ge(0)] = dataclasses.field(default=0, metadata={"in_key": "if set"})

    def __post_init__(self) -> None:
        """Raise ``ModelError`` if a value is out of range."""
        if self.images < self.batch_size or self.batch_size < 1:
            raise ModelError(
                f"images or batch_size is too small: {self.images}, {self.batch_size}; images must be at least "
                "batch_size, and batch_size at least 1"
            )
        if self.pieces < 1 or self.batch_size % self.pieces:
            raise ModelError(
                f"batch_size is not a multiple of pieces: {self.batch_size}, {self.pieces}; change one of them"
            )
        if min(self.checkpoint_images, self.log_images, self.grid_images) < 1:
            raise ModelError(
                f"checkpoint_images, log_images or grid_images is below 1: {self.checkpoint_images}, "
                f"{self.log_images}, {self.grid_images}; give at least 1 of each"
            )
        if not 0 < self.learning_rate < math.inf or not 0 <= self.ema_decay < 1:
            raise ModelError(
                f"learning_rate or ema_decay is out of range: {self.learning_rate}, {self.ema_decay}; learning_rate "
                "must be above 0 and finite, and ema_decay in [0, 1)"
            )
        if not self.gradient_clip > 0:
            raise ModelError(f"gradient_clip is not above 0: {self.gradient_clip}; use inf for no clipping")
        if not 0 <= self.weight_decay < math.inf or self.warmup_images < 0:
            raise ModelError(
                f"weight_decay or warmup_images is out of range: {self.weight_decay}, {self.warmup_images}; both must "
                "be at least 0, and weight_decay finite"
            )
        if self.seed < 0:
            raise ModelError(f"seed is negative: {self.seed}; give at least 0")
        if not 0 <= self.decay_images <= self.images or (self.decay_images and self.schedule != "constant"):
            raise ModelError(
                f"decay_images is not valid: {self.decay_images} with schedule {self.schedule!r} and {self.images} "
                "images; give 0, or at most the images with the schedule 'constant'"
            )

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        return self.images // self.batch_size


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
