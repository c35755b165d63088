"""Guidance for any denoiser of this package: classifier-free (Ho & Salimans 2207.12598), or by a weaker network.

Autoguidance (Karras et al. 2406.02507) guides away from a weaker version of the same network, for example an early
snapshot. Here the weaker network sees the null condition, so both kinds of guidance are combined: away from the errors
of a weaker network, and towards the neighbours.
"""

import torch
from torch import Tensor

from model.diffusion.conditioning import null_condition
from model.diffusion.flow_matching import Denoiser

FULL_INTERVAL = (0.0, 1.0)
"""The interval of σ that applies guidance at every noise level."""


def with_guidance(
    denoiser: Denoiser,
    scale: float,
    *,
    negative: Tensor | None = None,
    interval: tuple[float, float] = FULL_INTERVAL,
    weaker: Denoiser | None = None,
) -> Denoiser:
    """Return the denoiser with guidance: v = v∅ + scale·(v_c − v∅).

    Args:
        denoiser: Network whose output is a velocity.
        scale: 1 is the conditional model itself and costs one network call per step; other values cost two.
        negative: (B, T, E) tokens to push away from. Default: the null condition.
        interval: Noise levels σ at which guidance acts, ends included. Outside it only the condition is evaluated,
            which costs one call. Guidance at the highest and lowest levels reduces diversity more than it improves
            the images (Kynkäänniemi et al. 2404.07724). Default: all levels.
        weaker: Network that gives v∅, from the null condition or ``negative``. Default: ``denoiser``.
    """
    if scale == 1:
        return denoiser

    def guided(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        if not interval[0] <= float(sigma[0]) <= interval[1]:
            return denoiser(noisy, sigma, condition)
        against = null_condition(condition) if negative is None else negative
        if weaker is not None:
            unconditional = weaker(noisy, sigma, against)
            return unconditional + scale * (denoiser(noisy, sigma, condition) - unconditional)
        both = torch.cat([condition, against])
        conditional, unconditional = denoiser(noisy.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return guided
