"""FlowEdit (Kulikov et al. 2412.08629): move an image along the difference of two velocities, without inversion.

Legend: ``B`` images, ``N`` noise samples, ``C s s`` pixels or latents of an image, ``T`` condition tokens, ``E`` their
channels, ``σ`` share of noise.

    x_σ = (1 − σ)·source + σ·ε                      the noised source
    z_σ = z + x_σ − source                          the edit so far, with the same noise
    dz/dσ = mean over ε of v̂(z_σ, σ, text) − v̂(x_σ, σ, source's own condition)        (Algorithm 1)

z starts at the source for σ = strength, and is the edit at σ = 0. Where the two conditions agree, nothing moves, so
pose and framing are kept. Both velocities are guided; the source's less, as in the paper.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from model.diffusion.flow_matching import Denoiser, add_noise
from model.diffusion.guidance import with_guidance
from model.editing.config import EditConfig, noise_levels

SOURCE_GUIDANCE = 1.5
"""Guidance scale of the source's velocity, as in the paper for Stable Diffusion 3."""
FLOW_SAMPLES = 2
"""Noise samples that each step averages over."""


def flow_edit(
    denoiser: Denoiser,
    source: Tensor,
    condition: Tensor,
    source_condition: Tensor,
    noises: Tensor,
    config: EditConfig,
    on_step: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Edit images towards a condition.

    Args:
        denoiser: Of C input channels, its output a velocity.
        source: (B, C, s, s), pixels or latents.
        condition: (B, T, E) tokens of the target.
        source_condition: (B, T, E) tokens of the source itself.
        noises: (B, steps · N, C, s, s) standard normal, N for each step.
        config: How to edit.
        on_step: Called with the number of each finished step, from 1. Default: no progress.

    Returns:
        (B, C, s, s) float32, not clamped.
    """
    towards = with_guidance(denoiser, config.guidance_scale)
    away = with_guidance(denoiser, SOURCE_GUIDANCE)
    edited = source
    steps = noises.chunk(config.steps, dim=1)
    levels = noise_levels(config).to(source.device)
    for number, (samples, (level, following)) in enumerate(
        zip(steps, itertools.pairwise(levels), strict=True), start=1
    ):
        sigma = level.expand(len(source))
        velocity = torch.zeros_like(source)
        for noise in samples.unbind(1):
            noised = add_noise(source, noise, sigma)
            velocity += towards(edited + noised - source, sigma, condition) - away(noised, sigma, source_condition)
        edited = edited + (following - level) * velocity / samples.shape[1]
        on_step(number)
    return edited.float()
