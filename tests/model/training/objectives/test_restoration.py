from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models
from torch import Tensor, nn

from model.configs import ConditioningConfig, RestorationConfig
from model.diffusion.conditioning import training_condition
from model.diffusion.flow_matching import sample_sigmas
from model.errors import ModelError
from model.networks.editor import widen_input
from model.step_random import StepRandom
from model.training.batch import Batch
from model.training.objectives.restoration import Restoration, feather, paste_region, regions, sample_randomness

LOCAL = {"empty": 0.0, "whole": 0.0}
CONDITIONING = ConditioningConfig(neighbours=2, pool=2)


def sample_regions(rng: StepRandom, batch: int, side: int, config: RestorationConfig) -> Tensor:
    return regions(sample_randomness(rng, batch), side, config)


def shares(**changes: Any) -> Tensor:
    return sample_regions(StepRandom(0, 0), 2000, 32, RestorationConfig(**LOCAL | changes)).mean((1, 2, 3))


def batch(count: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images, reference = (torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1 for _ in range(2))
    rows = torch.from_numpy(tiny_models.unit_rows(3 * count, seed=seed)).float()
    return Batch(images=images, query=rows[:count], neighbours=rows[count:].view(count, 2, -1), reference=reference)


def test_regions_are_binary_and_depend_only_on_the_randomness() -> None:
    config = RestorationConfig()
    mask = sample_regions(StepRandom(0, 0), 64, 16, config)
    assert (mask.shape, mask.dtype) == ((64, 1, 16, 16), torch.float32)
    assert set(mask.unique().tolist()) == {0, 1}
    assert torch.equal(mask, sample_regions(StepRandom(0, 0), 64, 16, config))
    assert not torch.equal(mask, sample_regions(StepRandom(0, 1), 64, 16, config))
    halves = [sample_regions(StepRandom(0, 0, part=part, parts=2), 32, 16, config) for part in range(2)]
    assert torch.equal(torch.cat(halves), mask), "the parts have the regions of the batch"


def test_regions_are_empty_or_whole_with_the_configured_probability() -> None:
    share = sample_regions(StepRandom(0, 0), 4000, 16, RestorationConfig(empty=0.1, whole=0.3)).mean((1, 2, 3))
    assert (share == 0).float().mean() == pytest.approx(0.1, abs=0.02)
    assert (share == 1).float().mean() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("ellipse", [0.0, 1.0])
def test_regions_single_region_has_the_configured_area(ellipse: float) -> None:
    share = shares(second_region=0, smallest_area=0.05, largest_area=0.05, largest_aspect=1.5, ellipse=ellipse)
    assert share.mean() == pytest.approx(0.05, rel=0.03)
    assert share.max() < 0.065
    share = shares(second_region=0, ellipse=ellipse)
    assert share.max() < 0.52
    assert share.std() > 0.08, "sizes vary"


def test_regions_second_region_adds_to_the_first() -> None:
    both = shares(second_region=1, smallest_area=0.05, largest_area=0.05, largest_aspect=1)
    assert 0.08 < both.mean() < 0.1, "twice the area, minus the overlap"
    assert both.min() > 0.03


def test_regions_cover_the_whole_image_symmetrically() -> None:
    mask = sample_regions(StepRandom(0, 0), 4000, 16, RestorationConfig(**LOCAL)).mean((0, 1))
    assert mask.min() > 0.01
    assert mask[8, 8] > 0.2
    assert torch.allclose(mask, mask.flip(0), atol=0.05)
    assert torch.allclose(mask, mask.T, atol=0.05)


def test_paste_region_shows_the_neighbour_only_inside_the_mask() -> None:
    images, aligned = torch.full((1, 3, 4, 4), -1.0), torch.full((1, 3, 4, 4), 0.5)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1, 2] = 1
    corrupted = paste_region(images, aligned, mask)
    assert corrupted[0, :, 1, 2].tolist() == [0.5] * 3
    assert (corrupted == -1).sum() == 3 * 15


def test_feather_blurs_edges_and_keeps_empty_and_full_masks() -> None:
    step = torch.zeros(1, 1, 16, 16)
    step[..., 8:] = 1
    soft = feather(step, 1.0)
    assert soft.shape == step.shape
    assert (soft[..., 1:].diff() >= 0).all()
    assert soft[0, 0, 5, 7:9].tolist() == pytest.approx([0.3, 0.7], abs=0.05)
    assert torch.allclose(soft, soft[:, :, :1].expand_as(soft)), "no blur at the border of the image"
    assert soft[..., 0].max() == 0
    for flat in (torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)):
        assert torch.allclose(feather(flat, 2.0), flat, atol=1e-6)
    assert feather(step, 0) is step


