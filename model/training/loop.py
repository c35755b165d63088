"""The training loop: a network, an objective, data. Where metrics and checkpoints go is not its business.

Everything random in a step is drawn from (seed, step) for the whole global batch, so on one worker a run that was
killed and resumed ends with the weights of one that was not, bit for bit (on a GPU but for its kernels that add up in
no fixed order), and on several it sees the same pictures and noise.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from model.errors import ModelError
from model.training.checkpoint import restore, save
from model.training.ema import ema_copy, ema_decay, ema_update
from model.training.interfaces import Checkpoints, Metrics, Objective, TrainingConfig, TrainingData
from model.training.sharding import gather_state, shard
from model.training.step import Step, learning_rate

STOP_STEPS = 8
"""Steps between two askings whether to stop, where workers must agree: an answer makes a GPU wait."""


class InterruptedTrainingError(Exception):
    """Training was asked to stop; the checkpoint of the last step is kept."""


@contextlib.contextmanager
def _out_of_memory_as_model_error() -> Iterator[None]:
    """Of the device's, wherever no smaller batch would help: a step's own gradients are seen to in ``Step``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = "the device is out of memory for weights, optimizer states and a window of data"
        raise ModelError(f"{told}; choose a smaller network or window, or a device with more") from error


@_out_of_memory_as_model_error()
def train(
    network: nn.Module,
    objective: Objective,
    data: TrainingData,
    config: TrainingConfig,
    *,
    checkpoints: Checkpoints,
    metrics: Metrics,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> nn.Module:
    """Train ``network`` to the end of ``config`` from the latest checkpoint on; return its moving average.

    That the checkpoints are of the same config and data is for the caller to see to: they hold neither.

    Args:
        network: what learns, float32, the same initial weights on every worker.
        objective: what it learns; what it holds of its own goes to ``device``.
        data: batches on ``device``.
        config: lengths and rates.
        checkpoints: kept on rank 0, read on all.
        metrics: given values on rank 0.
        device: where to train; bfloat16 on CUDA, float32 elsewhere.
        rank: this worker.
        world: workers, between which a process group is up when there are several.
        stop: asked after every step, by several workers every ``STOP_STEPS``; True keeps a checkpoint and ends the run
            (a machine that is taken away, say).

    Raises:
        ModelError: loss or gradient is no longer finite, memory is out, or a checkpoint does not fit the network.
        InterruptedTrainingError: ``stop`` said so.
    """
    if config.batch_size % (world * config.pieces):
        told = f"batch_size {config.batch_size} does not divide among {world} workers of {config.pieces} pieces"
        raise ModelError(f"{told}; choose a multiple")
    device = torch.device(device)
    if isinstance(objective, nn.Module):
        objective.to(device)
    average = Average(network.to(device), sharded=config.sharding == "fsdp" and world > 1, device=device)
    step = Step(network.train(), objective, data, config, device, rank, world)
    kept = {"network": step.network, "average": average.network, "objective": objective}
    start = restore(checkpoints.latest(), kept, step.optimizers)
    if start >= config.steps:
        return average.whole()
    step.prepare(start)
    window = _Window(start, step)
    for number in range(start, config.steps):
        window.add(step.take(number))
        ema_update(average.network, step.network, ema_decay(number, config.ema_decay))
        seen = (number + 1) * config.batch_size
        stopping = _stopping(stop, number, world, device)
        checkpoint_due = stopping or _passes(seen, config.checkpoint_images, config)
        if checkpoint_due or _passes(seen, config.log_images, config) or number + 1 == config.steps:
            values = window.close(number + 1, config, world)
            if rank == 0:
                metrics.log(images=seen, values=values)
            if checkpoint_due:
                save(checkpoints, number + 1, kept, step.optimizers, rank=rank)
        if stopping:
            raise InterruptedTrainingError(f"stopped after {seen} images; run again to go on from there")
        if _passes(seen, config.grid_images, config):
            drawn = average.whole()
            if rank == 0:
                metrics.grid(images=seen, average=drawn)
            window.skip()
    return average.whole()


class Average:
    """The moving average of the network, split as the network is."""

    def __init__(self, network: nn.Module, *, sharded: bool, device: torch.device) -> None:
        """Start at ``network``, before it is split."""
        self.network = ema_copy(network)
        self._device, self._whole = device, self.network
        if sharded:
            self._whole = ema_copy(network).cpu()
            shard(self.network, device)

    def whole(self) -> nn.Module:
        """It with all of its weights, ready for use. All workers call this together."""
        if self._whole is not self.network:
            self._whole.load_state_dict(gather_state(self.network.state_dict()))
        return self._whole.to(self._device)


class _Window:
    """The steps since numbers were last logged."""

    def __init__(self, start: int, step: Step) -> None:
        self._step, self._taken, self._start, self._since = step, list[torch.Tensor](), start, time.monotonic()

    def add(self, taken: torch.Tensor) -> None:
        self._taken.append(taken)

    def close(self, end: int, config: TrainingConfig, world: int) -> dict[str, float]:
        """The window's numbers, and a new window.

        Raises ``ModelError`` when the loss or the gradient is no longer finite: the weights that such a gradient
        stepped show it in no loss yet, and must not be kept.
        """
        loss, norm = _mean(self._taken, world)
        for name, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                seen = end * config.batch_size
                told = f"the {name} is {value} after {seen} images; the last checkpoint is from before that"
                raise ModelError(f"{told}; train anew with a lower learning_rate")
        speed = (end - self._start) * config.batch_size / (time.monotonic() - self._since)
        self._taken, self._start, self._since = [], end, time.monotonic()
        return {
            "loss": loss,
            "learning_rate": learning_rate(end - 1, config),
            "images_per_s": speed,
            "model_flops_utilisation": speed * self._step.flops / (self._step.peak * world),
        }

    def skip(self) -> None:
        """Leave the time since the last step out of the speed."""
        if not self._taken:
            self._since = time.monotonic()


def _mean(taken: list[torch.Tensor], world: int) -> list[float]:
    """Over steps and workers: a value of any of them that is not finite makes the mean none either."""
    mean = torch.stack(taken).mean(0)
    if world > 1:
        dist.all_reduce(mean)
        mean /= world
    values: list[float] = mean.tolist()
    return values


def _stopping(stop: Callable[[], bool], number: int, world: int, device: torch.device) -> bool:
    """Whether any worker is to stop. Several ask each other every few steps only."""
    if world == 1:
        return stop()
    if (number + 1) % STOP_STEPS:
        return False
    asked = torch.tensor(float(stop()), device=device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return bool(asked)


def _passes(seen: int, every: int, config: TrainingConfig) -> bool:
    """Whether the step that ends at ``seen`` images crosses a multiple of ``every``."""
    return seen // every > (seen - config.batch_size) // every
