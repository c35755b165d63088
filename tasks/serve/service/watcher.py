"""The thread that looks at the registry and at the takedowns, and swaps what has moved."""

import threading
import time
from collections.abc import Callable

from infra import logs
from infra.errors import KNNDiffusionError, TransientError
from model.errors import ModelError
from tasks.serve.service.catalog import MODEL, Catalog
from tasks.serve.service.errors import expected_errors, public_message
from tasks.serve.service.versions import Versions

_REGISTRY = "the registry"


class Watcher:
    """Follows the aliases of what is served, and applies takedowns."""

    def __init__(
        self,
        catalog: Catalog,
        versions: Versions,
        poll_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        ended: threading.Event | None = None,
    ) -> None:
        """Watch on behalf of ``catalog`` every ``poll_s`` seconds; ``ended`` stops the thread."""
        self._catalog, self._versions, self._poll_s, self._clock = catalog, versions, poll_s, clock
        self._ended = ended or threading.Event()
        self._looked = clock()
        self._thread = threading.Thread(target=self._watch, name="registry watcher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the present look."""
        self._ended.set()

    def problems(self) -> list[str]:
        """Return what the last look found, and whether the registry keeps this one waiting."""
        found = list(self._catalog.problems.values())
        waited_s = self._clock() - self._looked
        if waited_s > 2 * self._poll_s + 5 and _REGISTRY not in self._catalog.problems:
            found.append(f"the registry has not answered for {waited_s:.0f} s; what is served remains")
        return found

    def look(self) -> None:
        """Look once: apply takedowns, then follow the aliases. Records problems, and raises no error of the user's."""
        self._apply_takedowns()
        self._report_deleted()
        problems = self._catalog.problems
        try:
            self._catalog.listing = self._versions.listing()
        except KNNDiffusionError as error:
            problems[_REGISTRY] = f"the registry does not answer, what is served remains: {public_message(error)}"
            return
        finally:
            self._looked = self._clock()
        problems.pop(_REGISTRY, None)
        self._follow_databases()
        self._follow_model()

    def _watch(self) -> None:
        while not self._ended.wait(self._poll_s):
            try:
                self.look()
            except Exception:  # the thread must go on; the log has the traceback
                logs.get("serve").exception("a look at the registry failed")
                self._catalog.problems[_REGISTRY] = "a look at the registry failed; see the log of the service"

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

    def _follow_databases(self) -> None:
        for name, entry in self._catalog.entries.items():
            target = self._catalog.listing.target("database", entry.followed)
            if entry.followed.alias is None or target in (None, entry.seen):
                continue
            self._try(name, target, lambda: self._catalog.follow(name, entry.followed, target))  # noqa: B023

    def _follow_model(self) -> None:
        followed = self._catalog.default_model_followed()
        target = self._catalog.listing.target("generator", followed)
        if followed.alias is not None and target not in (None, self._catalog.seen_model):
            self._try(MODEL, target, lambda: self._catalog.swap_model(followed, target))

    def _try(self, name: str, target: int | None, swap: Callable[[], None]) -> None:
        """Swap; a version that does not open is tried again only after a failure that may pass."""
        try:
            swap()
        except TransientError:
            return
        except (KNNDiffusionError, ModelError):
            self._catalog.skip(name, target)

    def _apply_takedowns(self) -> None:
        for opened in self._catalog.live():
            key = f"the takedowns of {opened.name}"
            try:
                with expected_errors():
                    if opened.hide_taken_down():
                        logs.get("serve").info("%s: new takedowns are applied", opened.name)
            except (KNNDiffusionError, ModelError) as error:
                self._catalog.problems[key] = f"{key} cannot be read: {public_message(error)}"
            else:
                self._catalog.problems.pop(key, None)
