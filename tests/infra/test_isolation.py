"""Tests of functions in a child process and of inputs that kill it."""

import threading
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest
from support.children import made, unmakeable

from infra.isolation import TRIES, DiedError, Isolated


def count_children(folder: Path) -> int:
    return len(list(folder.glob("born-*")))


def test_isolated_with_a_fatal_input_raises_died_error_and_continues(tmp_path: Path) -> None:
    with Isolated(partial(made, tmp_path)) as isolated:
        assert isolated("one") == 3
        with pytest.raises(DiedError):
            isolated("poison")
        with pytest.raises(ValueError, match="empty"):
            isolated("")
        assert isolated("three") == 5
    assert count_children(tmp_path) == 1 + TRIES


def test_isolated_retries_an_input_after_one_death(tmp_path: Path) -> None:
    with Isolated(partial(made, tmp_path)) as isolated:
        assert isolated("unlucky") == 7
    assert count_children(tmp_path) == 2


def test_isolated_serialises_calls_of_threads(tmp_path: Path) -> None:
    lengths: dict[str, int] = {}
    with Isolated(partial(made, tmp_path)) as isolated:
        threads = [threading.Thread(target=lambda n=n: lengths.update({n: isolated(n)})) for n in ("a", "bb", "ccc")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert lengths == {"a": 1, "bb": 2, "ccc": 3}


def test_isolated_without_a_child_raises_broken_process_pool() -> None:
    with Isolated(unmakeable) as isolated:
        for _ in range(2):
            with pytest.raises(BrokenProcessPool):
                isolated()
