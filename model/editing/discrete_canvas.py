"""Editing with discrete generators: the codes of one region are regenerated, the rest of the image is unchanged.

Legend: ``B`` images, ``S`` side, ``n`` codes of an image (g × g of them), ``N`` noise samples, ``T`` condition tokens,
``E`` their channels.

    contrast     d = mean over x_t of ½ Σ |p(x_0|x_t, text) − p(x_0|x_t, source's own condition)|, at the masked codes
    inpainting   x_s ← region ? p_θ(x_s|x_t, text) : q(x_s|the source's codes)  after every stride

This is :mod:`model.editing.regions` with codes in place of pixels: total variation replaces the difference of
velocities, and masks replace Gaussian noise.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from model.diffusion.vq_diffusion import CodeDenoiser, KnownCodes, Transitions
from model.editing.config import EditConfig
from model.editing.regions import composite, to_grid
from model.generation.discrete import DiscreteBackbone

CONTRAST_SHARE = 0.9
"""Time, as a share of the process, at which text and source are compared. Most codes are masked there; the few visible
ones fix the layout."""


class DiscreteCanvas:
    """Images being edited as codes; see :class:`model.editing.edit.Canvas`."""

    NOISE_STEPS: ClassVar[int] = 2
    """Uniform numbers per code that mask the source. They precede the numbers of the sampling steps."""

    def __init__(
        self,
        backbone: DiscreteBackbone,
        source: Tensor,
        condition: Tensor,
        config: EditConfig,
        negative: Tensor | None,
    ) -> None:
        """Prepare a batch, on the backbone's device.

        Args:
            backbone: The generator.
            source: (B, 3, S, S) in [−1, 1].
            condition: (B, T, E) tokens of the target.
            config: How to edit.
            negative: (B, T, E) tokens to push away from, or None for the null condition.
        """
        self._backbone, self._source, self._condition = backbone, source, condition
        self._negative, self._scale = negative, config.guidance_scale
        self._codes = backbone.encode(source)
        self._first = max(1, round(config.strength * backbone.transitions.timesteps))

    def contrast(self, source_condition: Tensor, noises: Tensor) -> Tensor:
        """Implement ``Canvas.contrast``, as (B, 1, g, g); noises are uniform (B, N, NOISE_STEPS + steps, n)."""
        uniforms = noises[:, :, : self.NOISE_STEPS].transpose(2, 3)
        backbone = self._backbone
        return code_contrast(
            backbone.network, self._codes, self._condition, source_condition, uniforms, backbone.transitions
        )

    def regenerate(self, noise: Tensor, on_step: Callable[[int], None]) -> Tensor:
        """Implement ``Canvas.regenerate``; the noise is uniform (B, NOISE_STEPS + steps, n)."""
        return self._sample(torch.ones_like(self._codes, dtype=torch.bool), noise, on_step)

    def inpaint(self, region: Tensor, noise: Tensor, on_step: Callable[[int], None]) -> Tensor:
        """Implement ``Canvas.inpaint``: regenerate every code that the region touches. Noise as in ``regenerate``."""
        cells = (to_grid(region, math.isqrt(self._codes.shape[1])) > 0).float()
        return composite(self._source, self._sample(cells.flatten(1) > 0, noise, on_step), cells)

    def _sample(self, free: Tensor, noise: Tensor, on_step: Callable[[int], None]) -> Tensor:
        uniforms = noise[:, self.NOISE_STEPS :]
        known = KnownCodes(
            codes=self._codes,
            free=free,
            first=self._first,
            uniforms=noise[:, : self.NOISE_STEPS].transpose(1, 2),
        )
        return self._backbone.generate(
            self._condition,
            uniforms,
            steps=min(uniforms.shape[1], self._first),  # a process has no more strides than timesteps
            guidance_scale=self._scale,
            negative=self._negative,
            on_step=on_step,
            known=known,
        )


@torch.no_grad()
def code_contrast(
    network: CodeDenoiser,
    codes: Tensor,
    condition: Tensor,
    source_condition: Tensor,
    uniforms: Tensor,
    transitions: Transitions,
) -> Tensor:
    """Return how much the text and the source's own condition disagree at each code: (B, 1, g, g) in [0, 1].

    Args:
        network: The denoiser of codes.
        codes: (B, n) int64, the codes of the source.
        condition: (B, T, E) tokens of the text.
        source_condition: (B, T, E) tokens of the source itself.
        uniforms: (B, N, n, 2) in [0, 1), which determine the codes that each noise sample masks.
        transitions: The process that the network was trained for.
    """
    t = torch.full((len(codes),), math.ceil(CONTRAST_SHARE * transitions.timesteps), device=codes.device)
    both = torch.cat([condition, source_condition])
    total, times_masked = (torch.zeros(codes.shape, device=codes.device) for _ in range(2))
    for sample in uniforms.unbind(1):
        noisy = transitions.corrupt(codes, t, sample)
        of_text, of_source = network(noisy.repeat(2, 1), t.repeat(2), both).float().softmax(2).chunk(2)
        masked = (noisy == transitions.mask).float()
        total += masked * (of_text - of_source).abs().sum(2) / 2
        times_masked += masked
    side = math.isqrt(codes.shape[1])
    return (total / times_masked.clamp(min=1)).view(-1, 1, side, side)
