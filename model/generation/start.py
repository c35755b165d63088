"""Images that supply the layout: the start of the flow instead of pure noise, and the reference of an editor.

Legend: ``B`` samples, ``P`` prompts, ``S`` side.

    x_s = (1 − s)·start + s·ε,  then the flow from σ = s to 0      (SDEdit, Meng et al. 2108.01073, section 3)

An embedding describes which objects an image shows, but barely where they are. A stored neighbour of the prompt, or an
image of the user, supplies the layout. The flow starts from it, or a network trained to restore sees it as the
reference while σ is high.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.errors import ModelError
from model.generation.arguments import check_choice
from model.generation.backbone import Backbone
from model.generation.continuous import REFERENCE_ABOVE
from model.generation.discrete import NO_REFERENCE, NO_START
from model.generation.prompts import one_for_each
from model.images import image_to_array, to_model_range, to_rgb
from model.retrieval.searchable import Searchable

Start: TypeAlias = Literal["noise", "neighbour"] | Image.Image | Sequence[Image.Image]
"""Pure noise, a stored neighbour of each prompt, or an image for all prompts or one for each."""

Reference: TypeAlias = Literal["none", "neighbour"]
"""No reference, or a stored neighbour of each prompt."""

STRENGTH = 0.8
"""Default share of noise that is added to a start."""
BEST = 3
"""Number of nearest neighbours among which the start is chosen."""
MARGIN = 0.05
"""Maximum gap to the cosine of the nearest neighbour. Neighbours beyond it are not similar enough."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Source of the layout of the images.

    Attributes:
        start: What the flow starts from.
        strength: Share of noise that is added to the start, in (0, 1].
        reference: What a network trained to restore sees at high noise levels.
    """

    start: Start
    strength: float
    reference: Reference

    def images(
        self, embeddings: Tensor, database: Searchable | None, noise: Tensor, side: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the start and the reference of each sample, each (B, 3, S, S) in [−1, 1] or None.

        Start and reference of a sample are the same neighbour. Arguments as of :func:`neighbour_images`.
        """
        neighbours = None
        if "neighbour" in (self.reference, self.start if isinstance(self.start, str) else None):
            assert database is not None  # noqa: S101 - checked_layout requires retrieval
            neighbours = neighbour_images(embeddings, database, noise, side)
        reference = neighbours if self.reference == "neighbour" else None
        if isinstance(self.start, str):
            return (neighbours if self.start == "neighbour" else None), reference
        images = [self.start] if isinstance(self.start, Image.Image) else list(self.start)
        given = one_for_each(as_start(images, side), len(embeddings), name="start images", of="prompts")
        return given.repeat_interleave(len(noise) // len(embeddings), dim=0), reference


def checked_layout(
    backbone: Backbone, start: Start, strength: float | None, reference: Reference, *, retrieve: bool, between: bool
) -> Layout:
    """Validate the arguments of a call.

    Args:
        backbone: The generator.
        start: What to start from.
        strength: Share of noise, or None for the default.
        reference: What to show to a network trained to restore.
        retrieve: False without neighbours.
        between: True for an interpolation, which starts from noise and has no reference.

    Raises:
        ModelError: An argument is unknown or out of range, or the generator or the call does not support it.
    """
    strength = checked_strength(backbone, start, strength, retrieve)
    check_choice("reference", reference, get_args(Reference))
    if between and (start, reference) != ("noise", "none"):
        raise ModelError("interpolation cannot start from images; use start='noise' and reference='none'")
    if reference == "neighbour":
        if backbone.restorer is None:
            raise ModelError(NO_REFERENCE)
        if not retrieve:
            raise ModelError("reference='neighbour' needs retrieval; remove retrieve=False, or use reference='none'")
        if strength <= REFERENCE_ABOVE:
            raise ModelError(
                f"reference='neighbour' has no effect with this strength: {strength}; "
                f"use a strength above {REFERENCE_ABOVE}, or start='noise'"
            )
    return Layout(start=start, strength=strength, reference=reference)


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
