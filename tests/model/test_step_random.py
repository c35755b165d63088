import pytest
import torch

from model.step_random import StepRandom, mix_seeds


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_step_random_parts_concatenate_to_the_whole(parts: int) -> None:
    whole = StepRandom(1, 2)
    expected = [whole.normal(6, 3), whole.uniform(6), whole.normal(6, 2, 2)]
    sources = [StepRandom(1, 2, part=part, parts=parts) for part in range(parts)]
    rows = 6 // parts
    split = [[part.normal(rows, 3), part.uniform(rows), part.normal(rows, 2, 2)] for part in sources]
    for numbers, pieces in zip(expected, zip(*split, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), numbers)


def test_step_random_distributions_are_normal_and_uniform() -> None:
    rng = StepRandom(0, 0)
    normal, uniform = rng.normal(4000, 4), rng.uniform(4000, 4)
    assert (normal.dtype, uniform.dtype) == (torch.float32, torch.float32)
    assert normal.mean().item() == pytest.approx(0, abs=0.03)
    assert normal.std().item() == pytest.approx(1, abs=0.02)
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)


def test_step_random_differs_by_seed_step_and_stream() -> None:
    keys = [(seed, step, stream) for seed in (0, 1) for step in (0, 1, 2, 1_000_000) for stream in (0, 3)]
    numbers = [StepRandom(seed, step, stream=stream).uniform(4).tolist() for seed, step, stream in keys]
    assert len({tuple(row) for row in numbers}) == len(keys)
    assert numbers == [StepRandom(seed, step, stream=stream).uniform(4).tolist() for seed, step, stream in keys]


def test_step_random_leaves_the_global_state_unchanged() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = StepRandom(3, 4).normal(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(StepRandom(3, 4).normal(2), first)


def test_mix_seeds_depends_on_order_and_is_63_bit() -> None:
    seeds = {mix_seeds(*parts) for parts in ((0, 1), (1, 0), (0, 0), (0, 1, 2))}
    assert len(seeds) == 4
    assert all(0 <= seed < 1 << 63 for seed in seeds)
