"""Metrics of edits: the region that an edit changed, and how well it preserved the rest.

Legend: ``B`` images, ``S`` side; images are (B, 3, S, S) in [−1, 1].

An edit comes without a mask, so the changed region is estimated from the images. A generous estimate would flatter the
edit: if every difference belonged to the region, the rest would be preserved by definition. The region is therefore
**one** connected patch, grown by a fixed rim, with a maximum size. A second patch, a changed background or a shifted
object that exceeds the maximum size all count against the edit.
"""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import ModelError

CHANGE_THRESHOLD = 0.1
"""Minimum difference of a changed pixel, as a share of the range: 26 of 255 grey levels."""
RIM_PX = 2
"""Pixels by which a changed region is grown."""
MAX_SHARE = 0.5
"""Maximum share of an image that a changed region may cover."""
MAX_PSNR = 100.0
"""PSNR of identical images, in dB."""


def max_channel_difference(before: Tensor, after: Tensor) -> Tensor:
    """Return the largest difference of the channels at each pixel, as a share of the range: (B, 1, S, S) in [0, 1]."""
    if before.shape != after.shape or before.ndim != 4:
        raise ModelError(
            f"images differ in shape: {tuple(before.shape)} and {tuple(after.shape)}; resize both to (B, 3, S, S)"
        )
    return (before - after).abs().amax(dim=1, keepdim=True) / 2


def changed_region(
    before: Tensor,
    after: Tensor,
    *,
    threshold: float = CHANGE_THRESHOLD,
    rim_px: int = RIM_PX,
    max_share: float = MAX_SHARE,
) -> Tensor:
    """Estimate the one region that an edit changed.

    It is the largest 8-connected patch of pixels whose difference reaches ``threshold``, grown by ``rim_px`` pixels. If
    it covers more than ``max_share`` of the image, the threshold is raised until it does not. An edit of the whole
    image therefore leaves changed pixels outside.

    Args:
        before: (B, 3, S, S) in [−1, 1].
        after: (B, 3, S, S) in [−1, 1].
        threshold: In (0, 1], a share of the range. Default: 0.1.
        rim_px: Pixels around the patch that belong to the region. Default: 2.
        max_share: Maximum share of the image, in (0, 1). Default: 0.5.

    Returns:
        (B, 1, S, S) bool on the CPU; all False for an image without changed pixels.
    """
    if not (0 < threshold <= 1 and 0 < max_share < 1 and rim_px >= 0):
        raise ModelError(
            "threshold must be in (0, 1], max_share in (0, 1) and rim_px at least 0: "
            f"{threshold}, {max_share}, {rim_px}"
        )
    masks = []
    for difference in max_channel_difference(before, after)[:, 0].cpu().float().numpy():
        level, region = threshold, np.zeros(difference.shape, np.uint8)
        while level <= 1:
            region = _largest_patch((difference >= level).astype(np.uint8))
            region = np.asarray(cv2.dilate(region, np.ones((2 * rim_px + 1,) * 2, np.uint8)), np.uint8)
            if region.mean() <= max_share:
                break
            level, region = level + 0.02, np.zeros_like(region)
        masks.append(torch.from_numpy(region.astype(bool)))
    return torch.stack(masks)[:, None]


def psnr_outside(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of the pixels outside of the mask: (B,) dB, at most 100.

    ``mask`` (B, 1, S, S) is True inside. Raises ``ModelError`` if a mask covers a whole image.
    """
    outside = (~mask.bool()).to(before.device).expand(before.shape)
    count = outside.sum(dim=(1, 2, 3))
    if before.shape != after.shape or not count.all():
        raise ModelError(
            "PSNR is undefined: a mask covers its whole image, or the images differ in shape; give a smaller mask"
        )
    squares = ((before - after) / 2).square().where(outside, 0).sum(dim=(1, 2, 3)) / count
    return (-10 * torch.log10(squares)).clamp(max=MAX_PSNR)


def _largest_patch(changed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(changed, connectivity=8)
    if count == 1:
        return np.zeros_like(changed)
    largest = 1 + int(np.argmax(np.asarray(stats)[1:, cv2.CC_STAT_AREA]))
    return np.asarray(np.asarray(labels) == largest, np.uint8)
