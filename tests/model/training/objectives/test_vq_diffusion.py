from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.configs import ConditioningConfig
from model.diffusion.conditioning import condition_tokens
from model.diffusion.vq_diffusion import Transitions, sample_codes, step_divergence
from model.step_random import StepRandom
from model.training.batch import Batch
from model.training.objectives.vq_diffusion import MaskAndReplace

K, STEPS = 4, 6
WIDE = Transitions(codes=K, timesteps=STEPS, stay_first=0.9, stay_last=5e-4, mask_first=0.05, mask_last=0.999)
"""A process that also replaces codes, often enough to notice."""


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


def batch(codes: Tensor) -> Batch:
    rows = nn.functional.normalize(rand(len(codes), 3, 4, seed=3) - 0.5, dim=2)
    return Batch(images=codes, query=rows[:, 0], neighbours=rows[:, 1:])


def objective(**changes: Any) -> MaskAndReplace:
    return MaskAndReplace(WIDE, ConditioningConfig(neighbours=2), **changes)


def test_mask_and_replace_loss_is_the_sum_over_all_times() -> None:
    network = Fixed(torch.tensor([0.3, -0.5, 1.0, 0.0]))
    codes = torch.arange(4).repeat(30_000, 1)
    bare, whole = (
        float(objective(auxiliary_weight=weight)(network, batch(codes), StepRandom(0, 0)).detach())
        for weight in (0.0, 0.5)
    )

    t = torch.arange(1, STEPS + 1).repeat(5_000)
    clean = torch.arange(4).repeat(len(t), 1)
    noisy = WIDE.corrupt(clean, t, rand(*clean.shape, 2, seed=9))
    log_clean = network.logits.detach().log_softmax(0).expand(*clean.shape, K)
    expected = STEPS * float(step_divergence(log_clean, clean, noisy, t, WIDE).mean())
    assert bare == pytest.approx(expected, rel=0.03)
    cross_entropy = -float(network.logits.detach().log_softmax(0).mean())
    assert whole - bare == pytest.approx(0.5 * STEPS * cross_entropy, rel=1e-3)


def test_mask_and_replace_network_inputs_are_noisy_codes_times_and_condition() -> None:
    network = Fixed(torch.zeros(K))
    codes = torch.arange(4).repeat(600, 1)
    objective()(network, batch(codes), StepRandom(0, 0))
    ((noisy, t, condition),) = network.inputs
    assert noisy.dtype == t.dtype == torch.int64
    assert sorted(set(t.tolist())) == list(range(1, STEPS + 1))
    assert condition.shape == (600, 3, 5)
    assert ((condition[..., :4] == 0).all(2).all(1)).float().mean().item() == pytest.approx(0.1, abs=0.05)
    masked = torch.stack([(noisy[t == time] == K).float().mean() for time in range(1, STEPS + 1)])
    torch.testing.assert_close(masked, torch.linspace(0.05, 0.999, STEPS), atol=0.1, rtol=0)


def test_mask_and_replace_loss_is_a_function_of_the_seed() -> None:
    network, codes = Fixed(torch.tensor([0.3, -0.5, 1.0, 0.0])), torch.arange(4).repeat(8, 1)
    first, same, other = (float(objective()(network, batch(codes), StepRandom(0, step)).detach()) for step in (1, 1, 2))
    assert first == same != other


LOSSES = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6, 3.2])


def warm() -> MaskAndReplace:
    """Return an objective that has seen each time often, with the losses above."""
    trained = objective()
    times = torch.arange(1, STEPS + 1).repeat(10)
    trained.update_history(times, LOSSES.repeat(10))
    return trained


def test_probabilities_are_uniform_until_each_time_was_seen_ten_times() -> None:
    trained = objective()
    times = torch.arange(1, STEPS + 1).repeat(10)
    trained.update_history(times[:-1], LOSSES.repeat(10)[:-1])
    torch.testing.assert_close(trained.probabilities(), torch.full((STEPS,), 1 / STEPS))
    trained.update_history(times[-1:], LOSSES[-1:])
    expected = 0.99 * LOSSES / LOSSES.sum() + 0.01 / STEPS
    torch.testing.assert_close(trained.probabilities(), expected)


