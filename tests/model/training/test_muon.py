import pytest
import torch
from torch import nn

from model.training.muon import Muon, orthogonalised

SHAPES = ((16, 16), (16, 16), (48, 16), (16, 48), (10, 33))


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int = 4) -> None:
    """Steps of gradients that are the same for everyone."""
    for step in range(steps):
        for parameter, gradient in zip(parameters, matrices(seed=10 + step), strict=True):
            parameter.grad = gradient.detach().clone()
        optimizer.step()


def test_it_steps_as_torchs_muon_does_within_bfloat16() -> None:
    ours, theirs = matrices(), matrices()
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    stepped(Muon(ours, **settings), ours)
    stepped(torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw"), theirs)
    for start, one, other in zip(matrices(), ours, theirs, strict=True):
        way = (other - start).norm()
        assert way > 0.1
        assert (one - other).norm() < 0.02 * way


def test_many_matrices_at_once_are_stepped_as_each_alone() -> None:
    together, alone = matrices(), matrices()
    stepped(Muon(together, lr=0.02), together)
    optimizers = [Muon([parameter], lr=0.02) for parameter in alone]
    for step in range(4):
        for optimizer, parameter, gradient in zip(optimizers, alone, matrices(seed=10 + step), strict=True):
            parameter.grad = gradient.detach().clone()
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(12, 12), (8, 40), (40, 8)])
def test_singular_values_are_driven_to_about_one(shape: tuple[int, int]) -> None:
    update = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    made = orthogonalised(update)
    assert made.shape == update.shape
    values = torch.linalg.svdvals(made)
    assert 0.5 < values.min() <= values.max() < 1.3
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    alignment = (made * (left @ right)).sum((1, 2)) / min(shape)
    assert (alignment > 0.7).all(), "the singular vectors stay"


def test_an_update_has_the_size_that_adamw_has() -> None:
    parameter = nn.Parameter(torch.zeros(64, 256))
    parameter.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    Muon([parameter], lr=0.5, weight_decay=0).step()
    assert parameter.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.5, rel=0.15)


def test_weights_decay_apart_from_the_gradient() -> None:
    kept, decayed = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    for parameter, decay in ((kept, 0.0), (decayed, 0.1)):
        parameter.grad = torch.eye(4)
        Muon([parameter], lr=0.5, weight_decay=decay).step()
    torch.testing.assert_close(kept - decayed, torch.full((4, 4), 0.05))


def test_a_parameter_without_a_gradient_stays() -> None:
    first, second = matrices()[:2]
    before = second.detach().clone()
    first.grad = torch.ones_like(first)
    optimizer = Muon([first, second], lr=0.1)
    optimizer.step()
    assert torch.equal(second, before)
    assert not torch.equal(first, matrices()[0])


def test_a_restored_optimizer_goes_on_with_its_momentum() -> None:
    whole, parted = matrices(), matrices()
    stepped(Muon(whole, lr=0.02), whole)
    first = Muon(parted, lr=0.02)
    stepped(first, parted, steps=4)
    second = Muon(parted, lr=0.02)
    second.load_state_dict(first.state_dict())
    stepped(second, parted, steps=1)
    reference = Muon(whole, lr=0.02)
    stepped(reference, whole, steps=1)
    assert not torch.equal(parted[0], whole[0]), "without the momentum it would go elsewhere"


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a parameter of shape \(3,\) is none"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="no closure"):
        Muon(matrices()).step(lambda: 0.0)
