"""Contestants: processes that are started and warmed up first, and then run rounds on request.

The protocol uses lines: a process prints ``ready`` once, and then answers each ``go`` with ``done``. Idle contestants
wait for a line, so they can alternate, and a drift of the machine affects all of them.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

CLIP_RETRIEVAL_PYTHON = "CLIP_RETRIEVAL_PYTHON"
"""Environment variable with the Python of an environment with clip-retrieval."""


def serve(prepare: Callable[[], Callable[[], object]]) -> None:
    """Serve in the process: ``prepare`` a round, and run it for every line. Libraries print to standard error."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = prepare()
    print("ready", file=lines, flush=True)
    for _ in sys.stdin:
        run()
        print("done", file=lines, flush=True)


@dataclass
class Spent:
    """Cost of a round: wall-clock seconds, and CPU seconds including ended processes."""

    wall_s: float = 0.0
    cpu_s: float = 0.0


@contextmanager
def spent(roots: Iterable[int], *, without: Iterable[int] = ()) -> Iterator[Spent]:
    """Measure wall-clock seconds of the block, and CPU seconds of the processes ``roots`` and their descendants."""
    roots, without, taken = set(roots), set(without), Spent()
    before, started = _cpu_s(roots, without), time.perf_counter()
    yield taken
    taken.wall_s = time.perf_counter() - started
    taken.cpu_s = _cpu_s(roots, without) - before


def _cpu_s(roots: set[int], without: set[int]) -> float:
    below: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            below.setdefault(int(fields[1]), []).append(int(path.name))
            ticks[int(path.name)] = sum(map(int, fields[11:15]))
    total, pending = 0, list(roots)
    while pending:
        pid = pending.pop()
        total += ticks.get(pid, 0)
        pending += [child for child in below.get(pid, ()) if child not in without]
    return total / os.sysconf("SC_CLK_TCK")


class Contestant:
    """Processes that run their parts of a round in parallel."""

    def __init__(self, commands: Sequence[Sequence[str | Path]], *, threads: int) -> None:
        """Start the processes with ``threads`` threads each."""
        quiet = {"OMP_WAIT_POLICY": "PASSIVE", "NO_ALBUMENTATIONS_UPDATE": "1", "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the processes
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._processes = [
            subprocess.Popen([str(part) for part in command], text=True, env=environment, **pipes)
            for command in commands
        ]

    def __enter__(self) -> Self:
        try:
            self._expect("ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def round(self) -> "Spent":
        """Run one round in all processes."""
        with spent(self.pids) as taken:
            for process in self._processes:
                print("go", file=process.stdin, flush=True)
            self._expect("done")
        return taken

    def _expect(self, word: str) -> None:
        for process in self._processes:
            if (line := process.stdout.readline().strip()) != word:
                self._log.seek(0)
                raise RuntimeError(f"{process.args} said {line!r}, not {word}:\n{self._log.read()[-2000:]}")
