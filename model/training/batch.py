"""Training batches."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from model.training.neighbour_rows import NeighbourImages


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One worker's share of the global batch, or a piece of it, on the training device.

    Legend: ``b`` images, ``S`` side, ``C s s`` latent, ``n`` codes of an image, ``D`` embedding width, ``P`` pool of
    neighbours.

    Attributes:
        images: (b, 3, S, S) float32 in [−1, 1], (b, C, s, s) latents, or (b, n) int64 codes.
        query: (b, D) float32 unit rows.
        neighbours: (b, P, D) float32 unit rows, nearest first.
        reference: (b, 3, S, S) in [−1, 1], the aligned first neighbours for training an editor, or None.
        neighbour_images: Images of the neighbours, for a network that takes them, or None.
    """

    images: Tensor
    query: Tensor
    neighbours: Tensor
    reference: Tensor | None = None
    neighbour_images: NeighbourImages | None = None

    def cosines(self) -> Tensor:
        """Return the cosines of each image and its neighbours, (b, P), without the rounding of autocast's products."""
        return (self.query[:, None] * self.neighbours).sum(2)


def concatenate(pieces: Sequence[Batch]) -> Batch:
    """Concatenate pieces of a batch. Either all or none have references, and images of neighbours."""
    references = [piece.reference for piece in pieces if piece.reference is not None]
    shown = [piece.neighbour_images for piece in pieces if piece.neighbour_images is not None]
    return Batch(
        images=torch.cat([piece.images for piece in pieces]),
        query=torch.cat([piece.query for piece in pieces]),
        neighbours=torch.cat([piece.neighbours for piece in pieces]),
        reference=torch.cat(references) if references else None,
        neighbour_images=dataclasses.replace(shown[0], ids=torch.cat([one.ids for one in shown])) if shown else None,
    )