def test_paste_region_under_autocast_stays_float32() -> None:
    images, aligned = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    step = torch.zeros(1, 1, 16, 16)
    step[..., 8:] = 1
    with torch.autocast("cpu", torch.bfloat16):
        corrupted = paste_region(images, aligned, step, feather_px=1.0)
    torch.testing.assert_close(corrupted, paste_region(images, aligned, step, feather_px=1.0))


class Recorder(nn.Module):
    """Network that returns zeros and records its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.dtype = torch.float32

    def forward(self, noisy: Tensor, **_: Any) -> tuple[Tensor]:
        self.recorded = noisy
        return (noisy[:, :3] * 0 + self.weight,)


def network_inputs(data: Batch, **changes: Any) -> tuple[Tensor, Tensor]:
    network = Recorder()
    objective = Restoration(CONDITIONING, RestorationConfig(**{"drop_reference": 0} | changes), prediction="velocity")
    loss = objective(network, data, StepRandom(0, 0))
    assert loss.shape == ()
    return network.recorded[:, :3], network.recorded[:, 3:]


def test_restoration_network_inputs_are_the_noisy_image_and_the_reference() -> None:
    data = batch()
    noisy, reference = network_inputs(data, empty=1, whole=0)
    assert torch.equal(reference, data.images)
    rng = StepRandom(0, 0)
    training_condition(data.query, data.neighbours, CONDITIONING, rng)
    sigma = sample_sigmas(4, rng)[:, None, None, None]
    torch.testing.assert_close(noisy, (1 - sigma) * data.images + sigma * rng.normal(4, 3, 8, 8))
    assert data.reference is not None
    torch.testing.assert_close(network_inputs(data, empty=0, whole=1)[1], data.reference)


def test_restoration_reference_is_zero_with_the_configured_probability() -> None:
    _, reference = network_inputs(batch(400), drop_reference=0.25)
    assert (reference == 0).flatten(1).all(1).float().mean() == pytest.approx(0.25, abs=0.07)


def test_restoration_training_lowers_the_loss_by_using_the_reference() -> None:
    network = widen_input(tiny_models.network(layers=1)).train()
    shown = Restoration(CONDITIONING, RestorationConfig(drop_reference=0), prediction="sample")
    hidden = Restoration(CONDITIONING, RestorationConfig(drop_reference=1), prediction="sample")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)

    def mean_loss(objective: Restoration) -> float:
        with torch.no_grad():
            return float(np.mean([objective(network, batch(32, seed=90), StepRandom(9, n)) for n in range(8)]))

    before = mean_loss(shown)
    assert mean_loss(hidden) == pytest.approx(before), "the new channels start at zero"
    for step in range(80):
        optimizer.zero_grad()
        shown(network, batch(32, seed=step), StepRandom(0, step)).backward()
        optimizer.step()
    assert mean_loss(shown) < before / 2
    assert mean_loss(shown) < mean_loss(hidden), "without it, images that were not trained on cannot be predicted"


def test_restoration_batch_without_references_or_with_latents_raises() -> None:
    objective, full = Restoration(CONDITIONING, RestorationConfig(), prediction="sample"), batch()
    unreferenced = Batch(images=full.images, query=full.query, neighbours=full.neighbours)
    with pytest.raises(ModelError, match="no reference images; align"):
        objective(Recorder(), unreferenced, StepRandom(0, 0))
    latents = Batch(
        images=full.images[:, :, :4, :4], query=full.query, neighbours=full.neighbours, reference=full.reference
    )
    with pytest.raises(ModelError, match=r"differ in shape: .*; give pixels"):
        objective(Recorder(), latents, StepRandom(0, 0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"smallest_area": 0}, "smallest_area <= largest_area"),
        ({"smallest_area": 0.6, "largest_area": 0.5}, "smallest_area <= largest_area"),
        ({"largest_aspect": 0.5}, "largest_aspect must be at least 1"),
        ({"feather_px": -1}, "feather_px at least 0"),
        ({"drop_reference": 1.1}, r"must be in \[0, 1\]"),
        ({"empty": 0.6, "whole": 0.6}, "mutually exclusive"),
    ],
)
def test_restoration_config_invalid_field_raises(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RestorationConfig(**wrong)
