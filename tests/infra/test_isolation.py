"""Functions in a child process, and what kills it."""

import threading
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest
from support.children import made, unmakeable

from infra.isolation import TRIES, DiedError, Isolated


def births(folder: Path) -> int:
    return len(list(folder.glob("born-*")))


def test_isolated_names_the_input_that_kills_and_goes_on(tmp_path: Path) -> None:
    with Isolated(partial(made, tmp_path)) as isolated:
        assert isolated("one") == 3
        with pytest.raises(DiedError):
            isolated("poison")
        with pytest.raises(ValueError, match="empty"):
            isolated("")
        assert isolated("three") == 5
    assert births(tmp_path) == 1 + TRIES


def test_isolated_tries_an_input_again_whose_child_died_once(tmp_path: Path) -> None:
    with Isolated(partial(made, tmp_path)) as isolated:
        assert isolated("unlucky") == 7
    assert births(tmp_path) == 2


def test_isolated_takes_calls_of_threads_one_at_a_time(tmp_path: Path) -> None:
    lengths: dict[str, int] = {}
    with Isolated(partial(made, tmp_path)) as isolated:
        threads = [threading.Thread(target=lambda n=n: lengths.update({n: isolated(n)})) for n in ("a", "bb", "ccc")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert lengths == {"a": 1, "bb": 2, "ccc": 3}


def test_isolated_blames_no_input_when_the_child_cannot_start() -> None:
    with Isolated(unmakeable) as isolated:
        for _ in range(2):
            with pytest.raises(BrokenProcessPool):
                isolated()
