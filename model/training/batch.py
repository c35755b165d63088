"""Training batches."""

import dataclasses

from torch import Tensor


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
    """

    images: Tensor
    query: Tensor
    neighbours: Tensor
    reference: Tensor | None = None
