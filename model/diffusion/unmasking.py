"""Surest-first order of unmasking (MaskGIT, 2202.04200, section 3.2): each step unmasks the codes it is surest of.

Legend: ``B`` batch, ``n`` tokens of an image, ``K`` codes ([MASK] is code K).

The number of tokens that are still masked falls as a cosine. Noise on the confidence, which falls to 0 with the steps,
keeps the samples diverse.
"""

import math

import torch
from torch import Tensor

TEMPERATURE = 4.0
"""Scale of the noise on the log-probabilities at the first step."""
_LOW_BITS = 4096  # uniform float32 numbers have 24 bits: the high ones choose a code, the low ones give the noise


def masked_share(step: int, steps: int) -> float:
    """Return the share of masked tokens before ``step`` of ``steps``, counted from 0."""
    return math.cos(math.pi / 2 * step / steps)


def unmask_surest(
    log_clean: Tensor, chosen: Tensor, codes: Tensor, uniforms: Tensor, *, step: int, steps: int, mask: int
) -> Tensor:
    """Unmask the tokens whose chosen code is most probable, and return the codes (B, n).

    Args:
        log_clean: (B, n, K) log-probabilities of the codes.
        chosen: (B, n) codes sampled from them.
        codes: (B, n) codes so far; tokens that are not masked do not change.
        uniforms: (B, n) in [0, 1), the numbers that chose the codes. Their low bits give the noise.
        step: Number of the step, from 0.
        steps: Number of all steps. The last one unmasks every token.
        mask: K.
    """
    noise = -torch.log(-torch.log((uniforms * _LOW_BITS).frac().clamp(1e-4, 1 - 1e-4)))
    confidence = log_clean.gather(2, chosen[..., None])[..., 0]
    confidence = confidence + TEMPERATURE * (1 - (step + 1) / steps) * noise
    masked = codes == mask
    confidence = confidence.masked_fill(~masked, math.inf)
    unmasked = codes.shape[1] - int(codes.shape[1] * masked_share(step + 1, steps))
    rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return torch.where(masked & (rank < unmasked), chosen, codes)
