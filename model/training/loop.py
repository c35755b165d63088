"""The training loop: a network, data, and two Protocols. Where metrics and checkpoints go is not its business.

Everything random in a step is drawn from (seed, step, rank), so on one worker a run that was killed and resumed ends
with the weights of one that was not, bit for bit.
"""

import dataclasses
import math
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model.diffusion.conditioning import ConditioningConfig, training_condition
from model.diffusion.continuous import Denoiser, Prediction, flow_matching_loss, sample_sigmas
from model.errors import ModelError
from model.networks.dit import as_denoiser
from model.training.data import Batch, step_generator
from model.training.ema import ema_copy, ema_decay, ema_update


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How long and how fast. Lengths are counted in images, so they do not change with the batch."""

    images: int = 40_000
    batch_size: int = 32  # global, over all workers
    learning_rate: float = 3e-3
    warmup_images: int = 1_600
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    ema_decay: float = 0.995
    checkpoint_images: int = 8_000
    log_images: int = 640
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what would train nothing."""
        if self.images < self.batch_size or self.batch_size < 1:
            raise ValueError("images must be at least one batch_size, and batch_size at least 1")
        if min(self.checkpoint_images, self.log_images) < 1:
            raise ValueError("checkpoint_images and log_images must be at least 1")
        if self.learning_rate <= 0 or not 0 <= self.ema_decay < 1:
            raise ValueError("learning_rate must be above 0 and ema_decay in [0, 1)")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.images // self.batch_size


class TrainingData(Protocol):
    """Where batches come from."""

    def batch(self, step: int, *, seed: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        """One worker's share of a global batch."""
        ...


class Metrics(Protocol):
    """Where numbers go."""

    def log(self, *, images: int, values: dict[str, float]) -> None:
        """Take the values at ``images`` images seen."""
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


def train(
    network: nn.Module,
    data: TrainingData,
    config: TrainingConfig,
    conditioning: ConditioningConfig,
    *,
    prediction: Prediction,
    checkpoints: Checkpoints,
    metrics: Metrics,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
) -> nn.Module:
    """Train ``network`` to the end of ``config`` from the latest checkpoint on; return its moving average.

    Args:
        network: the transformer, the same initial weights on every worker.
        data: batches.
        config: lengths and rates.
        conditioning: what is hidden how often.
        prediction: what the network's output means.
        checkpoints: kept on rank 0, read on all.
        metrics: given values on rank 0.
        device: where to train; bf16 autocast on CUDA, float32 elsewhere.
        rank: this worker.
        world: workers, between which a process group is up when there are several.

    Raises:
        ModelError: the loss is no longer finite, or a checkpoint does not fit the network.
    """
    if config.batch_size % world:
        raise ModelError(f"batch_size {config.batch_size} does not divide among {world} workers; choose a multiple")
    device = torch.device(device)
    network = network.to(device).train()
    average = ema_copy(network)
    optimizers = build_optimizers(network, config)
    start = _restore(checkpoints.latest(), network, average, optimizers, device)
    replica = DistributedDataParallel(network) if world > 1 else network

    denoiser = as_denoiser(replica, prediction)
    losses: list[torch.Tensor] = []
    logged_at, logged_step = time.monotonic(), start
    for step in range(start, config.steps):
        rate = _learning_rate(step, config)
        loss = _loss(denoiser, data, step, config, conditioning, device, rank, world)
        _optimize(optimizers, network, loss, rate, config)
        ema_update(average, network, ema_decay(step, config.ema_decay))
        losses.append(loss.detach())
        seen = (step + 1) * config.batch_size
        checkpoint_due = _passes(seen, config.checkpoint_images, config)
        if checkpoint_due or _passes(seen, config.log_images, config) or step + 1 == config.steps:
            value = _mean_loss(losses, world)
            if not math.isfinite(value):
                raise ModelError(f"the loss is {value} after {seen} images; lower learning_rate and run again")
            speed = (step + 1 - logged_step) * config.batch_size / (time.monotonic() - logged_at)
            if rank == 0:
                metrics.log(images=seen, values={"loss": value, "learning_rate": rate, "images_per_s": speed})
            losses, logged_at, logged_step = [], time.monotonic(), step + 1
            if rank == 0 and checkpoint_due:
                _save(checkpoints, step + 1, network, average, optimizers)
    return average


def build_optimizers(network: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else (embeddings, heads, norms, biases).

    Muon's orthogonalised steps reach the same loss in fewer images here; its rate is matched to AdamW's scale, so one
    learning rate serves both (Moonshot 2502.16982, §2.2).
    """
    blocks = [p for name, p in network.named_parameters() if "blocks." in name and p.ndim == 2 and min(p.shape) > 8]
    inside = {id(parameter) for parameter in blocks}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in inside]
    decay = config.weight_decay
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=decay)]
    if blocks:
        optimizers.append(torch.optim.Muon(blocks, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warmup, then a cosine to 2% of the peak."""
    seen = step * config.batch_size
    warm = min(1.0, (seen + config.batch_size) / max(config.warmup_images, 1))
    return config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))


def _loss(
    denoiser: Denoiser,
    data: TrainingData,
    step: int,
    config: TrainingConfig,
    conditioning: ConditioningConfig,
    device: torch.device,
    rank: int,
    world: int,
) -> torch.Tensor:
    """The loss of this worker's share, with noise of its own: drawn from the seed, the step and the rank."""
    batch = data.batch(step, seed=config.seed, size=config.batch_size, rank=rank, world=world)
    generator = step_generator(config.seed, step * world + rank, 2)
    condition = training_condition(batch.query, batch.neighbours, conditioning, generator)
    sigma = sample_sigmas(len(batch.images), generator)
    noise = torch.randn(batch.images.shape, generator=generator)
    images, condition, sigma, noise = (tensor.to(device) for tensor in (batch.images, condition, sigma, noise))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return flow_matching_loss(denoiser, images, condition, sigma, noise)


def _optimize(
    optimizers: list[torch.optim.Optimizer],
    network: nn.Module,
    loss: torch.Tensor,
    rate: float,
    config: TrainingConfig,
) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = rate
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(network.parameters(), config.gradient_clip)
    for optimizer in optimizers:
        optimizer.step()


def _mean_loss(losses: list[torch.Tensor], world: int) -> float:
    mean = torch.stack(losses).mean()
    if world > 1:
        dist.all_reduce(mean)
        mean /= world
    return float(mean)


def _passes(seen: int, every: int, config: TrainingConfig) -> bool:
    """Whether the step that ends at ``seen`` images crosses a multiple of ``every``."""
    return seen // every > (seen - config.batch_size) // every


def _save(
    checkpoints: Checkpoints,
    step: int,
    network: nn.Module,
    average: nn.Module,
    optimizers: list[torch.optim.Optimizer],
) -> None:
    path = checkpoints.scratch()
    torch.save(
        {
            "step": step,
            "network": network.state_dict(),
            "average": average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        },
        path,
    )
    checkpoints.save(step, path)


def _restore(
    path: Path | None,
    network: nn.Module,
    average: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    device: torch.device,
) -> int:
    if path is None:
        return 0
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
    except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        told = f"checkpoint {path} is damaged or of another network ({reason}); remove its folder to start anew"
        raise ModelError(told) from error
    return int(state["step"])
