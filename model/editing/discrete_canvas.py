"""Editing by the discrete generator: codes of one region are drawn anew, and the picture around it stays as it was.

Legend: ``B`` pictures, ``S`` side, ``n`` codes of a picture (g × g of them), ``N`` draws of noise, ``T`` condition
tokens, ``E`` their channels.

    where      d = mean over x_t of ½ Σ |p(x_0|x_t, text) − p(x_0|x_t, what the source shows)|, at the masked codes
    what       x_s ← region ? p_θ(x_s|x_t, text) : q(x_s|the source's codes)  after every stride

It is :mod:`model.editing.regions` with codes for pixels: total variation in place of the velocities' difference, and
masks in place of Gaussian noise.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.diffusion.vq_diffusion import CodeDenoiser, Known, Transitions, sample_codes
from model.editing.regions import cells_of, laid_over
from model.networks.vq_autoencoder import decode_codes, encode_codes

if TYPE_CHECKING:
    from model.editing.edit import EditConfig
    from model.pipeline import KNNDiffusionPipeline

CONTRAST_SHARE = 0.9
"""Time, as a share of the process, at which text and source are compared: most codes are masked, a few place it."""
NOISING = 2
"""Uniforms a code that noise the source, before those of the steps."""


class CodeCanvas:
    """The codes of pictures that are edited: what :class:`model.editing.edit.Canvas` asks for."""

    def __init__(
        self,
        pipeline: "KNNDiffusionPipeline",
        source: Tensor,
        condition: Tensor,
        config: "EditConfig",
        negative: Tensor | None,
    ) -> None:
        """Of sources (B, 3, S, S) in [−1, 1] and what they should show (B, T, E), on the pipeline's device."""
        network = pipeline.transformer
        self._pipeline, self._source, self._condition = pipeline, source, condition
        self._negative, self._scale = negative, config.guidance_scale
        self._codes = encode_codes(pipeline.vae, source)
        self._transitions = Transitions(codes=network.config.codes, timesteps=network.config.timesteps)
        self._first = max(1, round(config.strength * self._transitions.timesteps))

    def contrast(self, shown: Tensor, noises: Tensor) -> Tensor:
        """Where text and source disagree, (B, 1, g, g); ``shown`` (B, T, E), uniforms (B, N, NOISING + steps, n)."""
        hiding = noises[:, :, :NOISING].transpose(2, 3)
        return code_contrast(self._pipeline.transformer, self._codes, self._condition, shown, hiding, self._transitions)

    def whole(self, noise: Tensor) -> Tensor:
        """Everything drawn anew from the strength on, (B, 3, S, S), by uniforms (B, NOISING + steps, n)."""
        return self._drawn(torch.ones_like(self._codes, dtype=torch.bool), noise)

    def inside(self, region: Tensor, noise: Tensor) -> Tensor:
        """The region (B, 1, S, S) in [0, 1] drawn anew, each code it touches, and the source around it."""
        cells = (cells_of(region, math.isqrt(self._codes.shape[1])) > 0).float()
        return laid_over(self._source, self._drawn(cells.flatten(1) > 0, noise), cells)

    def _drawn(self, free: Tensor, noise: Tensor) -> Tensor:
        hiding, uniforms = noise[:, :NOISING].transpose(1, 2), noise[:, NOISING:]
        codes = sample_codes(
            self._pipeline.transformer,
            self._condition,
            uniforms[:, : self._first],  # a process has no more strides than times
            transitions=self._transitions,
            guidance_scale=self._scale,
            truncation=self._pipeline.config.truncation,
            negative=self._negative,
            known=Known(codes=self._codes, free=free, first=self._first, uniforms=hiding),
        )
        return decode_codes(self._pipeline.vae, codes).float()


@torch.no_grad()
def code_contrast(
    network: CodeDenoiser, codes: Tensor, condition: Tensor, shown: Tensor, uniforms: Tensor, transitions: Transitions
) -> Tensor:
    """How much the text and what the source shows disagree at each code: (B, 1, g, g) in [0, 1].

    Args:
        network: the denoiser of codes.
        codes: (B, n) int64, the source's.
        condition: (B, T, E) tokens of the text.
        shown: (B, T, E) tokens of the source itself.
        uniforms: (B, N, n, 2) in [0, 1), which codes each draw hides.
        transitions: the process that the network was trained for.
    """
    t = torch.full((len(codes),), math.ceil(CONTRAST_SHARE * transitions.timesteps), device=codes.device)
    both = torch.cat([condition, shown])
    total, hidden = (torch.zeros(codes.shape, device=codes.device) for _ in range(2))
    for chance in uniforms.unbind(1):
        noisy = transitions.corrupt(codes, t, chance)
        text, itself = network(noisy.repeat(2, 1), t.repeat(2), both).float().softmax(2).chunk(2)
        masked = (noisy == transitions.mask).float()
        total += masked * (text - itself).abs().sum(2) / 2
        hidden += masked
    side = math.isqrt(codes.shape[1])
    return (total / hidden.clamp(min=1)).view(-1, 1, side, side)
