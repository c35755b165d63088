"""A contestant: processes that were started and warmed up before, and then run rounds when told to.

Both sides talk in lines: the process says ``ready`` once, then answers each ``go`` with ``done``. Who is not on turn
waits for a line, so all contestants can be at hand and alternate: a machine that drifts, drifts for all.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self


def serve(prepare: Callable[[], Callable[[], object]]) -> None:
    """In the process: ``prepare`` a round, then run it for every line that comes. What libraries print is no answer."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = prepare()
    print("ready", file=lines, flush=True)
    for _ in sys.stdin:
        run()
        print("done", file=lines, flush=True)


class Contestant:
    """Processes that do their parts of a round at once."""

    def __init__(self, commands: Sequence[Sequence[str | Path]], *, threads: int) -> None:
        """Start them, each with as many threads."""
        quiet = {"OMP_WAIT_POLICY": "PASSIVE", "NO_ALBUMENTATIONS_UPDATE": "1", "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}
        self._told = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the processes
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._told}
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

    def seconds(self) -> float:
        """Of one round of all processes together."""
        started = time.perf_counter()
        for process in self._processes:
            print("go", file=process.stdin, flush=True)
        self._expect("done")
        return time.perf_counter() - started

    def _expect(self, word: str) -> None:
        for process in self._processes:
            if (line := process.stdout.readline().strip()) != word:
                self._told.seek(0)
                raise RuntimeError(f"{process.args} said {line!r}, not {word}:\n{self._told.read()[-2000:]}")
