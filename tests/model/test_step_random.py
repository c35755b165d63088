import pytest
import torch

from model.step_random import Draw, mixed_seed


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_the_parts_of_a_step_make_up_what_is_drawn_for_the_whole(parts: int) -> None:
    whole = Draw(1, 2)
    expected = [whole.normal(6, 3), whole.uniform(6), whole.normal(6, 2, 2)]
    draws = [Draw(1, 2, part=part, parts=parts) for part in range(parts)]
    rows = 6 // parts
    split = [[draw.normal(rows, 3), draw.uniform(rows), draw.normal(rows, 2, 2)] for draw in draws]
    for drawn, pieces in zip(expected, zip(*split, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), drawn)


def test_what_is_drawn_is_normal_and_uniform() -> None:
    draw = Draw(0, 0)
    normal, uniform = draw.normal(4000, 4), draw.uniform(4000, 4)
    assert (normal.dtype, uniform.dtype) == (torch.float32, torch.float32)
    assert normal.mean().item() == pytest.approx(0, abs=0.03)
    assert normal.std().item() == pytest.approx(1, abs=0.02)
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)


def test_every_seed_step_and_stream_has_randomness_of_its_own() -> None:
    keys = [(seed, step, stream) for seed in (0, 1) for step in (0, 1, 2, 1_000_000) for stream in (0, 3)]
    drawn = [Draw(seed, step, stream=stream).uniform(4).tolist() for seed, step, stream in keys]
    assert len({tuple(numbers) for numbers in drawn}) == len(keys)
    assert drawn == [Draw(seed, step, stream=stream).uniform(4).tolist() for seed, step, stream in keys]


def test_the_global_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = Draw(3, 4).normal(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(Draw(3, 4).normal(2), first)


def test_a_mixed_seed_is_one_that_a_generator_takes_and_order_matters() -> None:
    seeds = {mixed_seed(*parts) for parts in ((0, 1), (1, 0), (0, 0), (0, 1, 2))}
    assert len(seeds) == 4
    assert all(0 <= seed < 1 << 63 for seed in seeds)
