"""Running jobs on the page: their progress, their place in the queue, and how to cancel them."""

import asyncio
from collections.abc import Mapping

from nicegui import ui

from tasks.serve.playground.elements import box, say
from tasks.serve.service.errors import JobCancelledError
from tasks.serve.service.jobs import Job, JobStatus, Response

_REFRESH_S = 0.15


class Runner:
    """Progress of the running jobs. Escape clicks the button."""

    def __init__(self) -> None:
        """Add the hidden elements."""
        self._jobs: list[Job] = []
        self._area = box("progress", role="status")
        self._area.set_visibility(False)
        ui.context.client.on_delete(self.cancel)

    @property
    def running(self) -> bool:
        """True while jobs run."""
        return bool(self._jobs)

    def cancel(self) -> None:
        """Cancel the running jobs."""
        for job in self._jobs:
            job.cancel()

    async def wait(self, jobs: Mapping[str, Job]) -> None:
        """Show the progress until every job is finished. Raises ``JobCancelledError`` if the visitor has left."""
        self._jobs = list(jobs.values())
        try:
            rows = self._build(jobs)
            futures = [asyncio.wrap_future(job.future) for job in jobs.values()]
            pending: set[asyncio.Future[Response]] = set(futures)
            while pending and not self._area.is_deleted:
                for title, (line, bar) in rows.items():
                    status = jobs[title].status()
                    line.text = progress_text(status)
                    bar.value = status.step / status.steps if status.steps else 0.0
                _, pending = await asyncio.wait(pending, timeout=_REFRESH_S)
            if pending:  # the visitor has left
                self.cancel()
                raise JobCancelledError("the page was closed")
            for future in futures:
                future.exception()  # otherwise asyncio reports the errors as unread
        finally:
            self._jobs = []
            self._area.set_visibility(False)

    def _build(self, jobs: Mapping[str, Job]) -> dict[str, tuple[ui.label, ui.linear_progress]]:
        rows = {}
        self._area.clear()
        self._area.set_visibility(True)
        with self._area:
            with box("progress-rows"):
                for title in jobs:
                    with box("progress-row"):
                        if len(jobs) > 1:
                            say("strong", title)
                        line = ui.label("Starting")
                        bar = ui.linear_progress(value=0.0, show_value=False)
                        bar.props("animation-speed=200")
                        bar.props["aria-label"] = f"Progress: {title}"
                    rows[title] = (line, bar)
            ui.button("Cancel", on_click=self.cancel).props("flat no-caps").classes("cancel")
        return rows


def progress_text(status: JobStatus) -> str:
    """Return the progress of a job as a sentence."""
    if status.state == "queued":
        before = status.position or 0
        return "Waiting: next in the queue" if before == 0 else f"Waiting: {before} in the queue before it"
    if status.state == "running":
        return f"Step {status.step} of {status.steps}" if status.steps else "Working"
    return {"done": "Done", "failed": "Failed", "cancelled": "Cancelled"}[status.state]
