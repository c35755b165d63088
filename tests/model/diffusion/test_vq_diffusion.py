"""The closed forms are held against matrices that are built, multiplied and summed one number at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.diffusion.conditioning import ConditioningConfig, condition_tokens, null_condition
from model.diffusion.vq_diffusion import (
    Known,
    MaskAndReplace,
    Transitions,
    guide,
    log_one_hot,
    log_reverse,
    sample_codes,
    step_divergence,
    truncate,
)
from model.errors import ModelError
from model.step_random import Draw
from model.training.data import Batch

K, STEPS = 4, 6
WIDE = Transitions(codes=K, timesteps=STEPS, stay_first=0.9, stay_last=5e-4, mask_first=0.05, mask_last=0.999)
"""A process in which codes are also replaced, often enough to see it."""
ALL_TIMES = [(s, t) for t in range(1, STEPS + 1) for s in range(t)]
CONDITION = condition_tokens(torch.eye(4)[:2], torch.eye(4)[2:].repeat(2, 1, 1), dimension=4, batch=2)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def time(t: int, batch: int = 1) -> Tensor:
    return torch.full((batch,), t)


def step_matrix(t: int) -> Tensor:
    """Q_t from the straight lines of the docstring: [i, j] is q(x_t = i|x_{t−1} = j), (K + 1, K + 1)."""

    def line(t: int, first: float, last: float) -> float:
        return first + (last - first) * (t - 1) / (STEPS - 1)

    def kept(t: int) -> tuple[float, float]:
        return (line(t, 0.9, 5e-4), 1 - line(t, 0.05, 0.999)) if t else (1.0, 1.0)

    stay, unmasked = (now / before for now, before in zip(kept(t), kept(t - 1), strict=True))
    matrix = torch.full((K + 1, K + 1), (unmasked - stay) / K, dtype=torch.float64)
    matrix += stay * torch.eye(K + 1, dtype=torch.float64)
    matrix[K] = 1 - unmasked
    matrix[:, K] = torch.eye(K + 1, dtype=torch.float64)[K]
    return matrix


def matrix(s: int, t: int) -> Tensor:
    """Q_t ⋯ Q_{s+1}."""
    product = torch.eye(K + 1, dtype=torch.float64)
    for step in range(s + 1, t + 1):
        product = step_matrix(step) @ product
    return product


def posterior(noisy: int, clean: int, s: int, t: int) -> Tensor:
    """Eq. 5 by Bayes' rule, (K + 1,)."""
    joint = matrix(s, t)[noisy] * matrix(0, s)[:, clean]
    return joint / joint.sum()


def test_the_rates_are_those_of_the_multiplied_matrices() -> None:
    for s, t in ALL_TIMES:
        expected = matrix(s, t)
        torch.testing.assert_close(expected.sum(0), torch.ones(K + 1, dtype=torch.float64))
        stay, replace, mask = (float(rate) for rate in WIDE.between(time(s), time(t)))
        assert [stay + replace, replace, mask] == pytest.approx(expected[[0, 1, K], [0, 0, 0]].tolist(), abs=1e-12)
        if s == 0:
            assert [float(rate) for rate in WIDE.cumulative(time(t))] == pytest.approx([stay, replace, mask])


def test_the_default_process_ends_in_masks_and_replaces_a_millionth() -> None:
    stay, replace, mask = Transitions().cumulative(torch.tensor([0, 1, 100]))
    assert stay.tolist() == pytest.approx([1, 0.99999, 9e-6])
    assert mask.tolist() == pytest.approx([0, 9e-6, 0.99999])
    assert (1024 * replace).tolist() == pytest.approx([0, 1e-6, 1e-6], rel=1e-6)


def test_corrupted_codes_are_as_often_kept_replaced_and_masked_as_the_rates_say() -> None:
    clean = torch.full((STEPS, 20_000), 2)
    noisy = WIDE.corrupt(clean, torch.arange(1, STEPS + 1), rand(STEPS, 20_000, 2))
    for t in range(1, STEPS + 1):
        shares = torch.bincount(noisy[t - 1], minlength=K + 1) / 20_000
        torch.testing.assert_close(shares.double(), matrix(0, t)[:, 2], atol=0.014, rtol=0)


@pytest.mark.parametrize(("s", "t"), ALL_TIMES)
def test_one_certain_picture_has_the_posterior_of_bayes_in_a_step_and_in_a_stride(s: int, t: int) -> None:
    noisy, clean = torch.cartesian_prod(torch.arange(K + 1), torch.arange(K)).unbind(1)
    found = log_reverse(log_one_hot(clean[None], K), noisy[None], time(s), time(t), WIDE)[0].exp()
    for row, seen, true in zip(found, noisy.tolist(), clean.tolist(), strict=True):
        torch.testing.assert_close(row.double(), posterior(seen, true, s, t), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("s", "t"), ALL_TIMES)
