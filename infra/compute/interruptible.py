"""Calls that a signal interrupts, although they block in native code or would replace the signal's handler."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

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


@contextmanager
def interruptions() -> Iterator[None]:
    """Raise what a signal handler raises within the block, where Ray's ``wait`` replaces it by a ``SystemError``.

    Otherwise Prefect takes a cancelled task for a failed one, because a ``SystemError`` is an ordinary exception.
    """
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None or isinstance(error.__cause__, Exception):
            raise
        raise error.__cause__ from None
