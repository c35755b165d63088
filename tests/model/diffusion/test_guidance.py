import pytest
import torch
from torch import Tensor

from model.diffusion.conditioning import condition_tokens, null_condition
from model.diffusion.guidance import guided

QUERY, NEIGHBOURS = torch.eye(4)[:2], torch.eye(4)[2:].repeat(2, 1, 1)
TOKENS = condition_tokens(QUERY, NEIGHBOURS, dimension=4, batch=2)
NOISY = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.3, 0.8])


class Recorder:
    """A denoiser whose answer depends on everything it is given, and that keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        self.calls.append((noisy, sigma, condition))
        told = (condition * torch.arange(1, condition.shape[2] + 1)).mean((1, 2))
        return noisy * sigma[:, None, None, None] + told[:, None, None, None]


@pytest.mark.parametrize("negative", [None, -TOKENS])
def test_scale_1_is_the_conditional_model_at_one_call_of_one_batch(negative: Tensor | None) -> None:
    denoiser = Recorder()
    output = guided(denoiser, 1, negative=negative)(NOISY, SIGMA, TOKENS)
    assert torch.equal(output, Recorder()(NOISY, SIGMA, TOKENS))
    ((noisy, sigma, condition),) = denoiser.calls
    assert torch.equal(noisy, NOISY)
    assert torch.equal(sigma, SIGMA)
    assert torch.equal(condition, TOKENS)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_guidance_goes_on_from_the_unconditional_through_the_conditional(scale: float) -> None:
    conditional = Recorder()(NOISY, SIGMA, TOKENS)
    unconditional = Recorder()(NOISY, SIGMA, null_condition(TOKENS))
    assert (conditional - unconditional).abs().min() > 0.01
    output = guided(Recorder(), scale)(NOISY, SIGMA, TOKENS)
    torch.testing.assert_close(output, unconditional + scale * (conditional - unconditional))


def test_any_other_scale_costs_one_call_of_twice_the_batch() -> None:
    denoiser = Recorder()
    guided(denoiser, 2)(NOISY, SIGMA, TOKENS)
    ((noisy, sigma, condition),) = denoiser.calls
    assert torch.equal(noisy, torch.cat([NOISY, NOISY]))
    assert sigma.tolist() == pytest.approx([0.3, 0.8, 0.3, 0.8])
    assert torch.equal(condition[:2], TOKENS)
    assert torch.equal(condition[2:], null_condition(TOKENS))