def test_an_uncertain_network_has_the_sum_of_its_posteriors(s: int, t: int) -> None:
    noisy = torch.arange(K + 1)
    clean = rand(K + 1, K, seed=1).softmax(1)
    found = log_reverse(clean[None].log(), noisy[None], time(s), time(t), WIDE)[0].exp()
    for row, seen in enumerate(noisy.tolist()):
        expected = sum(clean[row, true] * posterior(seen, true, s, t) for true in range(K))
        torch.testing.assert_close(found[row].double(), expected, atol=1e-6, rtol=1e-5)


def test_times_differ_within_a_batch() -> None:
    noisy, clean = torch.tensor([[4, 1], [4, 1]]), rand(2, 2, K).log_softmax(2)
    both = log_reverse(clean, noisy, torch.tensor([0, 3]), torch.tensor([2, 5]), WIDE)
    torch.testing.assert_close(both[:1], log_reverse(clean[:1], noisy[:1], time(0), time(2), WIDE))
    torch.testing.assert_close(both[1:], log_reverse(clean[1:], noisy[1:], time(3), time(5), WIDE))


@pytest.mark.parametrize("t", range(1, STEPS + 1))
def test_the_divergence_is_that_of_the_two_distributions(t: int) -> None:
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


def test_the_first_step_s_divergence_is_the_likelihood_of_the_picture() -> None:
    noisy, true, clean = torch.tensor([[4, 1]]), torch.tensor([[0, 1]]), rand(1, 2, K).log_softmax(2)
    expected = -(clean[0, 0, 0] + clean[0, 1, 1]) / 2
    torch.testing.assert_close(step_divergence(clean, true, noisy, time(1), WIDE), expected[None])


def test_certainty_in_the_truth_costs_nothing_and_gradients_stay_finite() -> None:
    true = torch.tensor([[0, 1, 3]])
    process = Transitions(codes=K, timesteps=100)
    for t in (1, 2, 50, 100):
        logits = (log_one_hot(true, K) * 3).requires_grad_()
        for noisy in ([[4, 4, 4]], [[0, 1, 3]], [[2, 4, 0]]):
            loss = step_divergence(logits.log_softmax(2), true, torch.tensor(noisy), time(t), process)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert loss.item() == pytest.approx(0, abs=1e-4)
            assert gradient.isfinite().all()


