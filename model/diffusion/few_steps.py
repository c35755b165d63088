"""Sampling in few network calls, by a network that was distilled to a fixed grid of noise levels.

Legend: ``B`` batch, ``C S S`` image or latent, ``T`` condition tokens, ``E`` their channels.

    1 = σ_0 > σ_1 > … > σ_N = 0                          the grid
    u(x, σ) = (x − x_τ)/(σ − τ),   τ = max{σ_i < σ}       the mean velocity from x at σ to x_τ on the next level

The velocity changes along the path, so its integration needs many steps. The mean velocity needs one step for each
level. A network learns it from the guided velocity of another one, so it needs no guidance: see
:mod:`model.training.objectives.distillation`. It takes any σ, so sampling may start from an image with noise.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from model.diffusion.flow_matching import Denoiser
from model.errors import ModelError


def few_step_levels(steps: int, shift: float = 2.0) -> tuple[float, ...]:
    """Return the levels σ_0 … σ_(N−1) of a grid of ``steps`` steps, shifted towards noise as those of the schedulers.

    σ = shift·u/(1 + (shift − 1)·u) for even u (Esser et al. 2403.03206, eq. 23). Raises ``ModelError`` for less than 1
    step.
    """
    if steps < 1:
        raise ModelError(f"steps is below 1: {steps}; give at least 1")
    even = (1 - step / steps for step in range(steps))
    return tuple(shift * u / (1 + (shift - 1) * u) for u in even)


def check_levels(levels: Sequence[float]) -> None:
    """Raise ``ModelError`` unless the levels fall from 1 to above 0."""
    following = [*levels[1:], 0.0]
    if not levels or levels[0] != 1 or not all(level > lower for level, lower in zip(levels, following, strict=True)):
        raise ModelError(f"noise_levels is not valid: {list(levels)}; give levels that fall from 1 to above 0")


def intervals(levels: Sequence[float], strength: float = 1.0) -> list[tuple[float, float]]:
    """Return the intervals (σ, τ) from ``strength`` to 0: the first begins at ``strength``, the others on the grid."""
    starts = [strength, *(level for level in levels if level < strength)]
    return list(zip(starts, [*starts[1:], 0.0], strict=True))


def solve_few_steps(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Tensor,
    levels: Sequence[float],
    on_step: Callable[[int], None],
    *,
    strength: float = 1.0,
) -> Tensor:
    """Take one step for each level below ``strength``, and one from it.

    Args:
        denoiser: Mean velocity of (x_σ, σ, condition).
        noise: (B, C, S, S), on the denoiser's device: pure noise, or for a lower strength the noised start.
        condition: (B, T, E).
        levels: The grid, as of :func:`few_step_levels`.
        on_step: Called with the number of each finished step. Levels above ``strength`` count as finished.
        strength: Noise level to start from, in (0, 1].

    Returns:
        (B, C, S, S).
    """
    remaining = intervals(levels, strength)
    sample = noise
    for number, (sigma, lower) in enumerate(remaining, start=1 + len(levels) - len(remaining)):
        velocity = denoiser(sample, sample.new_full((len(sample),), sigma), condition)
        sample = sample + (lower - sigma) * velocity
        on_step(number)
    return sample
