import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from model.diffusion.few_steps import check_levels, few_step_levels, intervals, solve_few_steps
from model.errors import ModelError

LEVELS = (1.0, 0.6, 0.3)
RATE = 3.0


def exact_mean_velocity(x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
    """Return the mean velocity of dx/dσ = RATE · x down to the next level, for which x = x(1)·exp(RATE·(σ − 1))."""
    level = float(sigma[0])
    length = level - max(lower for lower in (*LEVELS, 0.0) if lower < level - 1e-6)  # σ is float32
    return x * (1 - math.exp(-RATE * length)) / length


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_step_levels_are_those_of_the_euler_scheduler(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    assert few_step_levels(steps) == pytest.approx(scheduler.sigmas[:-1].tolist())
    check_levels(few_step_levels(steps))


def test_few_step_levels_without_steps_raises() -> None:
    with pytest.raises(ModelError, match="steps is below 1: 0; give at least 1"):
        few_step_levels(0)


@pytest.mark.parametrize("levels", [[], [0.9, 0.5], [1.0, 0.5, 0.5], [1.0, 0.0], [1.0, -0.5]])
def test_check_levels_other_than_a_fall_from_1_raises(levels: list[float]) -> None:
    with pytest.raises(ModelError, match=r"noise_levels is not valid: .*; give levels that fall from 1 to above 0"):
        check_levels(levels)


def test_intervals_begin_at_the_strength() -> None:
    assert intervals(LEVELS) == [(1.0, 0.6), (0.6, 0.3), (0.3, 0.0)]
    assert intervals(LEVELS, 0.6) == [(0.6, 0.3), (0.3, 0.0)]
    assert intervals(LEVELS, 0.5) == [(0.5, 0.3), (0.3, 0.0)]
    assert intervals(LEVELS, 0.1) == [(0.1, 0.0)]


@pytest.mark.parametrize(("strength", "steps"), [(1.0, [1, 2, 3]), (0.5, [2, 3]), (0.2, [3])])
def test_solve_few_steps_exact_mean_velocity_reaches_the_end_of_the_flow(strength: float, steps: list[int]) -> None:
    noise, done = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), list[int]()
    end = solve_few_steps(exact_mean_velocity, noise, torch.zeros(2, 1, 1), LEVELS, done.append, strength=strength)
    torch.testing.assert_close(end, noise * math.exp(-RATE * strength))
    assert done == steps
