"""Generation of images from condition tokens, with selection among candidates.

Legend: ``B`` samples, ``S`` side, ``T`` condition tokens, ``E`` their channels, ``D`` embedding width.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import ModelError
from model.generation.backbone import Backbone
from model.generation.batching import ProgressCallback, run_batched
from model.images import to_pixels

EmbedPixels = Callable[[NDArray[np.uint8]], Tensor]
"""The encoder: uint8 pixels (B, S, S, 3) -> unit rows (B, D) on the CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRequest:
    """Inputs and settings of one call of :func:`generate`.

    Attributes:
        tokens: (B, T, E) on the CPU; the candidates of one image are adjacent.
        targets: (B / candidates, D) unit rows that the candidates are compared with.
        noise: (B, …noise_shape) on the CPU, as :meth:`Backbone.noise` samples it.
        candidates: Images generated for each image that is returned.
        negative: (B, T, E) tokens to push away from, or None for the null condition.
        guidance_scale: 1 is the conditional model itself.
        steps: Number of sampling steps.
        on_progress: Called with (step, total steps) over all batches, or None.
        start: (B, 3, S, S) in [−1, 1] on the CPU, images to add the noise to, or None for pure noise.
        strength: Share of noise that is added to ``start``, in (0, 1].
        reference: (B, 3, S, S) in [−1, 1] on the CPU, images shown at high noise levels, or None.
    """

    tokens: Tensor
    targets: Tensor
    noise: Tensor
    candidates: int
    negative: Tensor | None
    guidance_scale: float
    steps: int
    on_progress: ProgressCallback | None
    start: Tensor | None = None
    strength: float = 1.0
    reference: Tensor | None = None


def generate(backbone: Backbone, embed_pixels: EmbedPixels, request: SamplingRequest) -> Tensor:
    """Generate images and keep the best of each image's candidates.

    Returns:
        (B / candidates, 3, S, S) float32 in [−1, 1] on the CPU.

    Raises:
        ModelError: As :func:`model.generation.batching.run_batched`.
    """
    device, negative = backbone.device, request.negative

    def generate_batch(rows: slice, on_step: Callable[[int], None]) -> Tensor:
        return backbone.generate(
            request.tokens[rows].to(device),
            request.noise[rows].to(device),
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            negative=None if negative is None else negative[rows].to(device),
            on_step=on_step,
            start=None if request.start is None else request.start[rows].to(device),
            strength=request.strength,
            reference=None if request.reference is None else request.reference[rows].to(device),
        )

    images = run_batched(generate_batch, len(request.tokens), request.steps, device, request.on_progress)
    return images if request.candidates == 1 else _best_candidates(images, embed_pixels, request, device)


def initial_noise(
    backbone: Backbone,
    latents: Tensor | None,
    count: int,
    steps: int,
    generator: torch.Generator | None,
    shared: bool,
) -> Tensor:
    """Return the noise of ``count`` images: ``latents`` if given, else sampled from ``generator``.

    Raises ``ModelError`` for latents of the wrong shape.
    """
    if latents is None:
        return backbone.noise(count, steps, generator, shared=shared)
    expected = (count, *backbone.noise_shape(steps))
    if tuple(latents.shape) != expected:
        raise ModelError(f"latents have the wrong shape: {tuple(latents.shape)}; give {expected}")
    return latents.cpu().float()


def embed_images(embed_pixels: EmbedPixels, pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Embed uint8 images (B, S, S, 3) in batches: unit rows (B, D). Raises ``ModelError`` as :func:`run_batched`."""
    return run_batched(lambda rows, _: embed_pixels(pixels[rows]), len(pixels), 1, device, None)


def _best_candidates(
    images: Tensor, embed_pixels: EmbedPixels, request: SamplingRequest, device: torch.device
) -> Tensor:
    """Return for each image the candidate whose embedding is closest to the target."""
    embeddings = embed_images(embed_pixels, to_pixels(images), device)
    cosines = (embeddings * request.targets.repeat_interleave(request.candidates, dim=0)).sum(1)
    best = cosines.reshape(-1, request.candidates).argmax(1)
    return images[torch.arange(len(best)) * request.candidates + best]
