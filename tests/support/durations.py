"""Recorded durations of tests, which decide what is slow and which tests start first."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "durations.txt"
"""One line per test: seconds with setup and teardown, and the node id. ``--record-durations`` writes it."""
SLOW_S = 2.0
RECORDED_S = 0.3


def load(path: Path = FILE) -> dict[str, float]:
    """Return the seconds of each recorded test by node id."""
    lines = (line.split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return {node: float(seconds) for seconds, node in lines}


def record(reports: Iterable[pytest.TestReport], path: Path = FILE) -> None:
    """Replace the recorded durations by those of ``reports``."""
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds[report.nodeid] += report.duration  # type: ignore[assignment]
    lines = [f"{taken:.1f} {node}\n" for node, taken in seconds.most_common() if taken >= RECORDED_S]
    path.write_text("".join(lines), encoding="utf-8")


def longest_group_first(items: list[pytest.Item], groups: list[str], seconds: dict[str, float]) -> None:
    """Sort ``items`` so that the groups that take longest start first, and no worker is left alone with one at the end.

    The order within a group does not change.
    """
    total: Counter[str] = Counter()
    for item, group in zip(items, groups, strict=True):
        total[group] += seconds.get(item.nodeid, 0.0)  # type: ignore[assignment]
    first = {group: number for number, group in reversed(list(enumerate(groups)))}
    keys = [(-total[group], first[group], number) for number, group in enumerate(groups)]
    items[:] = [items[number] for *_, number in sorted(keys)]


def in_worker() -> bool:
    """Return True in a worker process of pytest-xdist."""
    return "PYTEST_XDIST_WORKER" in os.environ
