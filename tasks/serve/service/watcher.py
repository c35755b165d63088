"""The threads that look at the registry and at the takedowns, and swap what has moved."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from infra import logs
from infra.errors import KNNDiffusionError
from model.errors import ModelError
from tasks.serve.service.catalog import Catalog
from tasks.serve.service.errors import expected_errors, public_message

_REGISTRY = "the registry"
_TAKEDOWNS = "the takedowns"


class Watcher:
    """Follows the aliases of what is served, and applies takedowns.

    Each has a thread of its own: a registry that hangs and a version that takes minutes to open delay no takedown.
    """

    def __init__(
        self,
        catalog: Catalog,
        poll_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        ended: threading.Event,
    ) -> None:
        """Watch for ``catalog`` every ``poll_s`` seconds; ``ended`` stops the threads after their present look."""
        self._catalog, self._poll_s, self._clock = catalog, poll_s, clock
        self._ended = ended
        self._waiting: dict[str, float] = {}
        looks = {_TAKEDOWNS: self.apply_takedowns, _REGISTRY: self.follow}
        self._threads = [
            threading.Thread(target=self._watch, args=look, name=f"watcher of {look[0]}", daemon=True)
            for look in looks.items()
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def problems(self) -> list[str]:
        """Return the problems of the last look, and one for each answer that the present look still waits for."""
        found, now = list(self._catalog.problems.values()), self._clock()
        for key, since in list(self._waiting.items()):
            if now - since > 2 * self._poll_s + 5 and key not in self._catalog.problems:
                found.append(f"{key}: no answer for {now - since:.0f} s; what is served remains")
        return found

    def look(self) -> None:
        """Look once at the takedowns and then at the registry."""
        self.apply_takedowns()
        self.follow()

    def apply_takedowns(self) -> None:
        """Hide what was taken down from all open versions. Project errors are recorded as problems and not raised."""
        for opened in self._catalog.live():
            key = f"the takedowns of {opened.name}"
            try:
                with self._wait_for(key), expected_errors():
                    if opened.hide_taken_down():
                        logs.get("serve").info("%s: new takedowns are applied", opened.name)
            except (KNNDiffusionError, ModelError) as error:
                self._catalog.problems[key] = f"{key} cannot be read: {public_message(error)}"
            else:
                self._catalog.problems.pop(key, None)
        self._catalog.problems.pop(_TAKEDOWNS, None)

    def follow(self) -> None:
        """Serve the versions that the aliases name now. Project errors are recorded as problems and not raised."""
        self._report_deleted()
        problems = self._catalog.problems
        try:
            with self._wait_for(_REGISTRY), expected_errors():
                self._catalog.refresh()
        except KNNDiffusionError as error:
            problems[_REGISTRY] = f"the registry does not answer, what is served remains: {public_message(error)}"
            return
        problems.pop(_REGISTRY, None)
        for name in self._catalog.entries:
            self._catalog.follow(name)
        self._catalog.follow_model()

    def _watch(self, key: str, look: Callable[[], None]) -> None:
        while not self._ended.wait(self._poll_s):
            try:
                look()
            except Exception:  # the thread must continue; the log has the traceback
                logs.get("serve").exception("a look at %s failed", key)
                self._catalog.problems[key] = f"a look at {key} failed; see the log of the service"

    @contextlib.contextmanager
    def _wait_for(self, key: str) -> Iterator[None]:
        self._waiting[key] = self._clock()
        try:
            yield
        finally:
            del self._waiting[key]

    def _report_deleted(self) -> None:
        for name, entry in self._catalog.entries.items():
            key, line = (
                f"the files of {name}",
                f"the files of {name} were deleted; swap to another version, or restore them",
            )
            try:
                with expected_errors():
                    deleted = entry.opened.is_deleted()
                if deleted:
                    self._catalog.problems[key] = line
                else:
                    self._catalog.problems.pop(key, None)
            except (KNNDiffusionError, ModelError) as error:
                self._catalog.problems[key] = f"{key} cannot be checked: {public_message(error)}"
