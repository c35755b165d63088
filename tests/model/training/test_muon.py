import pytest
import torch
from torch import nn

from model.training.muon import Muon, orthogonalised

SHAPES = ((16, 16), (16, 16), (48, 16), (16, 48), (10, 33))


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def run_steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int = 4) -> None:
    """Run steps with gradients that are the same for every optimizer."""
    for step in range(steps):
        for parameter, gradient in zip(parameters, matrices(seed=10 + step), strict=True):
            parameter.grad = gradient.detach().clone()
        optimizer.step()


def test_muon_steps_equal_those_of_torch_within_bfloat16() -> None:
    ours, theirs = matrices(), matrices()
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    run_steps(Muon(ours, **settings), ours)
    run_steps(torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw"), theirs)
    for start, one, other in zip(matrices(), ours, theirs, strict=True):
        distance = (other - start).norm()
        assert distance > 0.1
        assert (one - other).norm() < 0.02 * distance


def test_muon_batched_matrices_are_updated_as_single_ones() -> None:
    together, alone = matrices(), matrices()
    run_steps(Muon(together, lr=0.02), together)
    optimizers = [Muon([parameter], lr=0.02) for parameter in alone]
    for step in range(4):
        for optimizer, parameter, gradient in zip(optimizers, alone, matrices(seed=10 + step), strict=True):
            parameter.grad = gradient.detach().clone()
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(12, 12), (8, 40), (40, 8)])
def test_orthogonalised_singular_values_are_about_one(shape: tuple[int, int]) -> None:
    update = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalised(update)
    assert result.shape == update.shape
    values = torch.linalg.svdvals(result)
    assert 0.5 < values.min() <= values.max() < 1.3
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    alignment = (result * (left @ right)).sum((1, 2)) / min(shape)
    assert (alignment > 0.7).all(), "the singular vectors are unchanged"


def test_muon_update_has_the_scale_of_adamw() -> None:
    parameter = nn.Parameter(torch.zeros(64, 256))
    parameter.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    Muon([parameter], lr=0.5, weight_decay=0).step()
    assert parameter.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.5, rel=0.15)


def test_muon_weight_decay_is_decoupled_from_the_gradient() -> None:
    constant, decayed = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    for parameter, decay in ((constant, 0.0), (decayed, 0.1)):
        parameter.grad = torch.eye(4)
        Muon([parameter], lr=0.5, weight_decay=decay).step()
    torch.testing.assert_close(constant - decayed, torch.full((4, 4), 0.05))


def test_muon_parameter_without_gradient_is_unchanged() -> None:
    first, second = matrices()[:2]
    before = second.detach().clone()
    first.grad = torch.ones_like(first)
    optimizer = Muon([first, second], lr=0.1)
    optimizer.step()
    assert torch.equal(second, before)
    assert not torch.equal(first, matrices()[0])


def test_muon_restored_state_continues_with_its_momentum() -> None:
    continuous, interrupted = matrices(), matrices()
    run_steps(Muon(continuous, lr=0.02), continuous)
    first = Muon(interrupted, lr=0.02)
    run_steps(first, interrupted, steps=4)
    second = Muon(interrupted, lr=0.02)
    second.load_state_dict(first.state_dict())
    run_steps(second, interrupted, steps=1)
    reference = Muon(continuous, lr=0.02)
    run_steps(reference, continuous, steps=1)
    assert not torch.equal(interrupted[0], continuous[0]), "the new optimizer has no momentum"


def test_muon_unsupported_parameter_or_closure_raises() -> None:
    with pytest.raises(ValueError, match=r"cannot optimize a parameter of this shape: \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="does not support a closure"):
        Muon(matrices()).step(lambda: 0.0)
