"""History of one browser tab: a strip of earlier results. It ends with the tab, and a reload keeps it."""

import time
from collections.abc import Callable
from typing import Any

from nicegui import app

from infra.errors import NotFoundError
from tasks.serve.playground.elements import box, image, press, result_source, say, shorten, thumbnail_source
from tasks.serve.playground.state import PageState
from tasks.serve.service.jobs import Job, JobTable
from tasks.serve.service.responses import ImagesResponse

_KEPT = 30
_KEY = "playground-history"


class History:
    """Earlier results, the latest first."""

    def __init__(self, jobs: JobTable, on_open: Callable[[str], Any]) -> None:
        """Add the empty strip. ``on_open`` is called with the URL query of an entry."""
        self._jobs, self._on_open = jobs, on_open
        self._stored: dict[str, Any] = {}
        self.area = box("history", "section", aria_label="History of this tab")

    def connect(self) -> None:
        """Read the entries once the browser is connected; it may be away when a result arrives."""
        self._stored = app.storage.tab
        self.refresh()

    def add(self, state: PageState, query: str, jobs: dict[str, Job]) -> None:
        """Add finished jobs."""
        entry = {
            "query": query,
            "jobs": {title: job.id for title, job in jobs.items()},
            "title": f"{state.tab.capitalize()}: {shorten(state.text or 'an image', 60)}",
            "image": _first_image(next(iter(jobs.values()))),
            "time": time.strftime("%H:%M"),
        }
        earlier = [one for one in self._stored.get(_KEY, []) if one["query"] != query]
        self._stored[_KEY] = [entry, *earlier][:_KEPT]
        self.refresh()

    def refresh(self) -> None:
        """Show the entries."""
        entries = self._stored.get(_KEY, [])
        self.area.clear()
        self.area.set_visibility(bool(entries))
        with self.area:
            say("h2", "History")
            with box("history-strip"):
                for entry in entries:
                    self._entry(dict(entry))

    def jobs_of(self, query: str) -> dict[str, Job]:
        """Return the jobs of an entry, so that a reload does not run them again; empty if they have expired."""
        entry = next((one for one in self._stored.get(_KEY, []) if one["query"] == query), None)
        try:
            return {} if entry is None else {title: self._jobs.get(name) for title, name in entry["jobs"].items()}
        except NotFoundError:
            return {}

    def _entry(self, entry: dict[str, Any]) -> None:
        with press(f"{entry['title']}, {entry['time']}", lambda: self._on_open(entry["query"]), "history-entry"):
            if entry["image"]:
                image(entry["image"], "")
            say("span", entry["title"], "history-title")


def _first_image(job: Job) -> str:
    response = job.future.result()
    if isinstance(response, ImagesResponse):
        return result_source(job.id, 0) if response.images else ""
    return thumbnail_source(response.database, response.hits[0].id) if response.hits else ""
