"""Optimizer steps: compute and clip the gradients of a global batch, and update the weights.

On one GPU, or on several with DDP, a bfloat16 copy of the network computes the gradients. They update the float32
weights, which are then copied back. The residual stream and the norms are thus in bfloat16. Autocast would keep them
in float32 and be limited by memory bandwidth. Sharded weights use autocast.
"""

import contextlib
import copy
import logging
import math
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model.configs import TrainingConfig
from model.errors import ModelError
from model.networks.compilation import compile_in_place
from model.step_random import StepRandom
from model.training.interfaces import LearningObjective, Objective, TrainingData
from model.training.muon import Muon
from model.training.sharding import local_shard, shard
from model.training.throughput import flops_per_image, matrix_peak

logger = logging.getLogger(__name__)

_NOISE = 3  # random stream of the noise; 1 and 2 are those of the shuffles in data.py


class Step:
    """The network in training, its optimizers, and the figures for model FLOPs utilisation.

    Attributes:
        network: The float32 network.
        optimizers: Its optimizers.
        flops: Floating-point operations per image, after :meth:`prepare`.
        peak: Measured FLOP/s of the device, after :meth:`prepare`.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        data: TrainingData,
        config: TrainingConfig,
        device: torch.device,
        rank: int,
        world: int,
    ) -> None:
        """Shard the weights if configured, and build the optimizers."""
        self.network, self.config = network, config
        self.flops, self.peak = 0, 0.0
        self._objective, self._data, self._device = objective, data, device
        self._rank, self._world, self._pieces = rank, world, config.pieces
        self._sharded, self._was_split = config.sharding == "fsdp" and world > 1, False
        on_cuda = device.type == "cuda"
        self._copied = on_cuda and config.bfloat16_copy and not self._sharded
        self._autocast = on_cuda and not self._copied
        if self._sharded:
            shard(network, device)
        self.optimizers = build_optimizers(network, config)

    def prepare(self, start: int) -> None:
        """Prepare the first step, ``start``: copy the network, count its FLOPs, compile it and wrap it for DDP.

        Call it after the weights were restored.
        """
        self._working = copy.deepcopy(self.network).to(torch.bfloat16) if self._copied else self.network
        self._weights: list[torch.Tensor] = list(self.network.parameters())
        self._copies: list[torch.Tensor] = list(self._working.parameters())
        self._count(start)
        for weight, working in zip(self._weights, self._copies, strict=True):
            weight.grad = None if working.grad is None else torch.zeros_like(weight)
        if self._device.type == "cuda" and self.config.compile:
            compile_in_place(self._working, whole=not self._sharded)
            if isinstance(self._objective, nn.Module):
                for part in self._objective.children():
                    part.compile()
        self._replica: Any = self._working
        if self._world > 1 and not self._sharded:
            self._replica = DistributedDataParallel(self._working)

    def run(self, number: int) -> torch.Tensor:
        """Run step ``number``. Return the mean loss over this worker's share and the gradient norm, (2,) float32."""
        loss = self._gradients_in_memory(number)
        norm = nn.utils.clip_grad_norm_(self._weights, self.config.gradient_clip)
        rate = learning_rate(number, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        if self._working is not self.network:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._weights)
        return torch.stack([loss, local_shard(norm)])

    def _count(self, start: int) -> None:
        """Count the operations of an image and measure the device. The gradients remain in the network."""
        seed, size = self.config.seed, self.config.batch_size
        batch = self._data.batch(start, seed=seed, size=size, part=self._rank * size // self._world, parts=size)
        rng = StepRandom(seed, start, device=self._device)
        objective = copy.deepcopy(self._objective)  # the count must not change the objective's statistics
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            self.flops = flops_per_image(lambda: objective(self._working, batch, rng))
        self.peak = matrix_peak(self._device)

    def _gradients_in_memory(self, number: int) -> torch.Tensor:
        """Compute the gradients. If memory runs out, retry once with twice as many pieces."""
        while True:
            try:
                with self._loss_collection():
                    return self._gradients(number)
            except torch.OutOfMemoryError as error:
                self._split_further(error)
            torch.cuda.empty_cache()  # outside the handler, because the exception keeps the activations alive

    def _loss_collection(self) -> contextlib.AbstractContextManager[None]:
        objective = self._objective
        return objective.collecting_losses() if isinstance(objective, LearningObjective) else contextlib.nullcontext()

    def _split_further(self, error: torch.OutOfMemoryError) -> None:
        # Not with several workers: one that restarts its step would deadlock with the others.
        if self._was_split or self._world > 1 or self.config.batch_size % (2 * self._pieces):
            message = f"{self._device.type} is out of memory at pieces={self._pieces}"
            raise ModelError(f"{message}; increase pieces, or choose a smaller batch_size or network") from error
        self._pieces, self._was_split = 2 * self._pieces, True
        logger.warning("%s is out of memory; continuing with pieces=%d", self._device, self._pieces)

    def _gradients(self, number: int) -> torch.Tensor:
        losses = []
        for piece in range(self._pieces):
            part, parts = self._rank * self._pieces + piece, self._world * self._pieces
            seed, size = self.config.seed, self.config.batch_size
            batch = self._data.batch(number, seed=seed, size=size, part=part, parts=parts)
            rng = StepRandom(seed, number, stream=_NOISE, part=part, parts=parts, device=self._device)
            if piece == 0 or self._working is not self.network:  # else the gradients of the pieces accumulate in place
                self._working.zero_grad()
            with self._gradient_sync(last=piece + 1 == self._pieces):
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
                    loss = self._objective(self._replica, batch, rng) / self._pieces
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            if self._working is not self.network:
                self._collect(first=piece == 0)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _collect(self, *, first: bool) -> None:
        """Move the gradients of a piece from the copy to the weights.

        Pieces are summed in float32, because bfloat16 sums lose small terms.
        """
        targets, sources = [], []
        for weight, copy_ in zip(self._weights, self._copies, strict=True):
            if weight.grad is not None and copy_.grad is not None:
                targets.append(weight.grad)
                sources.append(copy_.grad)
            elif weight.grad is not None and first:
                weight.grad.zero_()
        collect = torch._foreach_copy_ if first else torch._foreach_add_
        collect(targets, sources)

    def _gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context of a piece: gradients are synchronised at the last piece of a step.

        Gradients of a bfloat16 copy are synchronised at every piece, because each piece is collected.
        """
        if self._sharded:
            self._replica.set_requires_gradient_sync(last)
        if last or self._working is not self.network or not isinstance(self._replica, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._replica.no_sync()


def build_optimizers(network: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Build AdamW for embeddings, heads, norms and biases, and Muon for the matrices inside the blocks, if any.

    With this project's networks, Muon reaches the same loss with fewer images than AdamW. Its updates are scaled like
    those of AdamW, so both share one learning rate (Moonshot 2502.16982, §2.2).
    """
    blocks = [p for name, p in network.named_parameters() if "blocks." in name and p.ndim == 2 and min(p.shape) > 8]
    block_ids = {id(parameter) for parameter in blocks}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in block_ids]
    decay = config.weight_decay
    # None lets torch choose. The setting is saved in the checkpoint: False from a CPU would still apply on a GPU.
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=decay, fused=rest[0].is_cuda or None)
    optimizers: list[torch.optim.Optimizer] = [adam]
    if blocks:
        optimizers.append(Muon(blocks, weight_decay=decay))
    return optimizers


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of ``step``: linear warmup, then a cosine to 2% of the peak, or constant and a decay."""
    images_seen = step * config.batch_size
    peak = config.learning_rate * min(1.0, (images_seen + config.batch_size) / max(config.warmup_images, 1))
    if config.schedule == "constant":
        remaining = (config.steps - step) * config.batch_size
        return peak * min(1.0, remaining / config.decay_images) if config.decay_images else peak
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))
