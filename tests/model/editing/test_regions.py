import pytest
import torch
from torch import Tensor

from model.editing.regions import inpaint_region, propose_regions, select_candidate, text_contrast

GENERATOR = torch.Generator().manual_seed(0)
SOURCE = torch.rand(2, 3, 32, 32, generator=GENERATOR) * 2 - 1
NOISE = torch.randn(2, 4, 3, 32, 32, generator=GENERATOR)
LEVELS = torch.linspace(1, 0, 4)


def patches() -> Tensor:
    """Return a contrast with a strong 8×8 patch, a weaker 6×6 patch, and almost none elsewhere."""
    contrast = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 0.01
    contrast[..., 2:10, 2:10] = 1
    contrast[..., 20:26, 20:26] = 0.6
    return contrast


def test_text_contrast_is_where_the_outputs_differ() -> None:
    def denoiser(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        assert sigma.unique().tolist() == pytest.approx([0.95])
        output = noisy.clone()
        output[..., 8:16, 8:16] += condition.mean((1, 2))[:, None, None, None]
        return output

    text, own = torch.full((2, 3, 5), 0.7), torch.full((2, 3, 5), 0.2)
    contrast = text_contrast(denoiser, SOURCE, text, own, NOISE)
    expected = torch.zeros(2, 1, 32, 32)
    expected[..., 8:16, 8:16] = 0.5
    torch.testing.assert_close(contrast, expected, atol=1e-5, rtol=0)
    assert not text_contrast(denoiser, SOURCE, text, text, NOISE).any()


def test_propose_regions_returns_the_patches_of_highest_contrast() -> None:
    regions = propose_regions(patches(), 8, largest=0.4)[0, :, 0]
    assert regions.shape == (8, 32, 32)
    assert (regions[:, 3:9, 3:9] == 1).all(dim=(1, 2)).any()
    weak = (regions[:, 21:25, 21:25] == 1).all(dim=(1, 2)) & (regions[:, 3:9, 3:9] == 0).all(dim=(1, 2))
    assert weak.any(), "the weaker patch has its own region"
    assert (regions[0] * patches()[0, 0]).sum() == (regions * patches()[0]).sum((1, 2)).max()


@pytest.mark.parametrize("largest", [0.1, 0.3, 1.0])
def test_propose_regions_respects_the_largest_share(largest: float) -> None:
    regions = propose_regions(patches(), 4, largest=largest)
    assert ((regions > 0.5).float().mean((2, 3, 4)) <= largest + 0.02).all()
    assert (regions.sum((2, 3, 4)) > 0).all()


def test_propose_regions_repeats_or_is_empty_without_contrast() -> None:
    one = torch.zeros(1, 1, 32, 32)
    one[..., 10:18, 10:18] = 1
    regions = propose_regions(one, 5, largest=0.3)[0]
    assert (regions[..., 11:17, 11:17] == 1).all()
    assert not propose_regions(torch.zeros(2, 1, 32, 32), 3, largest=0.4).any()


def test_inpaint_region_changes_only_the_region() -> None:
    target = SOURCE.flip(0)

    def denoiser(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        return (noisy - target) / sigma[:, None, None, None]

    region = torch.zeros(2, 1, 32, 32)
    region[..., 5:12, 5:12] = 1
    result = inpaint_region(denoiser, SOURCE, region, torch.zeros(2, 1, 1), NOISE[:, 0], LEVELS)
    torch.testing.assert_close(result, torch.where(region.bool(), target, SOURCE), atol=1e-5, rtol=0)


def test_inpaint_region_surroundings_have_the_noise_of_the_step() -> None:
    inputs = []

    def denoiser(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        inputs.append(noisy)
        return torch.zeros_like(noisy)

    inpaint_region(denoiser, SOURCE, torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 1), NOISE[:, 0], LEVELS)
    for level, noisy in zip(LEVELS, inputs, strict=False):
        torch.testing.assert_close(noisy, (1 - level) * SOURCE + level * NOISE[:, 0])


def test_select_candidate_prefers_the_best_that_keeps_the_rest() -> None:
    local = SOURCE.clone()
    local[..., 4:10, 4:10] *= -1
    whole = -SOURCE
    near = SOURCE + 0.3 * torch.randn(SOURCE.shape, generator=torch.Generator().manual_seed(2))
    scores = torch.tensor([[0.9, 0.9], [0.4, 0.1], [0.1, 0.3]])
    chosen = select_candidate(SOURCE, [whole, local, SOURCE], scores, kept_db=25)
    assert torch.equal(chosen, torch.stack([local[0], SOURCE[1]]))
    assert torch.equal(select_candidate(SOURCE, [whole, near], scores[:2], kept_db=25), near)
    assert torch.equal(select_candidate(SOURCE, [whole, near], scores[:2], kept_db=-100), whole)
