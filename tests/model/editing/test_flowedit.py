import math

import pytest
import torch
from torch import Tensor

from model.diffusion.conditioning import condition_tokens
from model.editing.config import EditConfig, edit_config
from model.editing.flowedit import FLOW_SAMPLES, SOURCE_GUIDANCE, flow_edit

CONFIG = edit_config("flow", steps=4)
SOURCE = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


def noises(config: EditConfig = CONFIG) -> Tensor:
    return torch.randn(2, config.steps * FLOW_SAMPLES, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def tokens(seed: int) -> Tensor:
    rows = torch.nn.functional.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(seed)), dim=1)
    return condition_tokens(rows, None, dimension=8, batch=2)


def first_channel(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
    """Return a velocity that depends on nothing but the query: its first channel, 0 for the null condition."""
    return condition[:, 0, 0].reshape(-1, 1, 1, 1).expand_as(noisy)


def test_flow_edit_constant_velocities_move_by_their_guided_difference() -> None:
    target, own = tokens(1), tokens(2)
    edited = flow_edit(first_channel, SOURCE, target, own, noises(), CONFIG)
    difference = CONFIG.guidance_scale * target[:, 0, 0] - SOURCE_GUIDANCE * own[:, 0, 0]
    torch.testing.assert_close(edited, SOURCE - CONFIG.strength * difference.reshape(-1, 1, 1, 1))


def test_flow_edit_equal_conditions_and_guidance_return_the_source() -> None:
    def denoiser(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        return torch.sin(3 * noisy) * sigma.reshape(-1, 1, 1, 1) + first_channel(noisy, sigma, condition)

    config = edit_config("flow", steps=4, guidance_scale=SOURCE_GUIDANCE)
    edited = flow_edit(denoiser, SOURCE, tokens(1), tokens(1), noises(config), config)
    torch.testing.assert_close(edited, SOURCE)
    assert not torch.equal(flow_edit(denoiser, SOURCE, tokens(1), tokens(2), noises(config), config), edited)


def test_flow_edit_adds_the_same_noise_to_source_and_edit() -> None:
    seen: list[Tensor] = []

    def denoiser(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        seen.append(noisy[:2])
        return torch.zeros_like(noisy)

    flow_edit(denoiser, SOURCE, tokens(1), tokens(2), noises(), CONFIG)
    assert len(seen) == 2 * CONFIG.steps * FLOW_SAMPLES
    for of_edit, of_source in zip(seen[::2], seen[1::2], strict=True):
        torch.testing.assert_close(of_edit, of_source)  # the edit has not moved
    assert len({float(one.sum()) for one in seen[::2]}) == CONFIG.steps * FLOW_SAMPLES


@pytest.mark.parametrize(
    ("method", "strength", "candidates", "kept_db"), [("flow", 0.925, 1, -math.inf), ("local", 1.0, 8, 25.0)]
)
def test_edit_config_has_defaults_of_its_method(method: str, strength: float, candidates: int, kept_db: float) -> None:
    config = edit_config(method, strength=None)  # type: ignore[arg-type]
    assert (config.strength, config.candidates, config.kept_db) == (strength, candidates, kept_db)
    given = edit_config(method, strength=0.5, kept_db=30)  # type: ignore[arg-type]
    assert (given.strength, given.kept_db) == (0.5, 30)
