"""What an edit changed, and how well it kept the rest.

Legend: ``B`` pictures, ``S`` side; pictures (B, 3, S, S) in [−1, 1].

No mask comes with an edit, so the region that counts as edited is found in the pictures themselves, and a region found
that way can be made to flatter: were everything that differs called the region, the rest would be kept by definition.
So the region is **one** connected patch, it is grown by a fixed rim alone, and its size is capped. A second patch, a
change of the whole background or a shift of the object beyond the cap all count against the edit.
"""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import ModelError

CHANGED = 0.1
"""Difference, as a share of the range, from which on a pixel counts as changed: 26 of 255 grey levels."""
RIM_PX = 2
MAX_SHARE = 0.5
MAX_PSNR = 100.0
"""dB of pictures that are equal."""


def difference(before: Tensor, after: Tensor) -> Tensor:
    """The largest difference of the three channels at each pixel, as a share of the range: (B, 1, S, S) in [0, 1]."""
    if before.shape != after.shape or before.ndim != 4:
        raise ModelError(
            f"pictures {tuple(before.shape)} and {tuple(after.shape)} must be of one shape (B, 3, S, S); resize them"
        )
    return (before - after).abs().amax(dim=1, keepdim=True) / 2


def changed_region(
    before: Tensor, after: Tensor, *, threshold: float = CHANGED, rim_px: int = RIM_PX, max_share: float = MAX_SHARE
) -> Tensor:
    """The one region that an edit changed.

    The largest 8-connected patch of pixels whose difference reaches ``threshold``, grown by ``rim_px`` pixels. Where it
    would cover more than ``max_share`` of the picture, the threshold rises until it does not, so an edit of everything
    leaves changed pixels outside.

    Args:
        before: (B, 3, S, S) in [−1, 1].
        after: (B, 3, S, S) in [−1, 1].
        threshold: in (0, 1], a share of the range.
        rim_px: pixels around the patch that belong to it.
        max_share: most of the picture that may be called the region, in (0, 1).

    Returns:
        (B, 1, S, S) bool on the CPU; nothing where no pixel changed.
    """
    if not (0 < threshold <= 1 and 0 < max_share < 1 and rim_px >= 0):
        raise ModelError("threshold must lie in (0, 1], max_share in (0, 1), and rim_px be at least 0")
    masks = []
    for differs in difference(before, after)[:, 0].cpu().float().numpy():
        level, region = threshold, np.zeros(differs.shape, np.uint8)
        while level <= 1:
            region = _largest_patch((differs >= level).astype(np.uint8))
            region = np.asarray(cv2.dilate(region, np.ones((2 * rim_px + 1,) * 2, np.uint8)), np.uint8)
            if region.mean() <= max_share:
                break
            level, region = level + 0.02, np.zeros_like(region)
        masks.append(torch.from_numpy(region.astype(bool)))
    return torch.stack(masks)[:, None]


def psnr_outside(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of the pixels outside of the mask, peak 1 over the range: (B,) dB, at most 100.

    ``mask`` (B, 1, S, S) is true inside. Raises ``ModelError`` when a mask leaves nothing outside.
    """
    outside = (~mask.bool()).to(before.device).expand(before.shape)
    count = outside.sum(dim=(1, 2, 3))
    if before.shape != after.shape or not count.all():
        raise ModelError("a mask covers the whole picture, or the pictures differ in shape; there is no outside")
    squares = ((before - after) / 2).square().where(outside, 0).sum(dim=(1, 2, 3)) / count
    return (-10 * torch.log10(squares)).clamp(max=MAX_PSNR)


def _largest_patch(changed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(changed, connectivity=8)
    if count == 1:
        return np.zeros_like(changed)
    largest = 1 + int(np.argmax(np.asarray(stats)[1:, cv2.CC_STAT_AREA]))
    return np.asarray(np.asarray(labels) == largest, np.uint8)
