"""Parameters split over workers (FSDP, Zhao et al. 2304.11277), and made whole again where something needs all of them.

Each worker keeps a part of every parameter, of its gradient, of its optimizer's state and of its average, and gathers a
block's parameters just before the block runs. What is kept in a checkpoint is whole, so one loads with or without.
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
    """Split ``network`` in place over all workers: block by block, and the rest."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in transformer_blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def gather_state(state: Any) -> Any:
    """A nest of tensors with every split one gathered, on the CPU. All workers call it together."""
    return tree_map_only(DTensor, lambda part: part.full_tensor().cpu(), state)


def shard_like(state: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split as ``like`` is; as it is when ``like`` is whole too, or of another shape."""
    if not isinstance(like, DTensor) or state.shape != like.shape:
        return state
    everywhere = DTensor.from_local(state.to(like.device), like.device_mesh, [Replicate()], run_check=False)
    return everywhere.redistribute(placements=like.placements)


def local_shard(tensor: Tensor) -> Tensor:
    """This worker's part of a split tensor, sharing its memory; a whole tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
