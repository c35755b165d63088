"""VQ-Diffusion: sampling of codes with networks of known output."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.diffusion.conditioning import condition_tokens, null_condition
from model.diffusion.unmasking import unmask_surest
from model.diffusion.vq_diffusion import (
    KnownCodes,
    Transitions,
    apply_guidance,
    log_likelihood,
    log_one_hot,
    sample_codes,
    truncate_probabilities,
)
from model.errors import ModelError

K, STEPS = 4, 6
WIDE = Transitions(codes=K, timesteps=STEPS, stay_first=0.9, stay_last=5e-4, mask_first=0.05, mask_last=0.999)
"""A process that also replaces codes, often enough to notice."""
REPLACING = Transitions(codes=K, timesteps=STEPS, stay_first=0.9, stay_last=5e-4, mask_first=0.05, mask_last=0.9)
"""A process that ends in a tenth of random codes."""
CONDITION = condition_tokens(torch.eye(4)[:2], torch.eye(4)[2:].repeat(2, 1, 1), dimension=4, batch=2)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Fixed(nn.Module):
    """A network that returns its parameter, and records its inputs."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.inputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.inputs.append((codes, t, condition))
        return self.logits.expand(*codes.shape, -1)


def test_truncate_probabilities_keeps_the_fewest_codes_that_reach_the_mass() -> None:
    likely = torch.tensor([[[0.1, 0.5, 0.15, 0.25]]]).log()
    for mass, kept in {0.3: [1], 0.6: [1, 3], 0.86: [1, 2, 3], 0.95: [0, 1, 2, 3], 1e-6: [1]}.items():
        truncated = truncate_probabilities(likely, mass).exp()[0, 0]
        assert (truncated > 1e-6).nonzero().flatten().tolist() == kept
        torch.testing.assert_close(truncated[kept], likely.exp()[0, 0, kept] / likely.exp()[0, 0, kept].sum())
    assert torch.equal(truncate_probabilities(likely, 1.0), likely)


def test_apply_guidance_extrapolates_and_renormalises() -> None:
    conditional, unconditional = rand(1, 3, K).log_softmax(2), (3 * rand(1, 3, K, seed=1)).log_softmax(2)
    torch.testing.assert_close(apply_guidance(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(apply_guidance(conditional, unconditional, 0.0), unconditional)
    pushed = apply_guidance(conditional, unconditional, 3.0)
    torch.testing.assert_close(pushed.exp().sum(2), torch.ones(1, 3))
    odds = pushed[..., 0] - pushed[..., 1]
    expected = 3 * (conditional[..., 0] - conditional[..., 1]) - 2 * (unconditional[..., 0] - unconditional[..., 1])
    torch.testing.assert_close(odds, expected)


def oracle(codes: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda noisy, t, condition: log_one_hot(codes, K)


@pytest.mark.parametrize("steps", [1, 2, 5, 6])
@pytest.mark.parametrize("process", [WIDE, Transitions(codes=K, timesteps=6)])
def test_sample_codes_perfect_network_gives_the_codes_in_any_number_of_steps(steps: int, process: Transitions) -> None:
    codes = torch.randint(K, (2, 9), generator=torch.Generator().manual_seed(0))
    steps_done: list[int] = []
    sampled = sample_codes(
        oracle(codes),
        CONDITION,
        rand(2, steps, 9),
        transitions=process,
        on_step=steps_done.append,
    )
    assert torch.equal(sampled, codes)
    assert steps_done == list(range(1, steps + 1))


def test_sample_codes_times_are_evenly_spaced_and_start_from_masks() -> None:
    network = Fixed(torch.zeros(K))
    sample_codes(network, CONDITION, rand(2, 4, 9), transitions=Transitions(codes=K, timesteps=10))
    assert [t.tolist() for _, t, _ in network.inputs] == [[10, 10], [8, 8], [5, 5], [2, 2]]
    assert (network.inputs[0][0] == K).all()
    assert all(torch.equal(condition, CONDITION) for _, _, condition in network.inputs)


def test_transitions_prior_has_the_frequencies_of_the_last_time() -> None:
    codes = REPLACING.prior(rand(1, 20_000, 2))
    shares = torch.bincount(codes.flatten(), minlength=K + 1) / 20_000
    _, replace, mask = REPLACING.cumulative(torch.tensor([STEPS]))
    assert shares.tolist() == pytest.approx([replace.item()] * K + [mask.item()], abs=0.01)


def test_sample_codes_of_a_process_that_replaces_codes_needs_a_prior() -> None:
    network = Fixed(torch.zeros(K))
    with pytest.raises(ModelError, match=r"mask_last is below 0.99: 0.9; pass the uniform numbers"):
        sample_codes(network, CONDITION, rand(2, 4, 9), transitions=REPLACING)
    sample_codes(network, CONDITION, rand(2, 4, 9), transitions=REPLACING, prior=rand(2, 9, 2))
    assert torch.equal(network.inputs[0][0], REPLACING.prior(rand(2, 9, 2)))


@pytest.mark.parametrize("process", [WIDE, REPLACING])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_sample_codes_strides_keep_the_distribution(steps: int, process: Transitions) -> None:
    """For independent codes the perfect p_θ(x_0|x_t) is known: the prior times q(x_t|x_0)."""
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def perfect(codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        likelihood = log_likelihood(codes, process.cumulative(t), K)[..., :K].exp()
        return (likelihood * prior).log()

    start = rand(2, 10_000, 2, seed=1)
    sampled = sample_codes(perfect, CONDITION, rand(2, steps, 10_000), transitions=process, truncation=1.0, prior=start)
    shares = torch.bincount(sampled.flatten(), minlength=K) / 20_000
    torch.testing.assert_close(shares.double(), prior, atol=0.014, rtol=0)


def test_sample_codes_surest_first_unmasks_by_confidence_along_a_cosine() -> None:
    tokens, steps = 40, 8
    logits = torch.zeros(tokens, K)
    logits[:, 0] = torch.linspace(50, 90, tokens)  # all choose code 0; the last tokens are the surest
    network = Fixed(logits)
    codes = sample_codes(
        network, CONDITION, rand(2, steps, tokens), transitions=Transitions(codes=K), order="surest", truncation=1.0
    )
    assert (codes == 0).all()
    masked = [(inputs == K).sum(1).tolist() for inputs, _, _ in network.inputs]
    assert masked == [[int(tokens * math.cos(math.pi / 2 * step / steps))] * 2 for step in range(steps)]
    assert [t[0].item() for _, t, _ in network.inputs] == [100, 98, 92, 83, 71, 56, 38, 20], "the masked share"


def test_unmask_surest_keeps_unmasked_codes_and_orders_by_probability() -> None:
    log_clean = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]]).log()
    chosen, codes = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[2, 2, 2, 1]])
    half = torch.full((1, 4), 0.5 / 4096)  # equal noise for every token
    first = unmask_surest(log_clean, chosen, codes, half, step=1, steps=3, mask=2)
    assert first.tolist() == [[0, 2, 2, 1]]
    assert unmask_surest(log_clean, chosen, first, half, step=2, steps=3, mask=2).tolist() == [[0, 1, 0, 1]]


