"""One optimizer step after another: the gradients of a global batch, clipped, into the weights.

On one GPU, or on several under DDP, the network that computes is a bfloat16 copy; its gradients step the float32
weights, which are copied back. This keeps the residual stream and the norms in bfloat16, where autocast would hold them
in float32 and wait for memory. Sharded weights compute under autocast.
"""

import contextlib
import copy
import logging
import math
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model.errors import ModelError
from model.networks.compilation import compile_in_place
from model.step_random import StepRandom
from model.training.interfaces import LearningObjective, Objective, TrainingConfig, TrainingData
from model.training.muon import Muon
from model.training.sharding import local_shard, shard
from model.training.throughput import flops_per_image, matrix_peak

logger = logging.getLogger(__name__)

_NOISE = 3  # the stream of randomness; 1 and 2 shuffle


class Step:
    """The network under training, its optimizers, and how fast it could be."""

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
        """Split the weights if the config says so, and build the optimizers."""
        self.network, self.config = network, config
        self.flops, self.peak = 0, 0.0
        self._objective, self._data, self._device = objective, data, device
        self._rank, self._world, self._pieces = rank, world, config.pieces
        self._sharded, self._halved = config.sharding == "fsdp" and world > 1, False
        on_cuda = device.type == "cuda"
        self._copied = on_cuda and config.bfloat16_copy and not self._sharded
        self._autocast = on_cuda and not self._copied
        if self._sharded:
            shard(network, device)
        self.optimizers = build_optimizers(network, config)

    def prepare(self, start: int) -> None:
        """Copy, count, compile and wrap: after the weights were restored."""
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

    def take(self, number: int) -> torch.Tensor:
        """Step ``number``; its mean loss over this worker's share and the norm of its gradient, (2,) float32."""
        loss = self._fitting_gradients(number)
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
        """Count the operations of an image, leaving its gradients, and measure the machine."""
        seed, size = self.config.seed, self.config.batch_size
        batch = self._data.batch(start, seed=seed, size=size, part=self._rank * size // self._world, parts=size)
        rng = StepRandom(seed, start, device=self._device)
        objective = copy.deepcopy(self._objective)  # counting teaches it nothing
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            self.flops = flops_per_image(lambda: objective(self._working, batch, rng))
        self.peak = matrix_peak(self._device)

    def _fitting_gradients(self, number: int) -> torch.Tensor:
        """The gradients; when memory is out, once more in twice as many pieces."""
        while True:
            try:
                with self._one_step():
                    return self._gradients(number)
            except torch.OutOfMemoryError as error:
                self._halve(error)
            torch.cuda.empty_cache()  # out of the handler: the error held the activations

    def _one_step(self) -> contextlib.AbstractContextManager[None]:
        objective = self._objective
        return objective.collecting_losses() if isinstance(objective, LearningObjective) else contextlib.nullcontext()

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        # One worker that starts its step again would wait for the others for ever.
        if self._halved or self._world > 1 or self.config.batch_size % (2 * self._pieces):
            told = f"the {self._device.type} is out of memory at pieces={self._pieces}"
            raise ModelError(f"{told}; raise pieces, or choose a smaller batch_size or network") from error
        self._pieces, self._halved = 2 * self._pieces, True
        logger.warning("%s is out of memory; training on with pieces=%d", self._device, self._pieces)

    def _gradients(self, number: int) -> torch.Tensor:
        losses = []
        for piece in range(self._pieces):
            part, parts = self._rank * self._pieces + piece, self._world * self._pieces
            seed, size = self.config.seed, self.config.batch_size
            batch = self._data.batch(number, seed=seed, size=size, part=part, parts=parts)
            rng = StepRandom(seed, number, stream=_NOISE, part=part, parts=parts, device=self._device)
            if piece == 0 or self._working is not self.network:  # else the pieces' gradients add up where they are
                self._working.zero_grad()
            with self._sharing(last=piece + 1 == self._pieces):
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
                    loss = self._objective(self._replica, batch, rng) / self._pieces
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            if self._working is not self.network:
                self._collect(first=piece == 0)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _collect(self, *, first: bool) -> None:
        """Take a piece's gradients from the copy. Several are added up in float32: bfloat16 loses small summands."""
        own, copied = [], []
        for weight, copy_ in zip(self._weights, self._copies, strict=True):
            if weight.grad is not None and copy_.grad is not None:
                own.append(weight.grad)
                copied.append(copy_.grad)
            elif weight.grad is not None and first:
                weight.grad.zero_()
        collect = torch._foreach_copy_ if first else torch._foreach_add_
        collect(own, copied)

    def _sharing(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Workers add their gradients up at the last piece of a step; a copy's at each, since each is collected."""
        if self._sharded:
            self._replica.set_requires_gradient_sync(last)
        if last or self._working is not self.network or not isinstance(self._replica, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._replica.no_sync()


def build_optimizers(network: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else (embeddings, heads, norms, biases).

    Muon's orthogonalised steps reach the same loss in fewer images here; its rate is matched to AdamW's scale, so one
    learning rate serves both (Moonshot 2502.16982, §2.2).
    """
    blocks = [p for name, p in network.named_parameters() if "blocks." in name and p.ndim == 2 and min(p.shape) > 8]
    inside = {id(parameter) for parameter in blocks}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in inside]
    decay = config.weight_decay
    # None lets torch choose, also where a checkpoint goes on on another device: it keeps what was told.
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=decay, fused=rest[0].is_cuda or None)
    optimizers: list[torch.optim.Optimizer] = [adam]
    if blocks:
        optimizers.append(Muon(blocks, weight_decay=decay))
    return optimizers


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of ``step``: linear warmup, then constant or a cosine to 2% of the peak."""
    seen = step * config.batch_size
    peak = config.learning_rate * min(1.0, (seen + config.batch_size) / max(config.warmup_images, 1))
    if config.schedule == "constant":
        return peak
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))
