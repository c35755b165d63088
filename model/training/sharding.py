"""Sharding of parameters over workers (FSDP, Zhao et al. 2304.11277), and gathering of sharded tensors.

Each worker has a part of every parameter, and of its gradient, optimizer state and moving average. It gathers the
parameters of a block just before the block runs. Checkpoints are unsharded, so they load with or without sharding.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._pytree import tree_map_only

from model.networks.compilation import transformer_blocks


def shard(network: nn.Module, device: torch.device) -> None:
    """Shard ``network`` in place over all workers: each block, then the rest."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in transformer_blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def gather_state(state: Any) -> Any:
    """Gather all sharded tensors of a nested structure on the CPU. Collective: every rank must call it."""
    return tree_map_only(DTensor, lambda part: part.full_tensor().cpu(), state)


def shard_like(state: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor as ``like`` is sharded. Return it unchanged if ``like`` is unsharded or of another shape."""
    if not isinstance(like, DTensor) or state.shape != like.shape:
        return state
    replicated = DTensor.from_local(state.to(like.device), like.device_mesh, [Replicate()], run_check=False)
    return replicated.redistribute(placements=like.placements)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this worker's part of a sharded tensor, with shared memory, or an unsharded tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