def test_sample_codes_surest_first_follows_the_probabilities_and_the_randomness() -> None:
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4])
    uniforms = rand(2, 4, 10_000)
    options: dict[str, Any] = {"transitions": Transitions(codes=K), "order": "surest", "truncation": 1.0}
    sampled = sample_codes(Fixed(prior.log()), CONDITION, uniforms, **options)
    assert torch.equal(sampled, sample_codes(Fixed(prior.log()), CONDITION, uniforms, **options))
    shares = torch.bincount(sampled.flatten(), minlength=K) / 20_000
    assert shares.argsort().tolist() == [0, 1, 2, 3]
    with pytest.raises(ModelError, match="the order 'surest' starts from"):
        sample_codes(Fixed(prior.log()), CONDITION, uniforms, prior=rand(2, 10_000, 2), **options)


def mixing_network(codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """Return logits that depend on all inputs, but only on those of the same row."""
    offset = (condition * torch.arange(1, condition.shape[2] + 1)).sum((1, 2))[:, None, None]
    return torch.sin(offset + t[:, None, None] * (codes[..., None] + 1) * torch.arange(1, K + 1)) * 2


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sample_codes_image_does_not_depend_on_its_batch(scale: float) -> None:
    def sample(rows: slice) -> Tensor:
        return sample_codes(
            mixing_network, CONDITION[rows], rand(2, 4, 50)[rows], transitions=WIDE, guidance_scale=scale
        )

    together = sample(slice(0, 2))
    assert not torch.equal(together[0], together[1])
    for row in range(2):
        assert torch.equal(sample(slice(row, row + 1)), together[row : row + 1])


def test_sample_codes_guidance_uses_null_or_negative_condition() -> None:
    network = Fixed(torch.zeros(K))
    negative = CONDITION.flip(0)
    for away in (None, negative):
        sample_codes(network, CONDITION, rand(2, 1, 9), transitions=WIDE, guidance_scale=2, negative=away)
    (codes, t, hidden), (_, _, pushed) = network.inputs
    assert codes.shape == (4, 9)
    assert t.tolist() == [STEPS] * 4
    assert torch.equal(hidden, torch.cat([CONDITION, null_condition(CONDITION)]))
    assert torch.equal(pushed, torch.cat([CONDITION, negative]))


def test_sample_codes_guidance_and_truncation_change_the_samples() -> None:
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
def test_sample_codes_steps_out_of_range_raises(steps: int) -> None:
    with pytest.raises(ModelError, match=f"the number of steps is out of range: {steps}; give 1 to 6"):
        sample_codes(Fixed(torch.zeros(K)), CONDITION, rand(2, steps, 9), transitions=WIDE)


def test_sample_codes_known_codes_stay_and_free_codes_are_sampled() -> None:
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

    known = KnownCodes(codes=source, free=free, first=6, uniforms=hiding)
    sampled = sample_codes(network, CONDITION, rand(2, 3, 9), transitions=process, known=known)
    assert torch.equal(sampled, torch.where(free, other, source))
    assert len(seen) == 3
    weak = known._replace(first=1, free=torch.ones_like(free))
    with pytest.raises(ModelError, match="the number of steps is out of range: 2; give 1 to 1"):
        sample_codes(network, CONDITION, rand(2, 2, 9), transitions=process, known=weak)


def test_sample_codes_from_known_codes_starts_at_their_noise() -> None:
    source = torch.randint(K, (2, 9), generator=torch.Generator().manual_seed(0))
    process, hiding = Transitions(codes=K, timesteps=6), rand(2, 9, 2, seed=3)
    starts: list[Tensor] = []

    def network(noisy: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        starts.append(noisy)
        assert t.tolist() == [3, 3]
        return log_one_hot(source, K)

    known = KnownCodes(codes=source, free=torch.ones(2, 9, dtype=torch.bool), first=3, uniforms=hiding)
    sample_codes(network, CONDITION, rand(2, 1, 9), transitions=process, known=known)
    assert torch.equal(starts[0], process.corrupt(source, torch.tensor([3, 3]), hiding))
