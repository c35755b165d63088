"""A training worker that is told to end (SIGTERM) is heard: the loop finishes its step and keeps a checkpoint.

Ray Train runs the training function in a thread, where no signal handler can be installed, and Ray's own handler ends
the process on the spot. So the handler here is put in its place by the process's main thread, which Ray Train asks to
run things before training starts. It holds back only the first signal, and only while something trains.

Python runs a handler when the main thread next executes Python: in a Ray worker when Ray Train polls it, about once a
second.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_told = threading.Event()
_training = threading.Event()


def stop_requested() -> bool:
    """Whether this process was told to end while it trains."""
    return _told.is_set()


@contextmanager
def deferred_sigterm() -> Iterator[None]:
    """Hold a SIGTERM back for as long as the block trains; :func:`stop_requested` tells of it."""
    _told.clear()
    _training.set()
    try:
        yield
    finally:
        _training.clear()


def install_handler() -> None:
    """Put the handler in the place of the one that is there. Only the main thread may."""
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: Any) -> None:
        if _training.is_set() and not _told.is_set():
            _told.set()
        elif callable(before):
            before(number, frame)
        else:
            raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, handle)


def listening_torch_config() -> Any:
    """Ray Train's set-up of torch, and :func:`install` on every worker."""
    from ray.train.torch import TorchConfig

    base: Any = TorchConfig().backend_cls

    class Backend(base):
        def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_training_start(worker_group, backend_config)
            worker_group.execute(install_handler)

    class Listening(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return Backend

    return Listening()
