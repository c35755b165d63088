"""Classifier-free guidance (Ho & Salimans 2207.12598) for any denoiser of this package."""

import torch
from torch import Tensor

from model.diffusion.conditioning import null_condition
from model.diffusion.continuous import Denoiser


def guided(denoiser: Denoiser, scale: float) -> Denoiser:
    """The denoiser with its condition pushed by ``scale``: v = v∅ + scale·(v_c − v∅).

    ``scale`` 1 is the conditional model itself and costs one network call a step; anything else costs one call of
    twice the batch.
    """
    if scale == 1:
        return denoiser

    def call(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        both = torch.cat([condition, null_condition(condition)])
        conditional, unconditional = denoiser(noisy.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return call
