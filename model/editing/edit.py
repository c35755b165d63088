"""Text-guided editing of images without a mask (Sheynin et al., text-only image manipulation).

Legend: ``B`` images, ``S`` side, ``N`` noise samples, ``T`` condition tokens, ``E`` their channels, ``D``
embedding width.

There are four methods. ``flow`` moves the image along the difference of two velocities (:mod:`model.editing.flowedit`).
It works with any continuous network. ``local`` finds regions where text and source disagree, regenerates one of them,
and keeps the rest (:mod:`model.editing.regions`). It works with any network. ``restore`` needs a network that was
trained to regenerate the parts that disagree with the condition (:mod:`model.training.objectives.restoration`). The
image itself is the reference. ``sdedit`` is the baseline. Each method may generate several candidates and return one.

Noise and guidance shift every pixel a little. :func:`model.editing.regions.keep_unchanged` restores the source's pixels
where the edit barely differs. :mod:`model.editing.edit_metrics` measures edits.
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.editing.config import EditConfig
from model.editing.continuous_canvas import ContinuousCanvas, restore
from model.editing.discrete_canvas import DiscreteCanvas
from model.editing.flowedit import FLOW_SAMPLES
from model.editing.regions import CONTRAST_SAMPLES, keep_unchanged, propose_regions, select_candidate
from model.errors import ModelError
from model.generation.backbone import Backbone
from model.generation.batching import ProgressCallback, run_batched
from model.generation.continuous import ContinuousBackbone
from model.generation.discrete import DiscreteBackbone
from model.generation.sampling import EmbedPixels
from model.images import image_to_array, to_model_range, to_pixels, to_rgb

logger = logging.getLogger(__name__)


class Canvas(Protocol):
    """A batch of images that a generator edits as pixels, latents or codes."""

    def contrast(self, source_condition: Tensor, noises: Tensor) -> Tensor:
        """Return how much the target and the source's own condition (B, T, E) disagree: (B, 1, s, s), at least 0."""
        ...

    def regenerate(self, noise: Tensor, on_step: Callable[[int], None]) -> Tensor:
        """Regenerate the whole images from the configured strength: (B, 3, S, S) float32 in [−1, 1].

        ``on_step`` is called with the number of each finished step, from 1.
        """
        ...

    def inpaint(self, region: Tensor, noise: Tensor, on_step: Callable[[int], None]) -> Tensor:
        """Regenerate a region (B, 1, S, S) in [0, 1] of the images; otherwise as :meth:`regenerate`."""
        ...


