"""History of one browser tab: a strip of earlier results. It ends with the tab, and a reload keeps it."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from nicegui import app
from starlette.datastructures import QueryParams

from infra.errors import NotFoundError
from tasks.serve.playground.elements import box, image, press, result_source, say, shorten, thumbnail_source
from tasks.serve.playground.results import Results
from tasks.serve.playground.state import PageState
from tasks.serve.service.jobs import Job, JobTable
from tasks.serve.service.responses import ImagesResponse

_KEPT = 30
_KEY = "playground-history"


class Entries:
    """Entries of one browser tab, the latest first. Two runs of equal settings are two entries: their jobs differ."""

    def __init__(self, stored: MutableMapping[str, Any], jobs: JobTable) -> None:
        """Read and write the entries in ``stored``; ``jobs`` has their results until they expire."""
        self._stored, self._jobs = stored, jobs

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the entries."""
        return iter([dict(one) for one in self._stored.get(_KEY, [])])

    def add(self, state: PageState, query: str, results: Results) -> None:
        """Add results. An earlier entry with the same query goes once its jobs have expired."""
        entry = {
            "query": query,
            "results": {title: one if isinstance(one, str) else [one.id] for title, one in results.items()},
            "title": f"{state.tab.capitalize()}: {shorten(state.text or 'an image', 60)}",
            "image": _first_image(next(one for one in results.values() if isinstance(one, Job))),
            "time": time.strftime("%H:%M"),
        }
        kept = [one for one in self if one["query"] != query or self.results_of(one)]
        self._stored[_KEY] = [entry, *kept][:_KEPT]

    def results_of(self, entry: Mapping[str, Any]) -> Results:
        """Return the results of an entry without the jobs that have expired; empty if all have."""
        found: Results = {}
        for title, one in entry["results"].items():
            with contextlib.suppress(NotFoundError):
                found[title] = one if isinstance(one, str) else self._jobs.get(one[0])
        return found if any(isinstance(one, Job) for one in found.values()) else {}

    def latest(self, state: PageState) -> Results:
        """Return the stored results of the latest entry with the settings of a state; empty if there are none."""
        same = [one for one in self if state_of(one).settings() == state.settings()]
        return next((results for one in same if (results := self.results_of(one))), {})


def state_of(entry: Mapping[str, Any]) -> PageState:
    """Return the values of the controls that an entry was run with."""
    return PageState.from_query(QueryParams(entry["query"]))


class History:
    """Earlier results, the latest first."""

    def __init__(self, jobs: JobTable, on_open: Callable[[dict[str, Any]], Any]) -> None:
        """Add the empty strip. ``on_open`` is called with an entry."""
        self._jobs, self._on_open = jobs, on_open
        self.entries = Entries({}, jobs)
        self.area = box("history", "section", aria_label="History of this tab")

    def connect(self) -> None:
        """Read the entries once the browser is connected; it may be away when a result arrives."""
        self.entries = Entries(app.storage.tab, self._jobs)
        self.refresh()

    def add(self, state: PageState, query: str, results: Results) -> None:
        """Add results."""
        self.entries.add(state, query, results)
        self.refresh()

    def refresh(self) -> None:
        """Show the entries."""
        entries = list(self.entries)
        self.area.clear()
        self.area.set_visibility(bool(entries))
        with self.area:
            say("h2", "History")
            with box("history-strip"):
                for entry in entries:
                    self._entry(entry)

    def _entry(self, entry: dict[str, Any]) -> None:
        with press(f"{entry['title']}, {entry['time']}", lambda: self._on_open(entry), "history-entry"):
            if entry["image"]:
                image(entry["image"], "")
            say("span", entry["title"], "history-title")


def _first_image(job: Job) -> str:
    response = job.future.result()
    if isinstance(response, ImagesResponse):
        return result_source(job.id, 0) if response.images else ""
    return thumbnail_source(response.database, response.hits[0].id) if response.hits else ""
