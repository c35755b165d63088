"""Editing with continuous generators: pixels or latents moved by velocities.

Legend: ``B`` images, ``N`` noise samples, ``S`` side, ``C s s`` pixels or latents of an image, ``T`` condition tokens,
``E`` their channels, ``σ`` share of noise.

    x_s = (1 − s)·source + s·ε                     s is the strength: 1 starts from pure noise
    σ from s to 0:  v = v̂(x_σ, reference = source, text and its neighbours), guided
"""

import itertools
from collections.abc import Callable

from torch import Tensor

from model.diffusion.conditioning import null_condition
from model.diffusion.flow_matching import Denoiser, add_noise
from model.diffusion.guidance import with_guidance
from model.editing.config import EditConfig, noise_levels
from model.editing.flowedit import flow_edit
from model.editing.regions import composite, inpaint_region, keep_unchanged, text_contrast, to_grid
from model.generation.continuous import ContinuousBackbone
from model.networks.editor import with_reference


class ContinuousCanvas:
    """Images being edited as pixels or latents; see :class:`model.editing.edit.Canvas`."""

    def __init__(
        self,
        backbone: ContinuousBackbone,
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
        self._backbone, self._denoiser, self._condition = backbone, backbone.denoiser, condition
        self._config, self._negative, self._source = config, negative, source
        self._encoded = backbone.encode(source)

    def contrast(self, source_condition: Tensor, noises: Tensor) -> Tensor:
        """Implement ``Canvas.contrast``; noises are (B, N, C, s, s)."""
        return text_contrast(self._denoiser, self._encoded, self._condition, source_condition, noises)

    def regenerate(self, noise: Tensor, on_step: Callable[[int], None]) -> Tensor:
        """Implement ``Canvas.regenerate``; the noise is (B, C, s, s)."""
        edited = sdedit(
            self._denoiser,
            self._encoded,
            self._condition,
            noise,
            self._config,
            negative=self._negative,
            on_step=on_step,
        )
        return self._backbone.decode(edited)

    def move(self, source_condition: Tensor, noises: Tensor, on_step: Callable[[int], None]) -> Tensor:
        """Move the whole images from the source's condition (B, T, E) to the target's: (B, 3, S, S) in [−1, 1].

        ``noises`` is (B, steps · N, C, s, s). ``on_step`` is called with the number of each finished step, from 1.
        """
        edited = flow_edit(
            self._denoiser, self._encoded, self._condition, source_condition, noises, self._config, on_step
        )
        return self._backbone.decode(edited)

    def inpaint(self, region: Tensor, noise: Tensor, on_step: Callable[[int], None]) -> Tensor:
        """Implement ``Canvas.inpaint``; the noise is (B, C, s, s)."""
        denoiser = with_guidance(self._denoiser, self._config.guidance_scale, negative=self._negative)
        cells, levels = to_grid(region, self._encoded.shape[-1]), noise_levels(self._config).to(noise.device)
        inpainted = self._backbone.decode(
            inpaint_region(denoiser, self._encoded, cells, self._condition, noise, levels, on_step)
        )
        return inpainted if self._backbone.vae is None else composite(self._source, inpainted, cells)


def restore(
    denoiser: Denoiser,
    source: Tensor,
    condition: Tensor,
    noise: Tensor,
    config: EditConfig,
    *,
    negative: Tensor | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Edit images with a network that was trained to restore.

    Args:
        denoiser: Network with six input channels whose output is a velocity.
        source: (B, 3, S, S) in [−1, 1].
        condition: (B, T, E) tokens of the text and its neighbours.
        noise: (B, 3, S, S) standard normal.
        config: How to edit.
        negative: (B, T, E) tokens to push away from, e.g. those of the source. Default: the null condition.
        on_step: Called with the number of each finished step, from 1. Default: no progress.

    Returns:
        (B, 3, S, S) float32 in [−1, 1].
    """
    guided = with_edit_guidance(denoiser, source, config, negative=negative)
    edited = _euler(guided, source, condition, noise, config, on_step).clamp(-1, 1)
    return keep_unchanged(edited, source) if config.keep else edited


def sdedit(
    denoiser: Denoiser,
    source: Tensor,
    condition: Tensor,
    noise: Tensor,
    config: EditConfig,
    *,
    negative: Tensor | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Edit by the baseline (SDEdit, 2108.01073): add noise to the source, and denoise it conditioned on the text.

    The noise level alone determines how much of the source is preserved.

    Args:
        denoiser: Network with C input channels whose output is a velocity.
        source: (B, C, s, s), pixels or latents.
        condition: (B, T, E) tokens of the text and its neighbours.
        noise: (B, C, s, s) standard normal.
        config: How to edit.
        negative: (B, T, E) tokens to push away from. Default: the null condition.
        on_step: Called with the number of each finished step, from 1. Default: no progress.

    Returns:
        (B, C, s, s) float32, not clamped.
    """
    guided = with_guidance(denoiser, config.guidance_scale, negative=negative)
    return _euler(guided, source, condition, noise, config, on_step)


def with_edit_guidance(
    denoiser: Denoiser, source: Tensor, config: EditConfig, *, negative: Tensor | None = None
) -> Denoiser:
    """Bind the source to a denoiser of six input channels, and guide it towards the text and the source.

    v = v(y, c−) + a·(v(y, c) − v(y, c−)) + (b − 1)·(v(y, ∅) − v(0, ∅))     (after InstructPix2Pix 2211.09800, eq. 3)

    Here y is the source, a = ``guidance_scale`` and b = ``image_guidance_scale``. c− is ``negative`` (B, T, E), or the
    null condition ∅ if None. Values of b other than 1 cost two more network calls per step.
    """
    referenced = with_reference(denoiser, source)
    towards_text = with_guidance(referenced, config.guidance_scale, negative=negative)
    if config.image_guidance_scale == 1:
        return towards_text
    unreferenced = with_reference(denoiser, None)

    def guided(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        nothing = null_condition(condition)
        towards_source = referenced(noisy, sigma, nothing) - unreferenced(noisy, sigma, nothing)
        return towards_text(noisy, sigma, condition) + (config.image_guidance_scale - 1) * towards_source

    return guided


def _euler(
    denoiser: Denoiser,
    source: Tensor,
    condition: Tensor,
    noise: Tensor,
    config: EditConfig,
    on_step: Callable[[int], None],
) -> Tensor:
    """Take Euler steps along the noise levels, starting from the noised source: (B, C, s, s) float32."""
    levels = noise_levels(config).to(source.device)
    sample = add_noise(source, noise, levels[:1].expand(len(source)))
    for number, (level, following) in enumerate(itertools.pairwise(levels), start=1):
        sample = sample + (following - level) * denoiser(sample, level.expand(len(sample)), condition)
        on_step(number)
    return sample.float()