NewCanvas: TypeAlias = Callable[[Tensor, Tensor, EditConfig, Tensor | None], Canvas]
"""(source, condition, config, negative) -> the canvas of a batch."""
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""One random generator for all images, one for each, or None for a random seed."""


@torch.inference_mode()
def edit(
    backbone: Backbone,
    embed_pixels: EmbedPixels,
    images: NDArray[np.uint8],
    targets: Tensor,
    tokens: Tensor,
    source_tokens: Tensor | None,
    config: EditConfig,
    generator: Generators = None,
    on_progress: ProgressCallback | None = None,
) -> NDArray[np.uint8]:
    """Edit images towards targets.

    Args:
        backbone: The generator.
        embed_pixels: The encoder; it scores the candidates.
        images: (B, S, S, 3) uint8, of the generator's side; see :func:`fit_images`.
        targets: (B, D) unit rows, the embeddings that the edited images should have.
        tokens: (B, T, E) condition tokens of the targets.
        source_tokens: (B, T, E) condition tokens of the images themselves. Only needed if
            :func:`needs_source_tokens`.
        config: How to edit.
        generator: Source of the noise, on the CPU: one for all images, or one for each. Default: a random seed.
        on_progress: Called with (step, total steps) after each step, over all candidates and batches. Default: None.

    Returns:
        (B, S, S, 3) uint8.

    Raises:
        ModelError: The generator does not support the method, the number of random generators differs from that of the
            images, memory is exhausted, or the results are NaN or infinite.
    """
    check_method(backbone, config)
    new_canvas, extra_steps = _canvas_for(backbone)
    sources = to_model_range(torch.from_numpy(images))
    noise = _noise(backbone, len(images), extra_steps + config.steps, config, generator)

    def edit_batch(rows: slice, on_step: Callable[[int], None]) -> Tensor:
        own_tokens = None if source_tokens is None else source_tokens[rows]
        edited: list[Tensor] = []

        def on_candidate_step(number: int) -> None:
            if number < config.steps:  # the last one counts when the candidate is finished
                on_step(len(edited) * config.steps + number)

        for candidate in _candidates(
            backbone, new_canvas, sources[rows], tokens[rows], own_tokens, noise[rows], config, on_candidate_step
        ):
            edited.append(candidate)
            on_step(len(edited) * config.steps)  # codes may take fewer steps, see EditConfig
        if len(edited) == 1:
            return edited[0]
        scores = [(embed_pixels(to_pixels(one)) * targets[rows]).sum(1) for one in edited]
        return select_candidate(sources[rows], edited, torch.stack(scores), kept_db=config.kept_db)

    steps = config.candidates * config.steps
    edited = to_pixels(run_batched(edit_batch, len(images), steps, backbone.device, on_progress))
    if unchanged := int((edited == images).all((1, 2, 3)).sum()):
        message = "%d of %d images are unchanged; rephrase the prompt, or increase strength or largest_region"
        logger.warning(message, unchanged, len(images))
    return edited


def check_method(backbone: Backbone, config: EditConfig) -> None:
    """Raise ``ModelError`` if the generator does not support the method."""
    if isinstance(backbone, ContinuousBackbone) and backbone.noise_levels is not None:
        raise ModelError(
            "this generator was distilled to few steps and cannot edit; edit with the generator that it was made from"
        )
    if config.method == "restore" and backbone.restorer is None:
        raise ModelError(
            "this generator was not trained for method='restore'; use method='local', or train a generator for editing"
        )
    if config.method == "flow" and not isinstance(backbone, ContinuousBackbone):
        raise ModelError("this generator has no velocities, which method='flow' needs; use method='local'")


def needs_source_tokens(config: EditConfig) -> bool:
    """Return True if editing needs the condition tokens of the images themselves."""
    return config.contrast or config.method in ("flow", "local")


def fit_images(images: Sequence[Image.Image], side: int) -> NDArray[np.uint8]:
    """Convert images of any mode and size to (B, side, side, 3) uint8: on white, centre square, resized.

    Logs a warning with the number of images that are not of that size. Raises ``ModelError`` if there is no image, or
    if an element is not an image or has no pixels.
    """
    if not len(images) or not all(isinstance(image, Image.Image) for image in images):
        raise ModelError("there is no image to edit, or one is not a PIL image; give at least one PIL image")
    if other := sum(image.size != (side, side) for image in images):
        message = "%d of %d images are cropped to their centre square and resized to %d px"
        logger.warning(message, other, len(images), side)
    return np.stack([image_to_array(to_rgb(image), side) for image in images])


def _noise(backbone: Backbone, count: int, steps: int, config: EditConfig, generator: Generators) -> Tensor:
    """Return the noise (B, N, …) of the edits of ``count`` images."""
    samples = _noise_samples(config)
    if not isinstance(generator, Sequence):
        noise = backbone.noise(count * samples, steps, generator)
    elif len(generator) != count:
        raise ModelError(
            f"number of generators differs from that of the images: {len(generator)}, {count}; give one or {count}"
        )
    else:
        noise = torch.cat([backbone.noise(samples, steps, one) for one in generator])
    return noise.reshape(count, samples, *noise.shape[1:])


def _noise_samples(config: EditConfig) -> int:
    """Return the noise samples that the edits of one image need."""
    match config.method:
        case "flow":
            return config.candidates * config.steps * FLOW_SAMPLES
        case "local":
            return config.candidates + CONTRAST_SAMPLES
        case _:
            return config.candidates


def _candidates(
    backbone: Backbone,
    new_canvas: NewCanvas,
    source: Tensor,
    condition: Tensor,
    source_condition: Tensor | None,
    noise: Tensor,
    config: EditConfig,
    on_step: Callable[[int], None],
) -> Iterator[Tensor]:
    """Generate the candidates of one batch on the backbone's device: each (B, 3, S, S) in [−1, 1] on the CPU."""
    source, condition, noise = (part.to(backbone.device) for part in (source, condition, noise))
    source_condition = None if source_condition is None else source_condition.to(backbone.device)
    negative = source_condition if config.contrast else None
    noises = noise[:, : config.candidates].unbind(1)
    if config.method == "restore":
        assert backbone.restorer is not None  # noqa: S101 - checked by the caller
        for one in noises:
            yield restore(backbone.restorer, source, condition, one, config, negative=negative, on_step=on_step).cpu()
        return
    canvas = new_canvas(source, condition, config, negative)
    if config.method == "sdedit":
        for one in noises:
            yield canvas.regenerate(one, on_step).cpu()
        return
    assert source_condition is not None  # noqa: S101 - the caller provides it for these methods
    if config.method == "flow":
        assert isinstance(canvas, ContinuousCanvas)  # noqa: S101 - checked by the caller
        for samples in noise.chunk(config.candidates, dim=1):
            edited = canvas.move(source_condition, samples, on_step)
            yield (keep_unchanged(edited, source) if config.keep else edited).cpu()
        return
    contrast = canvas.contrast(source_condition, noise[:, config.candidates :])
    if contrast.shape[-1] != source.shape[-1]:  # contrast of latents or codes
        contrast = F.interpolate(contrast, size=source.shape[-2:], mode="bilinear")
    regions = propose_regions(contrast, math.ceil(config.candidates / 2), largest=config.largest_region).unbind(1)
    for region, one in zip(itertools.cycle(regions), noises, strict=False):
        edited = canvas.inpaint(region, one, on_step)
        yield (keep_unchanged(edited, source) if config.keep else edited).cpu()


def _canvas_for(backbone: Backbone) -> tuple[NewCanvas, int]:
    """Return the constructor of the backbone's canvas, and its noise steps in addition to those of the sampler."""
    match backbone:
        case ContinuousBackbone():
            return functools.partial(ContinuousCanvas, backbone), 0
        case DiscreteBackbone():
            return functools.partial(DiscreteCanvas, backbone), DiscreteCanvas.NOISE_STEPS
        case _:
            raise TypeError(f"no canvas for this backbone: {type(backbone).__name__}")
