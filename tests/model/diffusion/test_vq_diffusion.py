"""VQ-Diffusion: the closed forms are compared with explicit matrices."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.diffusion.vq_diffusion import (
    Transitions,
    log_one_hot,
    log_reverse,
    step_divergence,
)

K, STEPS = 4, 6
WIDE = Transitions(codes=K, timesteps=STEPS, stay_first=0.9, stay_last=5e-4, mask_first=0.05, mask_last=0.999)
"""A process that also replaces codes, often enough to notice."""
ALL_TIMES = [(s, t) for t in range(1, STEPS + 1) for s in range(t)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def time(t: int, batch: int = 1) -> Tensor:
    return torch.full((batch,), t)


def step_matrix(t: int) -> Tensor:
    """Return Q_t from the linear schedule: [i, j] is q(x_t = i|x_{t−1} = j), (K + 1, K + 1)."""

    def line(t: int, first: float, last: float) -> float:
        return first + (last - first) * (t - 1) / (STEPS - 1)

    def cumulative(t: int) -> tuple[float, float]:
        return (line(t, 0.9, 5e-4), 1 - line(t, 0.05, 0.999)) if t else (1.0, 1.0)

    stay, unmasked = (now / before for now, before in zip(cumulative(t), cumulative(t - 1), strict=True))
    matrix = torch.full((K + 1, K + 1), (unmasked - stay) / K, dtype=torch.float64)
    matrix += stay * torch.eye(K + 1, dtype=torch.float64)
    matrix[K] = 1 - unmasked
    matrix[:, K] = torch.eye(K + 1, dtype=torch.float64)[K]
    return matrix


def matrix(s: int, t: int) -> Tensor:
    """Return Q_t ⋯ Q_{s+1}."""
    product = torch.eye(K + 1, dtype=torch.float64)
    for step in range(s + 1, t + 1):
        product = step_matrix(step) @ product
    return product


def posterior(noisy: int, clean: int, s: int, t: int) -> Tensor:
    """Return eq. 5 by Bayes' rule, (K + 1,)."""
    joint = matrix(s, t)[noisy] * matrix(0, s)[:, clean]
    return joint / joint.sum()


def test_transitions_rates_equal_the_matrix_products() -> None:
    for s, t in ALL_TIMES:
        expected = matrix(s, t)
        torch.testing.assert_close(expected.sum(0), torch.ones(K + 1, dtype=torch.float64))
        stay, replace, mask = (float(rate) for rate in WIDE.between(time(s), time(t)))
        assert [stay + replace, replace, mask] == pytest.approx(expected[[0, 1, K], [0, 0, 0]].tolist(), abs=1e-12)
        if s == 0:
            assert [float(rate) for rate in WIDE.cumulative(time(t))] == pytest.approx([stay, replace, mask])


def test_transitions_default_ends_in_masks() -> None:
    stay, replace, mask = Transitions().cumulative(torch.tensor([0, 1, 100]))
    assert stay.tolist() == pytest.approx([1, 0.99999, 9e-6])
    assert mask.tolist() == pytest.approx([0, 9e-6, 0.99999])
    assert (1024 * replace).tolist() == pytest.approx([0, 1e-6, 1e-6], rel=1e-6)


def test_corrupt_frequencies_equal_the_rates() -> None:
    clean = torch.full((STEPS, 20_000), 2)
    noisy = WIDE.corrupt(clean, torch.arange(1, STEPS + 1), rand(STEPS, 20_000, 2))
    for t in range(1, STEPS + 1):
        shares = torch.bincount(noisy[t - 1], minlength=K + 1) / 20_000
        torch.testing.assert_close(shares.double(), matrix(0, t)[:, 2], atol=0.014, rtol=0)


@pytest.mark.parametrize(("s", "t"), ALL_TIMES)
def test_log_reverse_of_certain_codes_is_the_bayes_posterior(s: int, t: int) -> None:
    noisy, clean = torch.cartesian_prod(torch.arange(K + 1), torch.arange(K)).unbind(1)
    found = log_reverse(log_one_hot(clean[None], K), noisy[None], time(s), time(t), WIDE)[0].exp()
    for row, seen, true in zip(found, noisy.tolist(), clean.tolist(), strict=True):
        torch.testing.assert_close(row.double(), posterior(seen, true, s, t), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("s", "t"), ALL_TIMES)
def test_log_reverse_of_uncertain_codes_is_the_mixture_of_posteriors(s: int, t: int) -> None:
    noisy = torch.arange(K + 1)
    clean = rand(K + 1, K, seed=1).softmax(1)
    found = log_reverse(clean[None].log(), noisy[None], time(s), time(t), WIDE)[0].exp()
    for row, seen in enumerate(noisy.tolist()):
        expected = sum(clean[row, true] * posterior(seen, true, s, t) for true in range(K))
        torch.testing.assert_close(found[row].double(), expected, atol=1e-6, rtol=1e-5)


def test_log_reverse_supports_different_times_per_image() -> None:
    noisy, clean = torch.tensor([[4, 1], [4, 1]]), rand(2, 2, K).log_softmax(2)
    both = log_reverse(clean, noisy, torch.tensor([0, 3]), torch.tensor([2, 5]), WIDE)
    torch.testing.assert_close(both[:1], log_reverse(clean[:1], noisy[:1], time(0), time(2), WIDE))
    torch.testing.assert_close(both[1:], log_reverse(clean[1:], noisy[1:], time(3), time(5), WIDE))


@pytest.mark.parametrize("t", range(1, STEPS + 1))
def test_step_divergence_equals_the_explicit_kl(t: int) -> None:
    noisy, true = torch.tensor([[4, 1, 2, 0]]), torch.tensor([[0, 1, 3, 0]])
    clean = rand(1, 4, K, seed=2).log_softmax(2)
    expected = []
    for token in range(4):
        target = posterior(int(noisy[0, token]), int(true[0, token]), t - 1, t)
        predicted = sum(
            clean[0, token, code].exp() * posterior(int(noisy[0, token]), code, t - 1, t) for code in range(K)
        )
        expected.append(float((target * (target.clamp(min=1e-300) / predicted).log()).nansum()))
    found = step_divergence(clean, true, noisy, time(t), WIDE)
    assert found.tolist() == pytest.approx([sum(expected) / 4], rel=1e-4)


def test_step_divergence_at_t_1_is_the_negative_log_likelihood() -> None:
    noisy, true, clean = torch.tensor([[4, 1]]), torch.tensor([[0, 1]]), rand(1, 2, K).log_softmax(2)
    expected = -(clean[0, 0, 0] + clean[0, 1, 1]) / 2
    torch.testing.assert_close(step_divergence(clean, true, noisy, time(1), WIDE), expected[None])


def test_step_divergence_of_the_truth_is_zero_with_finite_gradients() -> None:
    true = torch.tensor([[0, 1, 3]])
    process = Transitions(codes=K, timesteps=100)
    for t in (1, 2, 50, 100):
        logits = (log_one_hot(true, K) * 3).requires_grad_()
        for noisy in ([[4, 4, 4]], [[0, 1, 3]], [[2, 4, 0]]):
            loss = step_divergence(logits.log_softmax(2), true, torch.tensor(noisy), time(t), process)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert loss.item() == pytest.approx(0, abs=1e-4)
            assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"codes": 1},
        {"timesteps": 1},
        {"mask_last": 0.0},
        {"mask_last": 1.0},
        {"stay_last": 0.9999999},
        {"mask_first": -0.1},
        {"mask_last": 0.9999999},
    ],
)
def test_transitions_invalid_schedule_raises(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Transitions(**wrong)
