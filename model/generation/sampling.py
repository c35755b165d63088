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
from model.retrieval.searchable import Hits

EmbedPixels = Callable[[NDArray[np.uint8]], Tensor]
"""The encoder: uint8 pixels (B, S, S, 3) -> unit rows (B, D) on the CPU."""
COPY = 0.93
"""Cosine to a retrieved neighbour above which a candidate counts as its copy. docs/results.md compares values."""
_BELOW_ALL = 3.0  # more than the difference of two cosines


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRequest:
    """Inputs and settings of one call of :func:`generate`.

    Attributes:
        tokens: (B, T, E) on the CPU; the candidates of one image are adjacent.
        targets: (B / candidates, D) unit rows that the candidates are compared with.
        noise: (B, …noise_shape) on the CPU, as :meth:`Backbone.noise` samples it.
        candidates: Images generated for each image that is returned.
        neighbours: (B / candidates, K, D) unit rows of which no copy is chosen, or None.
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
    neighbours: Tensor | None = None
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
    if request.candidates == 1:
        return images
    embeddings = embed_images(embed_pixels, to_pixels(images), device)
    return images[best_candidates(embeddings, request.targets, request.neighbours)]


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


def rows_not_to_copy(hits: Hits | None, repeats: int) -> Tensor | None:
    """Return the neighbours of P prompts for each of ``repeats`` images of a prompt, (P·repeats, K, D)."""
    return None if hits is None else torch.from_numpy(hits.embeddings).float().repeat_interleave(repeats, dim=0)


def best_candidates(embeddings: Tensor, targets: Tensor, neighbours: Tensor | None = None) -> Tensor:
    """Choose the candidate closest to the target, among those that are not copies of a neighbour.

    Args:
        embeddings: (N·C, D) unit rows; the C candidates of one image are adjacent.
        targets: (N, D) unit rows.
        neighbours: (N, K, D) unit rows. A candidate with a cosine above ``COPY`` to one of them is chosen only if all
            candidates of its image have one. Default: None, copies are not recognised.

    Returns:
        (N,) int64, the rows of the chosen candidates.
    """
    candidates = embeddings.reshape(len(targets), -1, embeddings.shape[1])
    scores = (candidates * targets[:, None]).sum(2)
    if neighbours is not None:
        nearest = (candidates @ neighbours.mT).amax(2)
        scores = scores - _BELOW_ALL * (nearest > COPY)
    rows: Tensor = torch.arange(len(targets)) * candidates.shape[1] + scores.argmax(1)
    return rows
