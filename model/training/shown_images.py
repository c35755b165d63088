"""Images of neighbours that a training batch shows to the network: chosen, partly hidden, and changed at random.

Legend: ``B`` batch, ``I`` images of a sample, ``K`` neighbours shown, ``S`` side.

A copy of the neighbour's image must never be the answer. Therefore near-duplicates of the image are left out, and each
image is mirrored, shifted and scaled independently of the target. At inference images are shown as they are, which is
the centre of the changes seen in training.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.configs import ConditioningConfig
from model.diffusion.conditioning import SampledCondition
from model.errors import ModelError
from model.networks.denoiser import unwrap
from model.networks.image_tokens import ShownImages, choose_distinct, takes_images
from model.step_random import StepRandom
from model.training.batch import Batch

MIRRORED = 0.5
"""Share of images that are mirrored horizontally."""
LARGEST_SHIFT = 0.1
"""Largest shift of an image in each direction, as a share of its side."""
LARGEST_SCALE = 1.15
"""Largest factor by which an image is scaled up or down."""


def shown_images(
    network: Any, batch: Batch, condition: SampledCondition, config: ConditioningConfig, rng: StepRandom
) -> ShownImages | None:
    """Return the images that a network sees in a training step, or None if it takes none.

    They are those of the nearest neighbours that the condition shows and that are not near-duplicates of the image.

    Args:
        network: The network in training.
        batch: The batch, with images of neighbours if the network takes them.
        condition: Its condition.
        config: Probability of hiding the images.
        rng: Source of all randomness, on the device of the batch.

    Raises:
        ModelError: The network takes images, and the batch has none.
    """
    inner = unwrap(network)
    if not takes_images(inner):
        return None
    if batch.neighbour_images is None:
        raise ModelError(
            "the network takes images of neighbours, but the training set has none; give it database_images"
        )
    cosines = batch.cosines().gather(1, condition.chosen)
    first, shown = choose_distinct(cosines, condition.visible, inner.config.neighbour_images)
    pixels = batch.neighbour_images.choose(condition.chosen.gather(1, first))
    kept = rng.uniform(len(pixels), 1) >= config.drop_images
    return ShownImages(change_at_random(pixels, rng), shown & kept)


def change_at_random(images: Tensor, rng: StepRandom) -> Tensor:
    """Mirror, shift and scale each of the images (B, I, 3, S, S) independently. Edges are extended."""
    batch, count = images.shape[:2]
    mirrored = torch.where(rng.uniform(batch, count) < MIRRORED, -1.0, 1.0)
    scale = LARGEST_SCALE ** (2 * rng.uniform(batch, count) - 1)
    shift = LARGEST_SHIFT * 2 * (2 * rng.uniform(batch, count, 2) - 1)  # the side is 2 in the units of a grid
    transform = torch.zeros(batch, count, 2, 3, device=images.device)
    transform[..., 0, 0], transform[..., 1, 1], transform[..., 2] = mirrored / scale, 1 / scale, shift
    flat = images.flatten(0, 1)
    grid = F.affine_grid(transform.flatten(0, 1), list(flat.shape), align_corners=False)
    return F.grid_sample(flat, grid, padding_mode="border", align_corners=False).view(images.shape)
