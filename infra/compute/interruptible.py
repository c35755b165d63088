"""Calls that a signal interrupts, although they block in native code or would replace the signal's handler.

Ray's ``get`` and ``wait`` block until the result is there, even if a signal handler raises. They then raise a
``SystemError`` in place of the handler's exception. :func:`get` and :func:`wait` therefore wait in slices of
``SLICE_S``.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import ray

SLICE_S = 0.5
"""Longest time until a signal takes effect."""

Result = TypeVar("Result")


def call(
    function: Callable[[], Result],
    *,
    interrupted: Callable[[threading.Thread], None] | None = None,
    until: threading.Event | None = None,
) -> Result:
    """Return ``function()``, called in another thread, while this thread waits and handles signals.

    Args:
        function: A function of no arguments.
        interrupted: Called with the thread if a handler raises here before ``function`` has ended. The thread is then
            left alone; it ends with the process.
        until: The thread stays alive until this event is set. Linux ends child processes that ask for it
            (``PR_SET_PDEATHSIG``) with the thread that started them. Default: None, the thread ends with ``function``.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)
        if until is not None:
            until.wait()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return done.result()
    except BaseException:
        if not done.done() and interrupted is not None:
            interrupted(thread)
        raise


def wait(references: Sequence[Any], count: int = 1, timeout_s: float = math.inf) -> tuple[list[Any], list[Any]]:
    """Wait until ``count`` results are there or the time is up. Return the references with and without a result."""
    deadline = time.monotonic() + timeout_s
    while True:
        with interruptions():
            done, pending = ray.wait(
                list(references), num_returns=count, timeout=max(0.0, min(SLICE_S, deadline - time.monotonic()))
            )
        if len(done) >= count or time.monotonic() >= deadline:
            return done, pending


def get(references: Sequence[Any]) -> list[Any]:
    """Wait until all calls have ended and return their results, or raise the first error of a worker."""
    wait(references, len(references))
    with interruptions():
        return list(ray.get(list(references)))


@contextmanager
def interruptions() -> Iterator[None]:
    """Raise what a signal handler raises within the block, where native code replaces it by a ``SystemError``.

    Otherwise Prefect takes a cancelled task for a failed one, because a ``SystemError`` is an ordinary exception. Can
    be used as a decorator.
    """
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None or isinstance(error.__cause__, Exception):
            raise
        raise error.__cause__ from None
