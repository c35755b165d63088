"""The Muon optimizer (Jordan et al. 2024), batched over all matrices of one shape.

``torch.optim.Muon`` updates one matrix after the other. A transformer has few shapes and many matrices, each too small
to fill a GPU, so such a step is bound by kernel launches. It took 61 ms for the 100 matrices of a 10-layer transformer
of width 384 on an H100. The forward and backward pass of 512 images took 76 ms. The update rule and the defaults are
those of torch, which a test checks.

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
"""Coefficients of the quintic iteration that drives singular values towards 1, steep at 0 (Jordan et al. 2024)."""
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum with decoupled weight decay.

    Updates are scaled to the root mean square of AdamW's, 0.2, so Muon and AdamW can share one learning rate
    (Moonshot 2502.16982, §2.2).
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        """Create the optimizer of ``parameters``. Raises ``ValueError`` for one that is not two-dimensional."""
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for parameter in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
            if parameter.ndim != 2:
                raise ValueError(
                    f"Muon cannot optimize a parameter of this shape: {tuple(parameter.shape)}; give it matrices only"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Raises ``ValueError`` for a ``closure``, which is unsupported."""
        if closure is not None:
            raise ValueError("Muon does not support a closure; call step() without arguments")
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
        updates = orthogonalised(torch.stack([_gather(*pair) for pair in zip(momenta, parameters, strict=True)]))
        rate = group["lr"] * 0.2 * math.sqrt(max(shape))
        local = [local_shard(parameter) for parameter in parameters]
        torch._foreach_mul_(local, 1 - group["lr"] * group["weight_decay"])
        steps = zip(updates.to(local[0].dtype), parameters, strict=True)
        torch._foreach_add_(
            local, [local_shard(shard_like(update, parameter)) for update, parameter in steps], alpha=-rate
        )


def _gather(part: Tensor, like: Tensor) -> Tensor:
    """Gather a matrix that is sharded as ``like``, because orthogonalisation needs the whole matrix."""
    if not isinstance(like, DTensor):
        return part
    sharded = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


def orthogonalised(matrices: Tensor) -> Tensor:
    """Approximate the nearest semi-orthogonal matrices of matrices (n, A, B).

    Singular values of the result are in about [0.7, 1.2]. It is bfloat16 on a GPU and float32 on a CPU.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    # A CPU may lack bfloat16 matrix products, and float32 is more precise.
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
