"""Progress of a remote worker: the worker writes a small file, and the flow shows it as a progress bar."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from infra import storage
from infra.errors import KNNDiffusionError, NotFoundError, TransientError
from infra.progress import ProgressBar


class Progress:
    """Writer of a worker's progress to a small file in the folder of the stage."""

    FILE = "progress.json"
    EVERY_S = 1.0

    def __init__(self, folder_uri: str, unit: str = "image") -> None:
        """Write to ``folder_uri`` and count in ``unit``."""
        self._uri, self._unit, self._written = storage.join(folder_uri, self.FILE), unit, -self.EVERY_S

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Write the current state, at most once every ``EVERY_S`` seconds except at the end."""
        if time.monotonic() - self._written < self.EVERY_S and done < total:
            return
        self._written = time.monotonic()
        state = {"what": what, "unit": self._unit, "done": done, "total": total, "note": note}
        storage.write_bytes(self._uri, json.dumps(state).encode())


@contextmanager
def progress_bar(folder_uri: str, what: str) -> Iterator[None]:
    """Show a bar that follows the progress file until the block ends."""
    uri, ended = storage.join(folder_uri, Progress.FILE), threading.Event()
    storage.discard(uri)

    def follow() -> None:
        with ProgressBar(total=0, desc=what, leave=False, unit_scale=True) as bar:
            while not ended.wait(1.0):
                with contextlib.suppress(NotFoundError, TransientError, ValueError):
                    state = json.loads(storage.read_bytes(uri))
                    if (state["what"], state["total"]) != (bar.desc.removesuffix(": "), bar.total):
                        # A new part of the work. The rate must not count items that were done before a resume.
                        bar.unit = state["unit"]
                        bar.set_description(state["what"], refresh=False)
                        bar.reset(state["total"])
                        bar.initial = bar.n = state["done"]
                    bar.set_postfix_str(state["note"], refresh=False)
                    bar.update(state["done"] - bar.n)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(KNNDiffusionError):  # the result, or the error of the block, matters more
            storage.discard(uri)
