"""Editing with continuous generators, with denoisers of known output."""

import dataclasses
from typing import Any

import pytest
import torch
from support import tiny_models
from torch import Tensor

from model.diffusion.conditioning import null_condition
from model.diffusion.flow_matching import Denoiser
from model.editing.config import EditConfig, noise_levels
from model.editing.continuous_canvas import restore, sdedit, with_edit_guidance
from model.editing.regions import keep_unchanged

GENERATOR = torch.Generator().manual_seed(0)
SOURCE = torch.rand(2, 3, 8, 8, generator=GENERATOR) * 2 - 1
NOISE = torch.randn(2, 3, 8, 8, generator=GENERATOR)
TOKENS = torch.randn(2, 4, tiny_models.WIDTH + 1, generator=GENERATOR)
PLAIN = EditConfig(guidance_scale=1, keep=False)


def restorer(target: Tensor) -> Denoiser:
    """Return a denoiser of six channels that knows the result: Euler steps end in it, whatever they start from."""

    def denoise(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        assert noisy.shape[1] == 6
        return (noisy[:, :3] - target) / sigma[:, None, None, None]

    return denoise


def mixing_denoiser(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
    """A denoiser of six channels or three whose output depends on all of its inputs."""
    offset = (condition * torch.arange(1, condition.shape[2] + 1)).mean((1, 2))
    joined = noisy.mean(1, keepdim=True) + (noisy[:, 3:].sum(1, keepdim=True) if noisy.shape[1] == 6 else 0)
    return (joined * (1 + sigma[:, None, None, None])).sin() * 2 + offset[:, None, None, None] + torch.zeros(1, 3, 1, 1)


def changed(config: EditConfig, **changes: Any) -> EditConfig:
    return dataclasses.replace(config, **changes)


def test_noise_levels_decrease_from_the_strength_to_zero() -> None:
    even = noise_levels(EditConfig(steps=4, strength=0.8, shift=1))
    assert even.tolist() == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])
    shifted = noise_levels(EditConfig(steps=2, strength=0.6, shift=2))
    assert shifted.tolist() == pytest.approx([0.6, 0.4, 0])


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_restore_reaches_the_target_of_the_denoiser(strength: float) -> None:
    target = -SOURCE
    result = restore(restorer(target), SOURCE, TOKENS, NOISE, changed(PLAIN, strength=strength, steps=3))
    torch.testing.assert_close(result, target, atol=1e-5, rtol=0)


def test_restore_strength_controls_the_distance_from_the_source() -> None:
    def distance(strength: float) -> float:
        config = changed(PLAIN, strength=strength)
        return float((restore(mixing_denoiser, SOURCE, TOKENS, NOISE, config) - SOURCE).abs().mean())

    assert distance(1e-4) < 1e-3
    assert distance(1e-4) < distance(0.1) < distance(0.4)


def test_restore_starts_on_the_path_with_the_source_as_reference() -> None:
    calls = []

    def recorder(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        calls.append((noisy, sigma))
        return torch.zeros_like(noisy[:, :3])

    restore(recorder, SOURCE, TOKENS, NOISE, changed(PLAIN, strength=0.6, steps=5))
    assert len(calls) == 5
    torch.testing.assert_close(calls[0][0][:, :3], 0.4 * SOURCE + 0.6 * NOISE)
    assert calls[0][1].tolist() == pytest.approx([0.6, 0.6])
    assert all(torch.equal(noisy[:, 3:], SOURCE) for noisy, _ in calls)


def test_sdedit_takes_the_same_path_without_reference() -> None:
    def base(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        assert noisy.shape[1] == 3
        return (noisy - SOURCE.abs()) / sigma[:, None, None, None]

    config = changed(PLAIN, method="sdedit", strength=0.5, steps=4)
    torch.testing.assert_close(sdedit(base, SOURCE, TOKENS, NOISE, config), SOURCE.abs(), atol=1e-5, rtol=0)
    near = sdedit(mixing_denoiser, SOURCE, TOKENS, NOISE, changed(config, strength=1e-4))
    torch.testing.assert_close(near, SOURCE, atol=2e-3, rtol=0)


@pytest.mark.parametrize("image_scale", [1.0, 1.7])
def test_with_edit_guidance_follows_text_and_source(image_scale: float) -> None:
    sigma, config = torch.tensor([0.3, 0.8]), EditConfig(guidance_scale=3, image_guidance_scale=image_scale)
    nothing = null_condition(TOKENS)
    shown, hidden = torch.cat([NOISE, SOURCE], 1), torch.cat([NOISE, SOURCE * 0], 1)
    both, source_alone = mixing_denoiser(shown, sigma, TOKENS), mixing_denoiser(shown, sigma, nothing)
    neither = mixing_denoiser(hidden, sigma, nothing)
    assert (source_alone - neither).abs().max() > 0.1
    expected = source_alone + 3 * (both - source_alone) + (image_scale - 1) * (source_alone - neither)
    torch.testing.assert_close(with_edit_guidance(mixing_denoiser, SOURCE, config)(NOISE, sigma, TOKENS), expected)


def test_with_edit_guidance_pushes_away_from_negative() -> None:
    sigma, negative, shown = torch.tensor([0.3, 0.8]), TOKENS.flip(0), torch.cat([NOISE, SOURCE], 1)
    away = mixing_denoiser(shown, sigma, negative)
    guided = with_edit_guidance(mixing_denoiser, SOURCE, EditConfig(guidance_scale=3), negative=negative)
    pushed = guided(NOISE, sigma, TOKENS)
    torch.testing.assert_close(pushed, away + 3 * (mixing_denoiser(shown, sigma, TOKENS) - away))


def test_keep_unchanged_restores_pixels_that_hardly_differ() -> None:
    source = torch.zeros(1, 3, 32, 32)
    edited = source + 0.05
    edited[..., 10:20, 10:20] = 0.9
    kept = keep_unchanged(edited, source)
    assert (kept[..., 10:20, 10:20] == 0.9).all()
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[4:26, 4:26] = False
    assert (kept[..., outside] == 0).all()
    assert torch.equal(keep_unchanged(-source - 1, source), -source - 1), "a change of the whole image stays"
    config = changed(PLAIN, steps=2)
    results = (restore(restorer(SOURCE + 0.04), SOURCE, TOKENS, NOISE, changed(config, keep=keep)) for keep in (1, 0))
    assert [float((result - SOURCE).abs().max()) for result in results] == pytest.approx([0, 0.04], abs=1e-5)