def test_sample_times_keeps_the_mean_and_lowers_the_variance() -> None:
    trained = warm()
    t, probability = trained.sample_times(rand(50_000))
    shares = torch.bincount(t, minlength=STEPS + 1)[1:] / 50_000
    torch.testing.assert_close(shares, trained.probabilities(), atol=0.01, rtol=0)
    estimates = LOSSES[t - 1] / probability
    uniform = LOSSES[torch.randint(STEPS, (50_000,), generator=torch.Generator().manual_seed(0))] * STEPS
    assert estimates.mean().item() == pytest.approx(LOSSES.sum().item(), rel=0.01)
    assert estimates.std() < 0.1 * uniform.std()


def test_mask_and_replace_mean_loss_does_not_depend_on_the_history() -> None:
    network, codes = Fixed(torch.tensor([0.3, -0.5, 1.0, 0.0])), torch.arange(4).repeat(8_000, 2)
    cold, important = (
        float(trained(network, batch(codes), StepRandom(0, 0)).detach()) for trained in (objective(), warm())
    )
    assert important == pytest.approx(cold, rel=0.1)


def test_update_history_averages_and_keeps_unseen_times() -> None:
    trained = warm()
    trained.update_history(torch.tensor([1, 1]), torch.tensor([1.0, 3.0]))
    assert trained.history[0].item() == pytest.approx(0.9 * 0.01 + 0.1 * 5)
    torch.testing.assert_close(trained.history[1:], LOSSES[1:].square())
    assert trained.seen.tolist() == [12, 10, 10, 10, 10, 10]
    resumed = objective()
    resumed.load_state_dict(trained.state_dict())
    torch.testing.assert_close(resumed.probabilities(), trained.probabilities())


def test_collecting_losses_updates_the_history_once_per_finished_step() -> None:
    network, codes = Fixed(torch.tensor([0.3, -0.5, 1.0, 0.0])), torch.arange(4).repeat(8, 1)
    trained, other = warm(), warm()
    with trained.collecting_losses():
        trained(network, batch(codes), StepRandom(0, 0))
        torch.testing.assert_close(trained.history, other.history)
        trained(network, batch(codes), StepRandom(0, 1))
    assert trained.seen.sum() == other.seen.sum() + 16
    other(network, batch(codes), StepRandom(0, 0))
    with pytest.raises(torch.OutOfMemoryError), other.collecting_losses():
        other(network, batch(codes), StepRandom(0, 0))
        raise torch.OutOfMemoryError
    torch.testing.assert_close(other.history, LOSSES.square())


def test_mask_and_replace_learns_codes_from_the_condition() -> None:
    """Only the query distinguishes the two images; ignoring it costs more than ln 2 = 0.69."""
    layer = nn.Linear(5, 6 * K)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)

    def network(codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return layer(condition[:, 0]).view(len(codes), 6, K)

    module = nn.Module()
    module.add_module("layer", layer)
    module.forward = network
    images = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 3, 1, 0, 2, 2]]).repeat(32, 1)
    rows = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]).repeat(32, 1)
    data = Batch(images=images, query=rows, neighbours=rows[:, None])
    trained = MaskAndReplace(WIDE, ConditioningConfig(drop_all=0, drop_query=0, gap_probability=0))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for step in range(100):
        loss = trained(module, data, StepRandom(0, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.2
    assert sum(losses[-10:]) / 10 < 0.2
    condition = condition_tokens(rows[:2], rows[:2, None], dimension=4, batch=2)
    sampled = sample_codes(module, condition, rand(2, STEPS, 6), transitions=WIDE, truncation=0.9)
    assert torch.equal(sampled, images[:2])
