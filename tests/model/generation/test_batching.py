import logging
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.errors import ModelError
from model.generation.batching import BATCH_SIZE, run_batched

CPU = torch.device("cpu")


def short_of_memory(holds: int) -> tuple[Callable[[slice, Callable[[int], None]], Tensor], list[int]]:
    """Return a function that fits at most ``holds`` rows into memory, and the list of sizes it was called with."""
    sizes: list[int] = []

    def function(rows: slice, on_step: Callable[[int], None]) -> Tensor:
        numbers = torch.arange(100)[rows][: rows.stop - rows.start]
        sizes.append(len(numbers))
        if len(numbers) > holds:
            raise torch.OutOfMemoryError("out of memory")
        on_step(1)
        return numbers

    return function, sizes


def test_run_batched_out_of_memory_halves_the_batch_once_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    function, sizes = short_of_memory(BATCH_SIZE["cpu"] // 2)
    with caplog.at_level(logging.WARNING):
        result = run_batched(function, 100, 1, CPU, None)
    assert torch.equal(result, torch.arange(100))
    assert sizes[:3] == [8, 4, 4]
    assert max(sizes[1:]) == 4
    assert caplog.text.count("out of memory; continuing with batch size 4") == 1


def test_run_batched_out_of_memory_at_half_a_batch_raises() -> None:
    function, sizes = short_of_memory(1)
    with pytest.raises(ModelError, match="cpu is out of memory at batch size 4; free some"):
        run_batched(function, 100, 1, CPU, None)
    assert sizes == [8, 4]


def test_run_batched_out_of_memory_below_one_batch_halves_the_count() -> None:
    function, sizes = short_of_memory(3)
    assert torch.equal(run_batched(function, BATCH_SIZE["cpu"] - 2, 1, CPU, None), torch.arange(6))
    assert sizes == [6, 3, 3]
    function, sizes = short_of_memory(0)
    with pytest.raises(ModelError, match="cpu is out of memory at batch size 1"):
        run_batched(function, 1, 1, CPU, None)
    assert sizes == [1]


def test_run_batched_out_of_memory_releases_the_error_before_emptying_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function, _ = short_of_memory(4)
    held: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(sys.exc_info()[1] is not None))
    run_batched(function, 8, 1, CPU, None)
    assert held == [False]


def test_run_batched_progress_counts_over_all_batches() -> None:
    calls: list[tuple[int, int]] = []
    function, _ = short_of_memory(100)
    run_batched(function, 20, 1, CPU, lambda step, steps: calls.append((step, steps)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
