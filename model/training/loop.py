"""The training loop. Metrics and checkpoints go through protocols, so the loop does not depend on their storage.

All randomness of a step is a function of (seed, step) for the whole global batch. With one worker, a resumed run ends
with bitwise the same weights as an uninterrupted one, except for GPU kernels without a fixed order of summation. With
several workers, it uses the same images and noise.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from model.configs import TrainingConfig
from model.errors import ModelError
from model.training.checkpoint import restore, save
from model.training.ema import ema_copy, ema_decay, ema_update
from model.training.interfaces import Checkpoints, Metrics, Objective, TrainingData
from model.training.sharding import gather_state, shard
from model.training.step import Step, learning_rate

STOP_STEPS = 8
"""Steps between stop checks of several workers, which must agree: each check stalls the GPU."""


class InterruptedTrainingError(Exception):
    """Raised when training stops on request, after it saved a checkpoint of the last step."""


@contextlib.contextmanager
def _out_of_memory_as_model_error() -> Iterator[None]:
    """Translate out-of-memory errors that a smaller batch would not prevent. ``Step`` handles those of a batch."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        message = f"out of memory for weights, optimizer states or a window of data: {reason}"
        raise ModelError(f"{message}; choose a smaller network or window, or a device with more memory") from error


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
    """Train ``network`` from the latest checkpoint to the end of ``config``, and return its moving average.

    The caller must ensure that the checkpoints belong to the same config and data, because they contain neither.

    Args:
        network: The network to train, float32, with the same initial weights on every worker.
        objective: The loss to minimise. If it is a module, it is moved to ``device``.
        data: Source of batches on ``device``.
        config: Length, rates and intervals.
        checkpoints: Storage of checkpoints, written by rank 0 and read by all.
        metrics: Destination of values and grids, called on rank 0 only.
        device: Training device: bfloat16 on CUDA, float32 elsewhere. Default: "cpu".
        rank: Rank of this worker. Default: 0.
        world: Number of workers. With several, a process group must be initialised. Default: 1.
        stop: Return True to save a checkpoint and end the run, e.g. when the machine is preempted. It is called after
            every step, or with several workers every ``STOP_STEPS`` steps. Default: never stop.

    Raises:
        ModelError: Loss or gradient is not finite, memory is exhausted, or a checkpoint does not fit the network.
        InterruptedTrainingError: ``stop`` returned True.
    """
    if config.batch_size % (world * config.pieces):
        message = f"batch_size is not a multiple of workers × pieces: {config.batch_size}, {world} × {config.pieces}"
        raise ModelError(f"{message}; change one of them")
    device = torch.device(device)
    if isinstance(objective, nn.Module):
        objective.to(device)
    average = Average(network.to(device), sharded=config.sharding == "fsdp" and world > 1, device=device)
    step = Step(network.train(), objective, data, config, device, rank, world)
    modules = {"network": step.network, "average": average.network, "objective": objective}
    start = restore(checkpoints.latest(), modules, step.optimizers)
    if start >= config.steps:
        return average.unsharded()
    step.prepare(start)
    window = _Window(start, step)
    for number in range(start, config.steps):
        window.add(step.run(number))
        ema_update(average.network, step.network, ema_decay(number, config.ema_decay))
        images_seen = (number + 1) * config.batch_size
        stopping = _stopping(stop, number, world, device)
        checkpoint_due = stopping or _passes(images_seen, config.checkpoint_images, config)
        if checkpoint_due or _passes(images_seen, config.log_images, config) or number + 1 == config.steps:
            values = window.close(number + 1, config, world)
            if rank == 0:
                metrics.log(images=images_seen, values=values)
            if checkpoint_due:
                save(checkpoints, number + 1, modules, step.optimizers, rank=rank)
        if stopping:
            raise InterruptedTrainingError(f"stopped after {images_seen} images; run again to resume")
        if _passes(images_seen, config.grid_images, config):
            full = average.unsharded()
            if rank == 0:
                metrics.grid(images=images_seen, average=full)
            window.skip()
    return average.unsharded()


class Average:
    """The moving average of the network, sharded as the network is."""

    def __init__(self, network: nn.Module, *, sharded: bool, device: torch.device) -> None:
        """Start at the weights of ``network``, which must not be sharded yet."""
        self.network = ema_copy(network)
        self._device, self._whole = device, self.network
        if sharded:
            self._whole = ema_copy(network).cpu()
            shard(self.network, device)

    def unsharded(self) -> nn.Module:
        """Return the averaged network with unsharded weights. Collective: every rank must call it."""
        if self._whole is not self.network:
            self._whole.load_state_dict(gather_state(self.network.state_dict()))
        return self._whole.to(self._device)


class _Window:
    """The steps since values were last logged."""

    def __init__(self, start: int, step: Step) -> None:
        self._step, self._results, self._start, self._since = step, list[torch.Tensor](), start, time.monotonic()

    def add(self, result: torch.Tensor) -> None:
        self._results.append(result)

    def close(self, end: int, config: TrainingConfig, world: int) -> dict[str, float]:
        """Return the values of the window, and start a new one.

        Raises ``ModelError`` if the loss or the gradient norm is not finite. A gradient that is not finite breaks the
        weights one step before the loss shows it, and such weights must not be saved.
        """
        loss, norm = _mean(self._results, world)
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                images_seen = end * config.batch_size
                message = f"training diverged: the {name} is {value} after {images_seen} images"
                raise ModelError(f"{message}; train from scratch with a lower learning_rate")
        speed = (end - self._start) * config.batch_size / (time.monotonic() - self._since)
        self._results, self._start, self._since = [], end, time.monotonic()
        return {
            "loss": loss,
            "learning_rate": learning_rate(end - 1, config),
            "images_per_s": speed,
            "model_flops_utilisation": speed * self._step.flops / (self._step.peak * world),
        }

    def skip(self) -> None:
        """Exclude the time since the last step from the speed."""
        if not self._results:
            self._since = time.monotonic()


def _mean(results: list[torch.Tensor], world: int) -> list[float]:
    """Return the mean over steps and workers. It is not finite if any of the values is not."""
    mean = torch.stack(results).mean(0)
    if world > 1:
        dist.all_reduce(mean)
        mean /= world
    values: list[float] = mean.tolist()
    return values


def _stopping(stop: Callable[[], bool], number: int, world: int, device: torch.device) -> bool:
    """Return True if a stop was requested on any worker. Several workers check only every ``STOP_STEPS`` steps."""
    if world == 1:
        return stop()
    if (number + 1) % STOP_STEPS:
        return False
    requested = torch.tensor(float(stop()), device=device)
    dist.all_reduce(requested, dist.ReduceOp.MAX)
    return bool(requested)


def _passes(images_seen: int, every: int, config: TrainingConfig) -> bool:
    """Return True if the step that ends at ``images_seen`` images crosses a multiple of ``every``."""
    return images_seen // every > (images_seen - config.batch_size) // every
