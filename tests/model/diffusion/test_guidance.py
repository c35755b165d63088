import pytest
import torch
from torch import Tensor

from model.diffusion.conditioning import condition_tokens, null_condition
from model.diffusion.guidance import with_guidance

QUERY, NEIGHBOURS = torch.eye(4)[:2], torch.eye(4)[2:].repeat(2, 1, 1)
TOKENS = condition_tokens(QUERY, NEIGHBOURS, dimension=4, batch=2)
NOISY = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.3, 0.8])


class Recorder:
    """A denoiser whose output depends on all of its inputs, and that records them."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        self.calls.append((noisy, sigma, condition))
        offset = (condition * torch.arange(1, condition.shape[2] + 1)).mean((1, 2))
        return noisy * sigma[:, None, None, None] + offset[:, None, None, None]


@pytest.mark.parametrize("negative", [None, -TOKENS])
def test_with_guidance_scale_1_is_one_conditional_call(negative: Tensor | None) -> None:
    denoiser = Recorder()
    output = with_guidance(denoiser, 1, negative=negative)(NOISY, SIGMA, TOKENS)
    assert torch.equal(output, Recorder()(NOISY, SIGMA, TOKENS))
    ((noisy, sigma, condition),) = denoiser.calls
    assert torch.equal(noisy, NOISY)
    assert torch.equal(sigma, SIGMA)
    assert torch.equal(condition, TOKENS)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_with_guidance_extrapolates_from_unconditional_to_conditional(scale: float) -> None:
    conditional = Recorder()(NOISY, SIGMA, TOKENS)
    unconditional = Recorder()(NOISY, SIGMA, null_condition(TOKENS))
    assert (conditional - unconditional).abs().min() > 0.01
    output = with_guidance(Recorder(), scale)(NOISY, SIGMA, TOKENS)
    torch.testing.assert_close(output, unconditional + scale * (conditional - unconditional))


@pytest.mark.parametrize("negative", [None, TOKENS.flip(0)])
def test_with_guidance_by_a_weaker_network_shows_it_the_null_condition_or_the_negative(negative: Tensor | None) -> None:
    strong, weak = Recorder(), Recorder()
    guided = with_guidance(strong, 3, negative=negative, weaker=lambda *inputs: 0.5 * weak(*inputs))
    output = guided(NOISY, SIGMA, TOKENS)
    ((_, _, shown),), ((_, _, weakly_shown),) = strong.calls, weak.calls
    assert torch.equal(shown, TOKENS)
    assert torch.equal(weakly_shown, null_condition(TOKENS) if negative is None else negative)
    against = 0.5 * Recorder()(NOISY, SIGMA, weakly_shown)
    torch.testing.assert_close(output, against + 3 * (Recorder()(NOISY, SIGMA, TOKENS) - against))


def test_with_guidance_by_a_weaker_network_outside_of_the_interval_calls_only_the_network() -> None:
    weak = Recorder()
    output = with_guidance(Recorder(), 3, interval=(0.5, 1), weaker=weak)(NOISY, SIGMA, TOKENS)
    assert not weak.calls
    assert torch.equal(output, Recorder()(NOISY, SIGMA, TOKENS))


def test_with_guidance_other_scale_is_one_call_of_twice_the_batch() -> None:
    denoiser = Recorder()
    with_guidance(denoiser, 2)(NOISY, SIGMA, TOKENS)
    ((noisy, sigma, condition),) = denoiser.calls
    assert torch.equal(noisy, torch.cat([NOISY, NOISY]))
    assert sigma.tolist() == pytest.approx([0.3, 0.8, 0.3, 0.8])
    assert torch.equal(condition[:2], TOKENS)
    assert torch.equal(condition[2:], null_condition(TOKENS))
