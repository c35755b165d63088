"""Measurements for model FLOPs utilisation (Chowdhery et al. 2204.02311, §4.1)."""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def flops_per_image(loss_of_one: Callable[[], Tensor]) -> int:
    """Count the floating-point operations of the forward and backward pass of one image.

    ``loss_of_one`` computes the loss of one image. Its gradients remain in the parameters.
    """
    with FlopCounterMode(display=False) as counter:
        loss_of_one().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def matrix_peak(device: torch.device) -> float:
    """Measure the FLOP/s of a large matrix product on ``device``: bfloat16 on CUDA, float32 elsewhere."""
    on_cuda = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if on_cuda else (768, torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
    times = []
    for _ in range(10 if on_cuda else 4):
        _wait(device)
        started = time.perf_counter()
        left @ right
        _wait(device)
        times.append(time.perf_counter() - started)
    return 2 * side**3 / min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
