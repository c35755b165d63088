import math

import pytest
import torch
from torch import Tensor

from model.editing.edit_metrics import MAX_PSNR, changed_region, max_channel_difference, psnr_outside
from model.errors import ModelError

SIDE = 32


def white() -> Tensor:
    return torch.ones(1, 3, SIDE, SIDE)


def painted(*boxes: tuple[int, int, int, int], channel: int = 1, value: float = -1) -> Tensor:
    """Return a white image with boxes (top, left, bottom, right), bottom and right excluded."""
    image = white()
    for top, left, bottom, right in boxes:
        image[:, channel, top:bottom, left:right] = value
    return image


def box(top: int, left: int, bottom: int, right: int) -> Tensor:
    mask = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.bool)
    mask[..., top:bottom, left:right] = True
    return mask


def test_max_channel_difference_is_the_largest_of_the_channels() -> None:
    assert max_channel_difference(white(), painted((0, 0, 1, 1), value=0.5))[0, 0, 0, 0] == 0.25
    assert max_channel_difference(white(), painted((0, 0, 1, 1)))[0, 0, :2, 0].tolist() == [1, 0]


def test_changed_region_is_the_patch_and_its_rim() -> None:
    assert torch.equal(changed_region(white(), painted((10, 8, 16, 20))), box(8, 6, 18, 22))
    assert torch.equal(changed_region(white(), painted((10, 8, 16, 20)), rim_px=0), box(10, 8, 16, 20))


def test_changed_region_second_patch_counts_as_damage() -> None:
    before, after = white(), painted((2, 2, 6, 6), (12, 12, 20, 20))
    region = changed_region(before, after)
    assert torch.equal(region, box(10, 10, 22, 22))
    outside = SIDE * SIDE - 12 * 12
    expected = -10 * math.log10(16 / (3 * outside))
    assert psnr_outside(before, after, region).item() == pytest.approx(expected, abs=1e-3)


def test_changed_region_joins_patches_at_corners() -> None:
    assert changed_region(white(), painted((4, 4, 8, 8), (8, 8, 12, 12)), rim_px=0).sum() == 32


def test_changed_region_ignores_changes_below_the_threshold() -> None:
    after = painted((4, 4, 12, 12), value=1 - 2 * 0.09)
    assert not changed_region(white(), after).any()
    assert changed_region(white(), after, threshold=0.08).any()
    assert changed_region(white(), painted((4, 4, 12, 12), value=1 - 2 * 0.11)).any()


def test_changed_region_of_a_whole_change_is_empty() -> None:
    after = -white()
    region = changed_region(white(), after)
    assert not region.any()
    assert psnr_outside(white(), after, region).item() == pytest.approx(0, abs=1e-4)


def test_changed_region_above_the_maximum_shrinks_to_the_largest_changes() -> None:
    after = painted((0, 0, SIDE, SIDE), value=0.6)  # 0.2 everywhere
    after[:, 1, 8:16, 8:16] = -1
    region = changed_region(white(), after)
    assert torch.equal(region, box(6, 6, 18, 18))
    assert psnr_outside(white(), after, region).item() == pytest.approx(-10 * math.log10(0.2**2 / 3), abs=0.01)


def test_changed_region_is_estimated_per_image() -> None:
    after = torch.cat([painted((4, 4, 8, 8)), white(), painted((20, 20, 24, 24), channel=2)])
    regions = changed_region(white().expand(3, -1, -1, -1), after)
    assert regions.sum((1, 2, 3)).tolist() == [64, 0, 64]


def test_psnr_outside_of_known_errors() -> None:
    before = torch.zeros(3, 3, SIDE, SIDE)
    after = torch.stack([torch.full((3, SIDE, SIDE), value) for value in (0.2, 0.02, 0.0)])
    after[:, :, :8, :8] = 1
    decibel = psnr_outside(before, after, box(0, 0, 8, 8).expand(3, -1, -1, -1))
    assert decibel.tolist() == pytest.approx([20, 40, MAX_PSNR], abs=1e-3)


def test_edit_metrics_invalid_input_raises() -> None:
    with pytest.raises(ModelError, match="images differ in shape"):
        max_channel_difference(white(), white()[..., :8])
    for wrong in ({"threshold": 0}, {"max_share": 1}, {"rim_px": -1}):
        with pytest.raises(ModelError, match="threshold must be in"):
            changed_region(white(), white(), **wrong)
    with pytest.raises(ModelError, match="PSNR is undefined"):
        psnr_outside(white(), white(), box(0, 0, SIDE, SIDE))
