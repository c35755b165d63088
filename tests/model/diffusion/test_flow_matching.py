import pytest
import torch
from torch import Tensor

from model.configs import Prediction
from model.diffusion.flow_matching import (
    MIN_SIGMA,
    NoiseLevels,
    add_noise,
    flow_matching_loss,
    sample_sigmas,
    to_velocity,
)
from model.errors import ModelError
from model.step_random import StepRandom

SHAPE = (5, 3, 4, 4)
SIGMA = torch.tensor([0.06, 0.25, 0.5, 0.75, 1.0])


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


IMAGES, NOISE = normal(0).clamp(-1, 1), normal(1)
CONDITION = torch.zeros(5, 2, 9)


def test_add_noise_ends_are_image_and_noise() -> None:
    assert torch.equal(add_noise(IMAGES, NOISE, torch.zeros(5)), IMAGES)
    assert torch.equal(add_noise(IMAGES, NOISE, torch.ones(5)), NOISE)


def test_add_noise_uses_one_level_per_image() -> None:
    noisy = add_noise(IMAGES, NOISE, SIGMA)
    for position, sigma in enumerate(SIGMA.tolist()):
        torch.testing.assert_close(noisy[position], (1 - sigma) * IMAGES[position] + sigma * NOISE[position])


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_to_velocity_perfect_output_is_the_velocity_of_the_path(prediction: Prediction) -> None:
    output = {"velocity": NOISE - IMAGES, "sample": IMAGES}[prediction]
    velocity = to_velocity(output, add_noise(IMAGES, NOISE, SIGMA), SIGMA, prediction)
    torch.testing.assert_close(velocity, NOISE - IMAGES, atol=2e-5, rtol=0)


def test_to_velocity_small_sigma_is_clamped() -> None:
    output, noisy = torch.zeros(SHAPE), torch.ones(SHAPE)
    sigma = torch.tensor([0.0, MIN_SIGMA / 10, MIN_SIGMA, 0.1, 1.0])
    velocity = to_velocity(output, noisy, sigma, "sample")
    assert velocity[:, 0, 0, 0].tolist() == pytest.approx([1 / MIN_SIGMA] * 3 + [10, 1])


def test_flow_matching_loss_is_the_mean_squared_error_of_the_velocity() -> None:
    inputs: list[Tensor] = []

    def perfect(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        inputs.extend([noisy, sigma, condition])
        return NOISE - IMAGES

    assert flow_matching_loss(perfect, IMAGES, CONDITION, SIGMA, NOISE).item() == 0
    assert torch.equal(inputs[0], add_noise(IMAGES, NOISE, SIGMA))
    assert inputs[1] is SIGMA
    assert inputs[2] is CONDITION

    off_by = flow_matching_loss(lambda *_: NOISE - IMAGES + 0.5, IMAGES, CONDITION, SIGMA, NOISE)
    assert off_by.item() == pytest.approx(0.25)
    silent = flow_matching_loss(lambda *_: torch.zeros(SHAPE), IMAGES, CONDITION, SIGMA, NOISE)
    assert silent.item() == pytest.approx((NOISE - IMAGES).square().mean().item())


def test_flow_matching_loss_of_the_clean_image_is_zero_at_any_noise_level() -> None:
    sigma = torch.full((SHAPE[0],), MIN_SIGMA / 10)

    def perfect(noisy: torch.Tensor, level: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return to_velocity(IMAGES, noisy, level, "sample")

    assert flow_matching_loss(perfect, IMAGES, CONDITION, sigma, NOISE, "sample").item() == 0
    assert flow_matching_loss(perfect, IMAGES, CONDITION, sigma, NOISE).item() > 0.1


def test_sample_sigmas_are_logit_normal() -> None:
    sigma = sample_sigmas(20_000, StepRandom(0, 0))
    assert 0 < sigma.min() < 0.05 < 0.95 < sigma.max() < 1
    logit = torch.logit(sigma)
    assert logit.mean().item() == pytest.approx(0, abs=0.03)
    assert logit.std().item() == pytest.approx(1, abs=0.02)
    within = (sigma > 0.2689).logical_and(sigma < 0.7311).float().mean().item()  # |z| < 1
    assert within == pytest.approx(0.6827, abs=0.014)
    assert torch.equal(sigma[:9], sample_sigmas(20_000, StepRandom(0, 0))[:9])


def test_sample_sigmas_with_levels_shifts_and_narrows_the_distribution() -> None:
    logit = torch.logit(sample_sigmas(20_000, StepRandom(0, 0), NoiseLevels(mean=0.8, deviation=0.5)))
    assert logit.mean().item() == pytest.approx(0.8, abs=0.02)
    assert logit.std().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("wrong", [{"mean": float("nan")}, {"deviation": 0.0}, {"deviation": float("inf")}])
def test_noise_levels_invalid_field_raises(wrong: dict[str, float]) -> None:
    with pytest.raises(ModelError, match=next(iter(wrong))):
        NoiseLevels(**wrong)
