"""Variants of the training images, computed from the stored ones when they are read.

A variant is a separate domain with its own embeddings and neighbours. The network must therefore take the colours from
the neighbours. Image ``i`` of variant ``v`` has the number ``v · N + i``.

Legend: ``N`` stored images, ``V`` variants, ``b`` images of a batch, ``S`` side.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VARIANTS = ("as they are", "mirrored", "recoloured")
WEIGHTS = (4, 1, 1)
"""How often an epoch contains each image of a variant."""
MIRRORED, RECOLOURED = 1, 2
CHANNEL_ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0), (0, 2, 1), (1, 0, 2))
"""The colour channels as they are, and their permutations. All recoloured images of a style have the same one."""


def changed(pixels: Tensor, variants: Tensor, styles: Tensor) -> Tensor:
    """Return the ``variants`` (b,) of images (b, S, S, 3) uint8 of ``styles`` (b,)."""
    mirrored = (variants == MIRRORED)[:, None, None, None]
    pixels = torch.where(mirrored, pixels.flip(2), pixels)
    permutation = torch.where(variants == RECOLOURED, 1 + styles % (len(CHANNEL_ORDERS) - 1), 0)
    order = torch.tensor(CHANNEL_ORDERS, device=pixels.device)[permutation]
    return pixels.gather(3, order[:, None, None].expand(pixels.shape))


def variant(pixels: NDArray[np.uint8], styles: NDArray[np.int64], number: int) -> NDArray[np.uint8]:
    """Return all images (N, S, S, 3) as the variant ``number``."""
    images = torch.from_numpy(pixels)
    return changed(images, torch.full((len(images),), number), torch.from_numpy(styles)).numpy()


def reader(
    styles: NDArray[np.int64], chosen: NDArray[np.int64], device: torch.device | str
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that reads training images from the stored ones; ``chosen`` (n,) are their numbers."""
    numbers, style = torch.from_numpy(chosen).to(device), torch.from_numpy(styles).to(device)

    def read(stored: Tensor, rows: Tensor) -> Tensor:
        images, variants = numbers[rows] % len(style), numbers[rows] // len(style)
        return changed(stored[images], variants, style[images])

    return read


class AllVariants:
    """The images of all variants as an array (V · N, S, S, 3), of which N are in memory."""

    def __init__(self, pixels: NDArray[np.uint8], styles: NDArray[np.int64], count: int) -> None:
        """Return ``count`` images, V · N, from ``pixels`` (N, S, S, 3) of ``styles`` (N,)."""
        self._pixels, self._styles, self._count = pixels, styles, count

    @property
    def nbytes(self) -> int:
        """Size of all images in bytes."""
        return self._pixels.nbytes // len(self._pixels) * self._count

    def __len__(self) -> int:
        """Return the number of images, V · N."""
        return self._count

    def __getitem__(self, ids: Any) -> NDArray[np.uint8]:
        """Return the images of integer ids (…), or those of a slice."""
        numbers = np.arange(self._count)[ids]
        flat = numbers.reshape(-1)
        images, variants = flat % len(self._pixels), flat // len(self._pixels)
        parts = (torch.from_numpy(part) for part in (self._pixels[images], variants, self._styles[images]))
        return changed(*parts).numpy().reshape(*numbers.shape, *self._pixels.shape[1:])
