"""From noise to what a network was trained on: the continuous path, and the codes' strides.

Legend: ``P`` pictures asked for, ``B`` batch, ``C S S`` what is denoised, ``T E`` condition tokens and channels.

Noise is drawn picture by picture on the CPU, so neither the batch nor the device changes a picture. A GPU out of memory
halves the batch once.
"""

import logging
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from model.diffusion.flow_matching import Denoiser
from model.errors import ModelError

logger = logging.getLogger(__name__)

BATCH = {"cpu": 8, "cuda": 256}
"""Pictures at a time. A CPU's caches hold the activations of few: 8 ran at 68 ms a picture and call, 64 at 84."""

Told = Callable[[int, int], None]
"""Called with (step, steps) of everything that a call draws."""


def is_count(number: object) -> bool:
    """Whether it is a whole number of at least 1."""
    return isinstance(number, Integral) and int(number) >= 1


def draw_noise(
    count: int, shape: tuple[int, ...], generator: torch.Generator | None, *, shared: bool = False
) -> Tensor:
    """Standard normal (count, …shape); ``shared`` gives every picture the first one's."""
    generator = _seeded(generator)
    drawn = torch.stack([torch.randn(shape, generator=generator) for _ in range(1 if shared else count)])
    return drawn.expand(count, *shape)


def draw_uniforms(count: int, shape: tuple[int, ...], generator: torch.Generator | None, *, shared: bool) -> Tensor:
    """Uniform (count, …shape) in [0, 1), as :func:`draw_noise`."""
    generator = _seeded(generator)
    drawn = torch.stack([torch.rand(shape, generator=generator) for _ in range(1 if shared else count)])
    return drawn.expand(count, *shape)


def in_batches(
    draw: Callable[[slice, Callable[[int], None]], Tensor],
    count: int,
    steps: int,
    device: torch.device,
    told: Told | None,
) -> Tensor:
    """Call ``draw`` for slices of ``count`` pictures and join what it returns on the CPU.

    Raises ``ModelError`` when memory is out for half a batch too, or what was drawn are no finite numbers.
    """
    size, halved, start = min(count, BATCH.get(device.type, BATCH["cpu"])), False, 0
    drawn = []
    while start < count:
        batches = start // size + math.ceil((count - start) / size)
        before = start // size * steps

        def step(number: int, before: int = before, total: int = batches * steps) -> None:
            if told is not None:
                told(before + number, total)

        try:
            drawn.append(draw(slice(start, start + size), step).cpu())
        except torch.OutOfMemoryError as error:
            if halved or size == 1:
                told_ = f"{device} is out of memory for {size} pictures at a time"
                raise ModelError(f"{told_}; free some, or draw on another device") from error
        else:
            start += size
            continue
        # Only out here is the error gone, and with it the activations that its traceback holds.
        size, halved = size // 2, True
        torch.cuda.empty_cache()
        logger.warning("%s is out of memory; drawing %d pictures at a time from here", device, size)
    joined = torch.cat(drawn)
    if not joined.isfinite().all():
        raise ModelError("what was drawn are no finite numbers: the weights are broken; train again, or pull them anew")
    return joined


def new_scheduler() -> UniPCMultistepScheduler:
    """What a new generator is drawn with: UniPC (Zhao et al. 2302.04867) on the flow's straight path.

    It uses the last step's velocity too, for no further network call: 6 of its steps drew what 8 of Euler's did. Shift
    2 spends the steps where 32 to 64 px need them (Esser et al. 2403.03206, eq. 23).
    """
    return UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0)


def integrate(
    denoiser: Denoiser, noise: Tensor, condition: Tensor, scheduler: Any, steps: int, told: Callable[[int], None]
) -> Tensor:
    """The scheduler's steps from σ = 1 to 0.

    Args:
        denoiser: velocity of (x_σ, σ, condition).
        noise: (B, C, S, S), on the denoiser's device.
        condition: (B, T, E).
        scheduler: any diffusers scheduler of flow matching; a copy is stepped.
        steps: how many.
        told: called with the number of each step, from 1.

    Returns:
        (B, C, S, S).
    """
    scheduler = type(scheduler).from_config(scheduler.config)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    else:
        scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)  # else it looks for the first timestep, which many steps round to twice
    picture = noise
    for number, (timestep, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas, strict=False), start=1):
        velocity = denoiser(picture, sigma.expand(len(picture)).to(picture.device), condition)
        picture = scheduler.step(velocity, timestep, picture, return_dict=False)[0]
        told(number)
    return picture


def _seeded(generator: torch.Generator | None) -> torch.Generator:
    if generator is not None and not (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
        raise ModelError("generator must be one torch.Generator on the CPU: it draws the noise of all pictures there")
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return generator
