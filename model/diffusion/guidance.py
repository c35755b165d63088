"""Classifier-free guidance (Ho & Salimans 2207.12598) for any denoiser of this package."""

import torch
from torch import Tensor

from model.diffusion.conditioning import null_condition
from model.diffusion.flow_matching import Denoiser

WHOLE = (0.0, 1.0)
"""The interval of σ in which guidance acts throughout."""


def guided(
    denoiser: Denoiser, scale: float, *, negative: Tensor | None = None, interval: tuple[float, float] = WHOLE
) -> Denoiser:
    """The denoiser with its condition pushed by ``scale``: v = v∅ + scale·(v_c − v∅).

    Args:
        denoiser: what answers with a velocity.
        scale: 1 is the conditional model itself and costs one network call a step; anything else costs two.
        negative: (B, T, E) tokens to push away from; hidden embeddings where None.
        interval: the levels σ at which guidance acts, ends included. Outside it the condition alone is followed, which
            costs one call: guidance at the noisiest and cleanest levels narrows the samples more than it sharpens them
            (Kynkäänniemi et al. 2404.07724).
    """
    if scale == 1:
        return denoiser

    def call(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        if not interval[0] <= float(sigma[0]) <= interval[1]:
            return denoiser(noisy, sigma, condition)
        against = null_condition(condition) if negative is None else negative
        both = torch.cat([condition, against])
        conditional, unconditional = denoiser(noisy.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return call
