"""Images to start from instead of pure noise: stored neighbours of the prompts, or the user's own images.

Legend: ``B`` samples, ``P`` prompts, ``S`` side.

    x_s = (1 − s)·start + s·ε,  then the flow from σ = s to 0      (SDEdit, Meng et al. 2108.01073, section 3)

An embedding describes which objects an image shows, but barely where they are. The start supplies the layout.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.errors import ModelError
from model.generation.arguments import check_choice
from model.generation.backbone import Backbone
from model.generation.discrete import NO_START
from model.images import image_to_array, to_model_range, to_rgb
from model.retrieval.database import Searchable

Start: TypeAlias = Literal["noise", "neighbour"] | Image.Image | Sequence[Image.Image]
"""Pure noise, a stored neighbour of each prompt, or an image for all prompts or one for each."""

STRENGTH = 0.8
"""Default share of noise that is added to a start."""
BEST = 3
"""Number of nearest neighbours among which the start is chosen."""
MARGIN = 0.05
"""Largest difference of their cosines to that of the nearest one. Neighbours below it show other things."""


def checked_strength(backbone: Backbone, start: Start, strength: float | None, retrieve: bool) -> float:
    """Return the strength of a start, ``STRENGTH`` by default, or 1 for pure noise.

    Raises ``ModelError`` for an unknown start, one that the generator does not support, or a strength out of range.
    """
    if isinstance(start, str):
        check_choice("start", start, ("noise", "neighbour"))
    if start == "noise":
        if strength not in (None, 1):
            raise ModelError(f"strength has no effect on pure noise: {strength}; use it with start='neighbour'")
        return 1.0
    if not backbone.starts_from_images:
        raise ModelError(NO_START)
    if start == "neighbour" and not retrieve:
        raise ModelError("start='neighbour' needs retrieval; remove retrieve=False, or use start='noise'")
    strength = STRENGTH if strength is None else strength
    if not 0 < strength <= 1:
        raise ModelError(f"strength is out of range: {strength}; give a number above 0 and at most 1")
    return strength


def neighbour_images(embeddings: Tensor, database: Searchable, noise: Tensor, side: int) -> Tensor:
    """Return a stored neighbour for each sample, chosen by its noise: (B, 3, S, S) in [−1, 1].

    The choice depends on nothing but the sample's noise, so a seed gives the same images in any batch.

    Args:
        embeddings: (P, D) unit rows of the prompts; the samples of one prompt are adjacent, B / P each.
        database: Where to retrieve.
        noise: (B, …) standard normal.
        side: S.

    Raises:
        ModelError: The database has no images, or a prompt has no neighbour.
    """
    hits = database.search(embeddings.numpy(), BEST)
    near = (hits.ids >= 0) & (hits.scores >= hits.scores[:, :1] - MARGIN)
    repeats = len(noise) // len(embeddings)
    ids, found = hits.ids.repeat(repeats, axis=0), near.sum(axis=1).repeat(repeats)
    if not found.all():
        raise ModelError("a prompt has no neighbour to start from; use start='noise', or a database with other images")
    chosen = ids[np.arange(len(ids)), choose_by_noise(noise, found)]
    unique, inverse = np.unique(chosen, return_inverse=True)
    return as_start(database.images(unique.tolist()), side)[torch.from_numpy(inverse)]


def as_start(images: Sequence[Image.Image], side: int) -> Tensor:
    """Convert images of any mode and size to (B, 3, side, side) in [−1, 1]: on white, centre square, resized."""
    return to_model_range(torch.from_numpy(np.stack([image_to_array(to_rgb(image), side) for image in images])))


def choose_by_noise(noise: Tensor, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Choose an integer in [0, counts[i]) for each sample i, uniformly, as a function of its noise (B, …): (B,) int64.

    The sum of n standard normal values, divided by √n, is standard normal. Its cumulative distribution function is
    therefore uniform.
    """
    flat = noise.flatten(1).double()
    uniform = torch.special.ndtr(flat.sum(1) / math.sqrt(flat.shape[1])).numpy()
    chosen: NDArray[np.int64] = np.minimum((uniform * counts).astype(np.int64), counts - 1)
    return chosen
