"""Retrieval between the images and the names of a style, by any encoder: the figures of sticker-clip's card.

Legend: ``N`` images, ``C`` distinct names of them, ``D`` embedding width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOP = (1, 5)

EmbedImages = Callable[[Tensor], Tensor]
"""Function of images (N, 3, H, W) uint8 that returns unit rows (N, D)."""
EmbedTexts = Callable[[Sequence[str]], Tensor]
"""Function of texts that returns unit rows (C, D)."""


@torch.no_grad()
def retrieval(
    images: Tensor, names: Sequence[str], embed_images: EmbedImages, embed_texts: EmbedTexts
) -> dict[str, float]:
    """Return R@1 and R@5 of both directions, and the numbers of images and names.

    Text to image: the query is a name, and any image of this name is a hit. Image to text: the query is an image, and
    its own name among all names of the style is the hit.

    Args:
        images: (N, 3, H, W) uint8.
        names: The N names. Several images may have the same one.
        embed_images: The encoder's image tower.
        embed_texts: The encoder's text tower.
    """
    distinct = list(dict.fromkeys(names))
    number = {name: i for i, name in enumerate(distinct)}
    concepts = torch.tensor([number[name] for name in names])
    scores = (embed_texts(distinct).float() @ embed_images(images).float().T).cpu()
    result: dict[str, float] = {}
    for direction, ranked, own in (
        ("text_to_image", concepts[_best(scores)], torch.arange(len(distinct))),
        ("image_to_text", _best(scores.T), concepts),
    ):
        hits = ranked == own[:, None]
        result |= {f"{direction}/R@{k}": round(float(hits[:, :k].any(1).float().mean()), 4) for k in TOP}
    return {**result, "images": len(names), "names": len(distinct)}


def _best(scores: Tensor) -> Tensor:
    """Return the column numbers of the best scores of each row, best first."""
    return scores.topk(min(max(TOP), scores.shape[1]), dim=1).indices