class Fixed(nn.Module):
    """Answers with its parameter, whatever it is told, and keeps what it was told."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.told: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.told.append((codes, t, condition))
        return self.logits.expand(*codes.shape, -1)


def batch(codes: Tensor) -> Batch:
    rows = nn.functional.normalize(rand(len(codes), 3, 4, seed=3) - 0.5, dim=2)
    return Batch(images=codes, query=rows[:, 0], neighbours=rows[:, 1:])


def objective(**changes: Any) -> MaskAndReplace:
    return MaskAndReplace(WIDE, ConditioningConfig(neighbours=2), **changes)


def test_the_loss_is_the_sum_over_all_times_in_nats_per_token() -> None:
    network = Fixed(torch.tensor([0.3, -0.5, 1.0, 0.0]))
    codes = torch.arange(4).repeat(30_000, 1)
    bare, whole = (
        float(objective(auxiliary_weight=weight)(network, batch(codes), Draw(0, 0)).detach()) for weight in (0.0, 0.5)
    )

    t = torch.arange(1, STEPS + 1).repeat(5_000)
    clean = torch.arange(4).repeat(len(t), 1)
    noisy = WIDE.corrupt(clean, t, rand(*clean.shape, 2, seed=9))
    log_clean = network.logits.detach().log_softmax(0).expand(*clean.shape, K)
    expected = STEPS * float(step_divergence(log_clean, clean, noisy, t, WIDE).mean())
    assert bare == pytest.approx(expected, rel=0.03)
    cross_entropy = -float(network.logits.detach().log_softmax(0).mean())
    assert whole - bare == pytest.approx(0.5 * STEPS * cross_entropy, rel=1e-3)


def test_the_network_sees_noisy_codes_their_times_and_a_training_condition() -> None:
    network = Fixed(torch.zeros(K))
    codes = torch.arange(4).repeat(600, 1)
    objective()(network, batch(codes), Draw(0, 0))
    ((noisy, t, condition),) = network.told
    assert noisy.dtype == t.dtype == torch.int64
    assert sorted(set(t.tolist())) == list(range(1, STEPS + 1))
    assert condition.shape == (600, 3, 5)
    assert ((condition[..., :4] == 0).all(2).all(1)).float().mean().item() == pytest.approx(0.1, abs=0.05)
    masked = torch.stack([(noisy[t == time] == K).float().mean() for time in range(1, STEPS + 1)])
    torch.testing.assert_close(masked, matrix(0, 1)[K, 0] + torch.linspace(0, 0.949, STEPS), atol=0.1, rtol=0)


def test_a_draw_decides_the_loss() -> None:
    network, codes = Fixed(torch.tensor([0.3, -0.5, 1.0, 0.0])), torch.arange(4).repeat(8, 1)
    first, same, other = (float(objective()(network, batch(codes), Draw(0, step)).detach()) for step in (1, 1, 2))
    assert first == same != other


LOSSES = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6, 3.2])


def warm() -> MaskAndReplace:
    """An objective that has seen each time often, with the losses above."""
    taught = objective()
    times = torch.arange(1, STEPS + 1).repeat(10)
    taught.remember(times, LOSSES.repeat(10))
    return taught


def test_times_are_uniform_until_each_was_seen_ten_times() -> None:
    taught = objective()
    times = torch.arange(1, STEPS + 1).repeat(10)
    taught.remember(times[:-1], LOSSES.repeat(10)[:-1])
    torch.testing.assert_close(taught.probabilities(), torch.full((STEPS,), 1 / STEPS))
    taught.remember(times[-1:], LOSSES[-1:])
    expected = 0.99 * LOSSES / LOSSES.sum() + 0.01 / STEPS
    torch.testing.assert_close(taught.probabilities(), expected)


def test_importance_keeps_the_mean_and_lowers_the_variance() -> None:
    taught = warm()
    t, probability = taught.draw_times(rand(50_000))
    shares = torch.bincount(t, minlength=STEPS + 1)[1:] / 50_000
    torch.testing.assert_close(shares, taught.probabilities(), atol=0.01, rtol=0)
    estimates = LOSSES[t - 1] / probability
    uniform = LOSSES[torch.randint(STEPS, (50_000,), generator=torch.Generator().manual_seed(0))] * STEPS
    assert estimates.mean().item() == pytest.approx(LOSSES.sum().item(), rel=0.01)
    assert estimates.std() < 0.1 * uniform.std()


def test_the_loss_has_one_mean_whatever_the_history() -> None:
    network, codes = Fixed(torch.tensor([0.3, -0.5, 1.0, 0.0])), torch.arange(4).repeat(8_000, 2)
    cold, important = (float(taught(network, batch(codes), Draw(0, 0)).detach()) for taught in (objective(), warm()))
    assert important == pytest.approx(cold, rel=0.1)


def test_the_history_forgets_slowly_averages_within_a_step_and_leaves_unseen_times() -> None:
    taught = warm()
    taught.remember(torch.tensor([1, 1]), torch.tensor([1.0, 3.0]))
    assert taught.history[0].item() == pytest.approx(0.9 * 0.01 + 0.1 * 5)
    torch.testing.assert_close(taught.history[1:], LOSSES[1:].square())
    assert taught.seen.tolist() == [12, 10, 10, 10, 10, 10]
    resumed = objective()
    resumed.load_state_dict(taught.state_dict())
    torch.testing.assert_close(resumed.probabilities(), taught.probabilities())


def test_a_step_teaches_the_history_once_it_is_whole_and_nothing_else_does() -> None:
    network, codes = Fixed(torch.tensor([0.3, -0.5, 1.0, 0.0])), torch.arange(4).repeat(8, 1)
    taught, untaught = warm(), warm()
    with taught.one_step():
        taught(network, batch(codes), Draw(0, 0))
        torch.testing.assert_close(taught.history, untaught.history)
        taught(network, batch(codes), Draw(0, 1))
    assert taught.seen.sum() == untaught.seen.sum() + 16
    untaught(network, batch(codes), Draw(0, 0))
    with pytest.raises(torch.OutOfMemoryError), untaught.one_step():
        untaught(network, batch(codes), Draw(0, 0))
        raise torch.OutOfMemoryError
    torch.testing.assert_close(untaught.history, LOSSES.square())


def test_a_network_learns_codes_from_their_condition() -> None:
    """Two pictures, told apart by the query alone; the loss of never looking at it is above ln 2 = 0.69."""
    told = nn.Linear(5, 6 * K)
    nn.init.zeros_(told.weight)
    nn.init.zeros_(told.bias)

    def network(codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return told(condition[:, 0]).view(len(codes), 6, K)

    module = nn.Module()
    module.add_module("told", told)
    module.forward = network
    pictures = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 3, 1, 0, 2, 2]]).repeat(32, 1)
    rows = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]).repeat(32, 1)
    data = Batch(images=pictures, query=rows, neighbours=rows[:, None])
    taught = MaskAndReplace(WIDE, ConditioningConfig(drop_all=0, drop_query=0, gap_probability=0))
    optimizer = torch.optim.Adam(told.parameters(), lr=0.05)
    losses = []
    for step in range(100):
        loss = taught(module, data, Draw(0, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.2
    assert sum(losses[-10:]) / 10 < 0.2
    condition = condition_tokens(rows[:2], rows[:2, None], dimension=4, batch=2)
    drawn = sample_codes(module, condition, rand(2, STEPS, 6), transitions=WIDE, truncation=0.9)
    assert torch.equal(drawn, pictures[:2])


def test_truncation_keeps_the_fewest_likeliest_codes_that_reach_the_mass() -> None:
    likely = torch.tensor([[[0.1, 0.5, 0.15, 0.25]]]).log()
    for mass, kept in {0.3: [1], 0.6: [1, 3], 0.86: [1, 2, 3], 0.95: [0, 1, 2, 3], 1e-6: [1]}.items():
        truncated = truncate(likely, mass).exp()[0, 0]
        assert (truncated > 1e-6).nonzero().flatten().tolist() == kept
        torch.testing.assert_close(truncated[kept], likely.exp()[0, 0, kept] / likely.exp()[0, 0, kept].sum())
    assert torch.equal(truncate(likely, 1.0), likely)


def test_guidance_renormalises_and_goes_on_from_the_unconditional_through_the_conditional() -> None:
    conditional, unconditional = rand(1, 3, K).log_softmax(2), (3 * rand(1, 3, K, seed=1)).log_softmax(2)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional)
    pushed = guide(conditional, unconditional, 3.0)
    torch.testing.assert_close(pushed.exp().sum(2), torch.ones(1, 3))
    odds = pushed[..., 0] - pushed[..., 1]
    expected = 3 * (conditional[..., 0] - conditional[..., 1]) - 2 * (unconditional[..., 0] - unconditional[..., 1])
    torch.testing.assert_close(odds, expected)


def oracle(codes: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda noisy, t, condition: log_one_hot(codes, K)


@pytest.mark.parametrize("steps", [1, 2, 5, 6])
@pytest.mark.parametrize("process", [WIDE, Transitions(codes=K, timesteps=6)])
def test_who_knows_the_picture_draws_it_in_any_number_of_steps(steps: int, process: Transitions) -> None:
    codes = torch.randint(K, (2, 9), generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, Tensor]] = []
    drawn = sample_codes(
        oracle(codes),
        CONDITION,
        rand(2, steps, 9),
        transitions=process,
        callback=lambda step, now: seen.append((step, now)),
    )
    assert torch.equal(drawn, codes)
    assert [step for step, _ in seen] == list(range(steps))
    assert torch.equal(seen[-1][1], codes)


def test_the_network_is_told_evenly_spaced_times_and_starts_from_masks() -> None:
    network = Fixed(torch.zeros(K))
    sample_codes(network, CONDITION, rand(2, 4, 9), transitions=Transitions(codes=K, timesteps=10))
    assert [t.tolist() for _, t, _ in network.told] == [[10, 10], [8, 8], [5, 5], [2, 2]]
    assert (network.told[0][0] == K).all()
    assert all(torch.equal(condition, CONDITION) for _, _, condition in network.told)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_strides_keep_the_distribution_of_a_perfect_network(steps: int) -> None:
    """Of independent codes the perfect p_θ(x_0|x_t) is known: the prior times q(x_t|x_0)."""
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def perfect(codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return (matrix(0, int(t[0]))[codes, :K] * prior).log()

    drawn = sample_codes(perfect, CONDITION, rand(2, steps, 10_000), transitions=WIDE, truncation=1.0)
    shares = torch.bincount(drawn.flatten(), minlength=K) / 20_000
    torch.testing.assert_close(shares.double(), prior, atol=0.014, rtol=0)


def told_codes(codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """Logits that depend on everything and on the own row alone."""
    told = (condition * torch.arange(1, condition.shape[2] + 1)).sum((1, 2))[:, None, None]
    return torch.sin(told + t[:, None, None] * (codes[..., None] + 1) * torch.arange(1, K + 1)) * 2


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_picture_does_not_depend_on_its_batch(scale: float) -> None:
    def draw(rows: slice) -> Tensor:
        return sample_codes(told_codes, CONDITION[rows], rand(2, 4, 50)[rows], transitions=WIDE, guidance_scale=scale)

    together = draw(slice(0, 2))
    assert not torch.equal(together[0], together[1])
    for row in range(2):
        assert torch.equal(draw(slice(row, row + 1)), together[row : row + 1])


def test_guidance_hides_the_condition_or_takes_a_negative_one() -> None:
    network = Fixed(torch.zeros(K))
    negative = CONDITION.flip(0)
    for told in (None, negative):
        sample_codes(network, CONDITION, rand(2, 1, 9), transitions=WIDE, guidance_scale=2, negative=told)
    (codes, t, hidden), (_, _, away) = network.told
    assert codes.shape == (4, 9)
    assert t.tolist() == [STEPS] * 4
    assert torch.equal(hidden, torch.cat([CONDITION, null_condition(CONDITION)]))
    assert torch.equal(away, torch.cat([CONDITION, negative]))


def test_guidance_changes_what_is_drawn_and_truncation_leaves_out_the_unlikely() -> None:
    logits = torch.tensor([0.0, 0.0, 0.0, 3.0])

    def network(codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        known = (condition[:, :1, :4] != 0).any(2, keepdim=True)
        return torch.where(known, logits, torch.zeros(K)).expand(*codes.shape, K)

    def likeliest(scale: float, truncation: float) -> float:
        options = {"transitions": WIDE, "guidance_scale": scale, "truncation": truncation}
        return float((sample_codes(network, CONDITION, rand(2, 4, 500), **options) == 3).float().mean())

    assert likeliest(0.0, 1.0) == pytest.approx(0.25, abs=0.06)
    assert likeliest(1.0, 1.0) == pytest.approx(0.87, abs=0.05)
    assert likeliest(3.0, 1.0) > 0.99
    assert likeliest(1.0, 0.86) == 1


@pytest.mark.parametrize("steps", [0, 7])
def test_more_steps_than_the_process_has_are_refused(steps: int) -> None:
    with pytest.raises(ModelError, match=f"{steps} steps"):
        sample_codes(Fixed(torch.zeros(K)), CONDITION, rand(2, steps, 9), transitions=WIDE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"codes": 1},
        {"timesteps": 1},
        {"mask_last": 0.9},
        {"mask_last": 1.0},
        {"stay_last": 0.9999999},
        {"mask_first": -0.1},
        {"mask_last": 0.9999999},
    ],
)
def test_what_is_no_process_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Transitions(**wrong)


def test_known_codes_stay_are_shown_at_the_noise_of_the_step_and_only_the_free_are_drawn() -> None:
    source, other = torch.zeros(2, 9, dtype=torch.int64), torch.full((2, 9), 3)
    free = torch.zeros(2, 9, dtype=torch.bool)
    free[:, 4:6] = True
    process, hiding = Transitions(codes=K, timesteps=6), rand(2, 9, 2, seed=3)
    seen: list[Tensor] = []

    def network(noisy: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        around = process.corrupt(source, t, hiding)
        assert torch.equal(noisy[~free], around[~free])
        seen.append(noisy)
        return log_one_hot(other, K)

    known = Known(codes=source, free=free, first=6, uniforms=hiding)
    drawn = sample_codes(network, CONDITION, rand(2, 3, 9), transitions=process, known=known)
    assert torch.equal(drawn, torch.where(free, other, source))
    assert len(seen) == 3
    weak = known._replace(first=1, free=torch.ones_like(free))
    with pytest.raises(ModelError, match="2 steps asked of a process of 1"):
        sample_codes(network, CONDITION, rand(2, 2, 9), transitions=process, known=weak)


def test_sampling_from_a_picture_starts_at_its_noise() -> None:
    source = torch.randint(K, (2, 9), generator=torch.Generator().manual_seed(0))
    process, hiding = Transitions(codes=K, timesteps=6), rand(2, 9, 2, seed=3)
    starts: list[Tensor] = []

    def network(noisy: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        starts.append(noisy)
        assert t.tolist() == [3, 3]
        return log_one_hot(source, K)

    known = Known(codes=source, free=torch.ones(2, 9, dtype=torch.bool), first=3, uniforms=hiding)
    sample_codes(network, CONDITION, rand(2, 1, 9), transitions=process, known=known)
    assert torch.equal(starts[0], process.corrupt(source, torch.tensor([3, 3]), hiding))
