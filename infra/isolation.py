"""A function in a child process, so that an input that kills the process that handles it costs that input alone."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

TRIES = 2
"""How often an input is tried when the child dies: the system may have killed the child for another's memory."""


class DiedError(Exception):
    """The child process died of this input each time that it was tried."""


class Isolated:
    """``make()`` is called in a child process; calls here are calls of what it returned there.

    ``make``, arguments and results travel by pickle. Threads may share it: one call runs at a time.
    """

    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        """Start the child at the first call."""
        self._make = make
        self._pool: ProcessPoolExecutor | None = None
        self._calling = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def __call__(self, *arguments: Any) -> Any:
        """Call the function.

        Raises:
            DiedError: the child died of these arguments.
            BrokenProcessPool: no child could be started, which says nothing of the arguments.
            Exception: what the function raises.
        """
        with self._calling:
            for _ in range(TRIES):
                self._pool = self._pool or _child(self._make)
                try:
                    return self._pool.submit(_call, *arguments).result()
                except BrokenProcessPool:
                    self._drop()
        raise DiedError(f"its process died {TRIES} times")

    def _drop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def follow_parent() -> None:
    """End this process with the one that started it, which may be killed. Call it in the child."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


_function: Callable[..., Any] | None = None


def _child(make: Callable[[], Callable[..., Any]]) -> ProcessPoolExecutor:
    # A fork of a process that holds CUDA and threads may hang.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_become_child, initargs=(make,))
    try:
        pool.submit(_ready).result()
    except BrokenProcessPool:
        pool.shutdown()
        raise
    return pool


def _become_child(make: Callable[[], Callable[..., Any]]) -> None:
    global _function
    follow_parent()
    _function = make()


def _ready() -> None:
    """Answered once there is a child."""


def _call(*arguments: Any) -> Any:
    assert _function is not None  # noqa: S101  # the pool has called _become_child
    return _function(*arguments)
