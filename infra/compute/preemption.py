"""Graceful stops: on SIGTERM or on request of the flow, a training worker finishes its step and saves a checkpoint.

Ray Train runs the training function in a thread, where no signal handler can be installed, and Ray's own handler ends
the process immediately. Therefore the main thread replaces that handler before training starts, through a hook of Ray
Train. The new handler defers only the first signal, and only during training.

Python runs a handler when the main thread next executes Python code. In a Ray worker this is when Ray Train polls it,
about once a second.

A flow that is cancelled cannot send signals to workers on other machines. It writes a small file instead, for which
each worker looks about once a second.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from infra import storage
from infra.errors import KNNDiffusionError

POLL_S = 1.0
_stop_requested = threading.Event()
_training = threading.Event()


def stop_requested() -> bool:
    """Return True if this process received SIGTERM during training, or the flow requested a stop."""
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


class StopRequest:
    """Request of a flow to its training workers, as a file in a folder that all of them can reach."""

    def __init__(self, folder_uri: str) -> None:
        """Keep the request in ``folder_uri``, which must be empty at first."""
        self._request = storage.join(folder_uri, "stop")
        self._watched = storage.join(folder_uri, "watched")

    def send(self) -> bool:
        """Request a stop. Return True if a worker watches for it, so that waiting for a checkpoint makes sense."""
        storage.write_bytes(self._request, b"")
        return storage.exists(self._watched)

    def is_sent(self) -> bool:
        """Return True if a stop was requested."""
        return storage.exists(self._request)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Stop this worker on request within the block. It exits at once while it does not train yet."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(POLL_S):
                with contextlib.suppress(KNNDiffusionError):  # the next look may succeed
                    if not self.is_sent():
                        continue
                    if not _training.is_set():
                        os._exit(1)  # nothing to save
                    _stop_requested.set()

        storage.write_bytes(self._watched, b"")
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


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


def graceful_torch_config() -> Any:
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
