"""Editing of one region without a mask: find it by contrast, regenerate it, select among candidates.

Legend: ``B`` images, ``R`` regions, ``N`` noise samples, ``C S S`` pixels or latents of an image, ``T`` condition
tokens, ``E`` their channels.

    contrast     d = mean over ε of |v̂(x_σ, text) − v̂(x_σ, source's own condition)|, σ = 0.95  (DiffEdit 2210.11427)
    inpainting   x ← region·x + (1 − region)·((1 − σ)·source + σ·ε) after every step  (Blended Diffusion 2111.14818)
    selection    among several regions and noise samples, the candidate closest to the text that preserves the rest

The contrast uses a high σ because the two outputs then differ over whole objects, at low noise only along edges.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.diffusion.flow_matching import Denoiser, add_noise
from model.editing.edit_metrics import changed_region, max_channel_difference, psnr_outside

CONTRAST_LEVEL = 0.95
"""Noise level σ of the contrast."""
CONTRAST_SAMPLES = 4
"""Noise samples that the contrast is averaged over."""
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the pixels of highest contrast. For each share, these pixels are searched for connected patches."""
SMALLEST_REGION = 0.02
"""Patches that cover a smaller share of the image are ignored."""
SAME_REGION_IOU = 0.6
"""Minimum intersection over union of two regions that count as one."""
GROW_PX = 2
"""Pixels by which patches are dilated to join nearby ones. They are then eroded by one pixel."""
KEPT_BELOW, CHANGED_ABOVE = 0.06, 0.16
"""Differences, as shares of the range: below the first the source is restored, above the second the edit is kept."""


def text_contrast(
    denoiser: Denoiser, source: Tensor, condition: Tensor, source_condition: Tensor, noises: Tensor
) -> Tensor:
    """Return how much the text and the source's own condition disagree at each pixel: (B, 1, S, S), at least 0.

    Args:
        denoiser: Network with C input channels whose output is a velocity.
        source: (B, C, S, S), pixels or latents.
        condition: (B, T, E) tokens of the text.
        source_condition: (B, T, E) tokens of the source itself.
        noises: (B, N, C, S, S) standard normal.
    """
    level = source.new_full((len(source),), CONTRAST_LEVEL)
    both, total = torch.cat([condition, source_condition]), source.new_zeros(len(source), 1, *source.shape[2:])
    for noise in noises.unbind(1):
        noisy = add_noise(source, noise, level)
        of_text, of_source = denoiser(noisy.repeat(2, 1, 1, 1), level.repeat(2), both).float().chunk(2)
        total += (of_text - of_source).abs().amax(dim=1, keepdim=True)
    return total / noises.shape[1]


def propose_regions(contrast: Tensor, count: int, *, largest: float) -> Tensor:
    """Propose connected patches of high contrast, those with the highest sum first: (B, count, 1, S, S) in [0, 1].

    Regions overlap little and cover at most ``largest`` of the image before their edge is softened. They repeat if
    there are fewer than ``count``. An image without contrast gets empty regions.

    Args:
        contrast: (B, 1, S, S), at least 0.
        count: R.
        largest: Maximum share of the image, in (0, 1].
    """
    smooth = F.avg_pool2d(contrast.cpu().float(), 5, stride=1, padding=2, count_include_pad=False)[:, 0].numpy()
    regions = np.stack([_cycled(_patches(values, count, largest), count, values.shape) for values in smooth])
    soft = F.avg_pool2d(torch.from_numpy(regions).float(), 3, stride=1, padding=1, count_include_pad=False)
    return soft[:, :, None].to(contrast.device)


