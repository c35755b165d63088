"""Graceful preemption: on SIGTERM a training worker finishes its step and saves a checkpoint.

Ray Train runs the training function in a thread, where no signal handler can be installed, and Ray's own handler ends
the process immediately. Therefore the main thread replaces that handler before training starts, through a hook of Ray
Train. The new handler defers only the first signal, and only during training.

Python runs a handler when the main thread next executes Python code. In a Ray worker this is when Ray Train polls it,
about once a second.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_stop_requested = threading.Event()
_training = threading.Event()


def stop_requested() -> bool:
    """Return True if this process received SIGTERM during training."""
    return _stop_requested.is_set()


@contextmanager
def deferred_sigterm() -> Iterator[None]:
    """Defer the first SIGTERM within the block, which trains; :func:`stop_requested` reports it."""
    _stop_requested.clear()
    _training.set()
    try:
        yield
    finally:
        _training.clear()


def install_handler() -> None:
    """Replace the SIGTERM handler of this process. Call it from the main thread."""
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: Any) -> None:
        if _training.is_set() and not _stop_requested.is_set():
            _stop_requested.set()
        elif callable(before):
            before(number, frame)
        else:
            raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, handle)


def listening_torch_config() -> Any:
    """Return Ray Train's ``TorchConfig``, extended by :func:`install_handler` on every worker."""
    from ray.train.torch import TorchConfig

    base: Any = TorchConfig().backend_cls

    class Backend(base):
        def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_training_start(worker_group, backend_config)
            worker_group.execute(install_handler)

    class DeferringTorchConfig(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return Backend

    return DeferringTorchConfig()
