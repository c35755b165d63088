import logging
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.diffusion.solver import BATCH, draw_noise, draw_uniforms, in_batches, integrate, new_scheduler
from model.errors import ModelError

CPU = torch.device("cpu")


def short_of_memory(holds: int) -> tuple[Callable[[slice, Callable[[int], None]], Tensor], list[int]]:
    """A function that draws at most ``holds`` rows at a time, and the sizes that it was asked for."""
    asked: list[int] = []

    def draw(rows: slice, step: Callable[[int], None]) -> Tensor:
        numbers = torch.arange(100)[rows][: rows.stop - rows.start]
        asked.append(len(numbers))
        if len(numbers) > holds:
            raise torch.OutOfMemoryError("out of memory")
        step(1)
        return numbers

    return draw, asked


def test_out_of_memory_halves_the_batch_once_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    draw, asked = short_of_memory(BATCH["cpu"] // 2)
    with caplog.at_level(logging.WARNING):
        drawn = in_batches(draw, 100, 1, CPU, None)
    assert torch.equal(drawn, torch.arange(100))
    assert asked[:3] == [8, 4, 4]
    assert max(asked[1:]) == 4
    assert caplog.text.count("out of memory; drawing 4 pictures at a time") == 1


def test_out_of_memory_for_half_a_batch_is_told_with_the_mend() -> None:
    draw, asked = short_of_memory(1)
    with pytest.raises(ModelError, match="cpu is out of memory for 4 pictures at a time; free some"):
        in_batches(draw, 100, 1, CPU, None)
    assert asked == [8, 4]


def test_fewer_pictures_than_a_batch_are_halved_too() -> None:
    draw, asked = short_of_memory(3)
    assert torch.equal(in_batches(draw, BATCH["cpu"] - 2, 1, CPU, None), torch.arange(6))
    assert asked == [6, 3, 3]
    draw, asked = short_of_memory(0)
    with pytest.raises(ModelError, match="cpu is out of memory for 1 pictures at a time"):
        in_batches(draw, 1, 1, CPU, None)
    assert asked == [1]


def test_what_ran_out_of_memory_is_let_go_before_the_cache_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, _ = short_of_memory(4)
    held: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(sys.exc_info()[1] is not None))
    in_batches(draw, 8, 1, CPU, None)
    assert held == [False]


def test_steps_are_told_over_all_batches() -> None:
    told: list[tuple[int, int]] = []
    draw, _ = short_of_memory(100)
    in_batches(draw, 20, 1, CPU, lambda step, steps: told.append((step, steps)))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("steps", [1, 499, 500, 1000])
def test_many_steps_arrive_as_few_do(steps: int) -> None:
    picture, noise = (torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    numbers: list[int] = []

    def denoiser(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        return (noisy - picture) / sigma[:, None, None, None]

    drawn = integrate(denoiser, noise, torch.zeros(2, 1, 1), new_scheduler(), steps, numbers.append)
    torch.testing.assert_close(drawn, picture, atol=1e-5, rtol=0)
    assert numbers == list(range(1, steps + 1))


@pytest.mark.parametrize("draw", [draw_noise, draw_uniforms])
def test_randomness_is_drawn_picture_by_picture(draw: Callable[..., Tensor]) -> None:
    many, few = (draw(count, (3, 4), torch.Generator().manual_seed(5), shared=False) for count in (6, 2))
    assert torch.equal(many[:2], few)
    assert not torch.equal(many[0], many[1])
    shared = draw(6, (3, 4), torch.Generator().manual_seed(5), shared=True)
    assert torch.equal(shared, few[:1].expand(6, 3, 4))
