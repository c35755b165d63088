"""Functions in a child process: an input that kills the child fails alone."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

TRIES = 2
"""Attempts per input when the child dies. The system may kill a child because of the memory use of another process."""


class DiedError(Exception):
    """Raised when the child process died on every attempt at an input."""


class Isolated:
    """Callable proxy of a function that lives in a child process.

    The child calls ``make()`` once; a call of the proxy calls the function that ``make`` returned there. ``make``,
    arguments and results are pickled. Thread-safe: one call runs at a time.
    """

    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        """Store ``make``; the child starts at the first call."""
        self._make = make
        self._pool: ProcessPoolExecutor | None = None
        self._call_lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_child()

    def __call__(self, *arguments: Any) -> Any:
        """Call the function in the child.

        Raises:
            DiedError: The child died on every attempt.
            BrokenProcessPool: No child could be started. The arguments are not the cause.
            Exception: Any error of the function.
        """
        with self._call_lock:
            for _ in range(TRIES):
                self._pool = self._pool or _child(self._make)
                try:
                    return self._pool.submit(_call, *arguments).result()
                except BrokenProcessPool:
                    self._stop_child()
        raise DiedError(f"the child process died on every attempt: {TRIES} attempts; skip this input")

    def _stop_child(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def follow_parent() -> None:
    """Exit this process when its parent ends, even if the parent is killed. Call it in the child."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


_function: Callable[..., Any] | None = None


def _child(make: Callable[[], Callable[..., Any]]) -> ProcessPoolExecutor:
    # A fork of a process with CUDA and threads may hang.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_init_child, initargs=(make,))
    try:
        pool.submit(_ready).result()
    except BrokenProcessPool:
        pool.shutdown()
        raise
    return pool


def _init_child(make: Callable[[], Callable[..., Any]]) -> None:
    global _function
    follow_parent()
    _function = make()


def _ready() -> None:
    """Return as soon as the child runs."""


def _call(*arguments: Any) -> Any:
    assert _function is not None  # noqa: S101  # set by the pool's initializer
    return _function(*arguments)