def to_grid(region: Tensor, side: int) -> Tensor:
    """Map a region of pixels (B, 1, S, S) in [0, 1] to the latents or codes that it touches: (B, 1, side, side)."""
    return F.max_pool2d(region, region.shape[-1] // side)


def composite(source: Tensor, decoded: Tensor, cells: Tensor) -> Tensor:
    """Composite the regenerated cells of decoded images onto the source, with a soft edge: (B, 3, S, S).

    The other cells keep the source's pixels, because an autoencoder changes every pixel, even of unchanged cells.

    Args:
        source: (B, 3, S, S) in [−1, 1].
        decoded: (B, 3, S, S) in [−1, 1].
        cells: (B, 1, s, s) in [0, 1], 1 for a regenerated latent or code.
    """
    region = F.interpolate(cells.to(source.dtype), size=source.shape[-2:])
    return torch.lerp(source, decoded, F.avg_pool2d(region, 5, stride=1, padding=2, count_include_pad=False))


def inpaint_region(
    denoiser: Denoiser,
    source: Tensor,
    region: Tensor,
    condition: Tensor,
    noise: Tensor,
    levels: Tensor,
    on_step: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Regenerate a region of the source and keep the rest: (B, C, S, S) float32, not clamped.

    Args:
        denoiser: Guided network with C input channels whose output is a velocity.
        source: (B, C, S, S), pixels or latents.
        region: (B, 1, S, S) in [0, 1].
        condition: (B, T, E).
        noise: (B, C, S, S) standard normal.
        levels: (steps + 1,), decreasing to 0, as :func:`model.editing.config.noise_levels` returns them.
        on_step: Called with the number of each finished step, from 1. Default: no progress.
    """
    sample = add_noise(source, noise, levels[:1].expand(len(source)))
    for number, (level, following) in enumerate(pairwise(levels), start=1):
        sample = sample + (following - level) * denoiser(sample, level.expand(len(sample)), condition)
        outside = add_noise(source, noise, following.expand(len(source)))
        sample = torch.lerp(outside, sample, region)
        on_step(number)
    return sample.float()


def keep_unchanged(edited: Tensor, source: Tensor) -> Tensor:
    """Restore the source's pixels where the edited images barely differ: (B, 3, S, S) in [−1, 1].

    The difference is averaged over 5×5 pixels. Around a change, 2 pixels of the edit are kept and 2 more are blended.
    """
    difference = max_channel_difference(edited, source)
    smooth = F.avg_pool2d(difference, 5, stride=1, padding=2, count_include_pad=False)
    changed = ((smooth - KEPT_BELOW) / (CHANGED_ABOVE - KEPT_BELOW)).clamp(0, 1)
    widened = F.max_pool2d(changed, 5, stride=1, padding=2)
    return torch.lerp(source, edited, F.avg_pool2d(widened, 5, stride=1, padding=2, count_include_pad=False))


def select_candidate(source: Tensor, candidates: Sequence[Tensor], scores: Tensor, *, kept_db: float) -> Tensor:
    """Select for each image the candidate of the highest score that preserves the rest: (B, 3, S, S).

    If no candidate preserves it, select the one with the highest PSNR.

    Args:
        source: (B, 3, S, S) in [−1, 1].
        candidates: R tensors (B, 3, S, S).
        scores: (R, B), higher is better.
        kept_db: Minimum PSNR outside of the changed region.
    """
    kept = torch.stack([psnr_outside(source, one, changed_region(source, one)) for one in candidates]).cpu()
    best = torch.where(kept >= kept_db, scores.cpu(), kept - 1e3).argmax(dim=0)
    return torch.stack([candidates[int(number)][row] for row, number in enumerate(best)])


def _patches(values: NDArray[np.float32], count: int, largest: float) -> list[NDArray[np.bool_]]:
    """Return at most ``count`` patches (S, S) of one image, those with the highest contrast sum first."""
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
        if len(chosen) < count and all(
            (patch & other).sum() < SAME_REGION_IOU * (patch | other).sum() for other in chosen
        ):
            chosen.append(patch)
    return chosen


def _cycled(patches: list[NDArray[np.bool_]], count: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if not patches:
        return np.zeros((count, *shape), np.bool_)
    return np.stack([patches[number % len(patches)] for number in range(count)])
