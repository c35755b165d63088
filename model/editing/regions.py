"""Editing one region of a picture that nobody marked: found by contrast, drawn anew, and chosen among several.

Legend: ``B`` pictures, ``R`` regions, ``N`` draws of noise, ``S`` side, ``T`` condition tokens, ``E`` their channels.

    where      d = mean over ε of |v̂(x_σ, text) − v̂(x_σ, what the source shows)|, σ = 0.95  (DiffEdit 2210.11427)
    what       x ← region·x + (1 − region)·((1 − σ)·source + σ·ε) after every step  (Blended Diffusion 2111.14818)
    which      of several regions and draws the one closest to the text that keeps the rest

At high noise the two answers differ over whole parts (the hair, the heart), at low noise only along edges, hence σ.
"""

from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.diffusion.flow_matching import Denoiser, add_noise
from model.editing.edit_metrics import changed_region, psnr_outside

CONTRAST_LEVEL = 0.95
CONTRAST_DRAWS = 4
"""Draws of noise that the contrast is the mean over."""
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of a picture's pixels, those of most contrast, in which connected patches are looked for."""
SMALLEST_REGION = 0.02
"""Share of a picture below which a patch is a speck."""
ALIKE = 0.6
"""Intersection over union from which on two regions count as one."""
GROW_PX = 2
"""Pixels that join what lies so near to each other; one of them comes off again at the rim."""


def text_contrast(denoiser: Denoiser, source: Tensor, condition: Tensor, shown: Tensor, noises: Tensor) -> Tensor:
    """How much the text and what the source shows disagree at each pixel: (B, 1, S, S), at least 0.

    Args:
        denoiser: of C input channels, its output a velocity.
        source: (B, C, S, S), pixels or latents.
        condition: (B, T, E) tokens of the text.
        shown: (B, T, E) tokens of the source itself.
        noises: (B, N, C, S, S) standard normal.
    """
    level = source.new_full((len(source),), CONTRAST_LEVEL)
    both, total = torch.cat([condition, shown]), source.new_zeros(len(source), 1, *source.shape[2:])
    for noise in noises.unbind(1):
        noisy = add_noise(source, noise, level)
        text, itself = denoiser(noisy.repeat(2, 1, 1, 1), level.repeat(2), both).float().chunk(2)
        total += (text - itself).abs().amax(dim=1, keepdim=True)
    return total / noises.shape[1]


def propose_regions(contrast: Tensor, count: int, *, largest: float) -> Tensor:
    """Connected patches of high contrast, those that hold the most of it first: (B, count, 1, S, S) in [0, 1].

    Regions overlap little, cover at most ``largest`` of the picture before their edge is softened, and repeat where
    there are fewer than ``count``. A picture without contrast has empty ones.

    Args:
        contrast: (B, 1, S, S), at least 0.
        count: R.
        largest: share of the picture, in (0, 1].
    """
    smooth = F.avg_pool2d(contrast.cpu().float(), 5, stride=1, padding=2, count_include_pad=False)[:, 0].numpy()
    regions = np.stack([_repeated(_patches(values, count, largest), count, values.shape) for values in smooth])
    soft = F.avg_pool2d(torch.from_numpy(regions).float(), 3, stride=1, padding=1, count_include_pad=False)
    return soft[:, :, None].to(contrast.device)


def cells_of(region: Tensor, side: int) -> Tensor:
    """What a region of pixels (B, 1, S, S) in [0, 1] touches of a grid of latents or codes: (B, 1, side, side)."""
    return F.max_pool2d(region, region.shape[-1] // side)


def laid_over(source: Tensor, drawn: Tensor, cells: Tensor) -> Tensor:
    """Decoded pictures where their cells were drawn, softly at the rim, and the source elsewhere: (B, 3, S, S).

    An autoencoder shifts every pixel, those of cells that nobody touched, too.
    """
    region = F.interpolate(cells.to(source.dtype), size=source.shape[-2:])
    return torch.lerp(source, drawn, F.avg_pool2d(region, 5, stride=1, padding=2, count_include_pad=False))


def draw_inside(
    denoiser: Denoiser, source: Tensor, region: Tensor, condition: Tensor, noise: Tensor, levels: Tensor
) -> Tensor:
    """The source with its region drawn anew and everything else as it was: (B, C, S, S) float32, not clamped.

    Args:
        denoiser: of C input channels, guided.
        source: (B, C, S, S), pixels or latents.
        region: (B, 1, S, S) in [0, 1].
        condition: (B, T, E).
        noise: (B, C, S, S) standard normal.
        levels: (steps + 1,), falling to 0, as :func:`model.editing.edit.edit_levels` has them.
    """
    picture = add_noise(source, noise, levels[:1].expand(len(source)))
    for level, following in pairwise(levels):
        picture = picture + (following - level) * denoiser(picture, level.expand(len(picture)), condition)
        outside = add_noise(source, noise, following.expand(len(source)))
        picture = torch.lerp(outside, picture, region)
    return picture.float()


def choose(source: Tensor, candidates: Sequence[Tensor], scores: Tensor, *, kept_db: float) -> Tensor:
    """Of each picture's candidates the one of the highest score that keeps the rest: (B, 3, S, S).

    Where none keeps it, the one that comes closest.

    Args:
        source: (B, 3, S, S) in [−1, 1].
        candidates: R times (B, 3, S, S).
        scores: (R, B), higher is better.
        kept_db: least PSNR outside of the changed region.
    """
    kept = torch.stack([psnr_outside(source, one, changed_region(source, one)) for one in candidates]).cpu()
    best = torch.where(kept >= kept_db, scores.cpu(), kept - 1e3).argmax(dim=0)
    return torch.stack([candidates[int(number)][row] for row, number in enumerate(best)])


def _patches(values: NDArray[np.float32], count: int, largest: float) -> list[NDArray[np.bool_]]:
    """At most ``count`` patches (S, S) of one picture, the heaviest first."""
    found = []
    kernel = np.ones((2 * GROW_PX + 1,) * 2, np.uint8)
    for share in SHARES:
        high = (values > np.quantile(values, 1 - share)).astype(np.uint8)
        grown = cv2.erode(cv2.dilate(high, kernel), np.ones((3, 3), np.uint8))
        labels = np.asarray(cv2.connectedComponents(grown, connectivity=8)[1])
        for label in range(1, int(labels.max()) + 1):
            patch = labels == label
            if SMALLEST_REGION <= patch.mean() <= largest:
                found.append((float(values[patch].sum()), patch))
    chosen: list[NDArray[np.bool_]] = []
    for _, patch in sorted(found, key=lambda one: -one[0]):
        if len(chosen) < count and all((patch & other).sum() < ALIKE * (patch | other).sum() for other in chosen):
            chosen.append(patch)
    return chosen


def _repeated(patches: list[NDArray[np.bool_]], count: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if not patches:
        return np.zeros((count, *shape), np.bool_)
    return np.stack([patches[number % len(patches)] for number in range(count)])
