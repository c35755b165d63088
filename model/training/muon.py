"""Muon (Jordan et al. 2024) for all matrices of one shape at once.

``torch.optim.Muon`` takes one matrix after the other. A transformer has few shapes and many matrices, each too small to
fill a GPU, so that step waits for launches: 61 ms for the 100 matrices of a 10 × 384 transformer on an H100, while the
forward and backward pass of 512 pictures took 76 ms. The mathematics and the defaults are torch's; a test holds the two
against each other.

Legend: ``n`` matrices of one shape, ``A × B`` their shape.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.training.sharding import local_shard, shard_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose iteration drives singular values towards 1, steep at zero (Jordan et al. 2024)."""
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised, with decoupled weight decay; the rate is matched to AdamW's scale.

    One learning rate serves Muon and AdamW alike: an update has the root mean square 0.2 (Moonshot 2502.16982, §2.2).
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        """Step ``parameters``, all of two dimensions; raises ``ValueError`` for any other."""
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for parameter in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
            if parameter.ndim != 2:
                raise ValueError(f"Muon steps matrices; a parameter of shape {tuple(parameter.shape)} is none")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient. A ``closure`` is refused: there is nothing to search."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                self._step(parameters, shape, group)

    def _step(self, parameters: list[Tensor], shape: torch.Size, group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
        buffers = [local_shard(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        momenta = torch._foreach_lerp(gradients, buffers, group["momentum"])
        updates = orthogonalised(torch.stack([_whole(*pair) for pair in zip(momenta, parameters, strict=True)]))
        rate = group["lr"] * 0.2 * math.sqrt(max(shape))
        own = [local_shard(parameter) for parameter in parameters]
        torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
        steps = zip(updates.to(own[0].dtype), parameters, strict=True)
        torch._foreach_add_(
            own, [local_shard(shard_like(update, parameter)) for update, parameter in steps], alpha=-rate
        )


def _whole(part: Tensor, like: Tensor) -> Tensor:
    """A worker's part of a matrix that is split as ``like``, gathered: only a whole matrix has singular values."""
    if not isinstance(like, DTensor):
        return part
    placed = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return placed.full_tensor()


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices (n, A, B), roughly: singular values are in about [0.7, 1.2].

    They are bfloat16 on a GPU, float32 on a CPU.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    # On a CPU without bfloat16 products float32 is the type that works, and the sharper one.
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
