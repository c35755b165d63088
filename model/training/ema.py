"""Exponential moving average of weights, with a warmup that quickly forgets the initial weights."""

import copy

import torch
from torch import nn

from model.training.sharding import local_shard


def ema_decay(step: int, decay: float) -> float:
    """Return the decay at ``step`` (0, 1, …): (step + 1)/(step + 10), at most ``decay``."""
    return min(decay, (step + 1) / (step + 10))


def ema_copy(network: nn.Module) -> nn.Module:
    """Copy ``network`` for use as the average: without gradients, in evaluation mode."""
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def ema_update(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Set average ← decay·average + (1 − decay)·network. Buffers are copied."""
    old_parts, new_parts = ([local_shard(p) for p in module.parameters()] for module in (average, network))
    torch._foreach_lerp_(old_parts, new_parts, 1 - decay)
    for old, new in zip(average.buffers(), network.buffers(), strict=True):
        old.copy_(new)
