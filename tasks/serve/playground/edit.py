"""Edited images: candidates to choose from, and a slider between before and after."""

from collections.abc import Callable
from typing import Any

from nicegui import ui

from tasks.serve.playground.details import Shown
from tasks.serve.playground.elements import box, image, press, say, served_text
from tasks.serve.playground.images import SentImages
from tasks.serve.service.jobs import Job
from tasks.serve.service.requests import EditRequest
from tasks.serve.service.responses import ImagesResponse, MadeImage

_HINT = "Add an image, describe how it should look, and choose among the candidates."
_NO_EDITS = (
    "This generator was distilled to few steps and cannot edit. "
    "To edit images, serve the generator that it was made from."
)


class EditedImages:
    """The candidates of one edit."""

    def __init__(self, images: SentImages, on_open: Callable[[Shown], Any], *, can_edit: bool) -> None:
        """Add the empty area, which says why if the generator cannot edit. ``images`` keeps the originals."""
        self._images, self._on_open, self._page = images, on_open, ui.context.client.id
        self.area = box("results")
        with self.area:
            say("p", _HINT if can_edit else _NO_EDITS, "empty")

    def show(self, job: Job, response: ImagesResponse) -> None:
        """Show a response instead of the earlier one, with its first candidate open."""
        self.area.clear()
        request = job.request
        if not isinstance(request, EditRequest):
            return
        self._before = f"playground/images/{self._images.add(request.image, self._page)}"
        with self.area:
            with box("results-head"):
                say("h2", f"Edited with {served_text(response.database)}")
                say("p", f"“{request.prompt}”", "muted")
            with box("edit"):
                self._stage = box("edit-stage")
                with box("candidates"):
                    say("h3", f"{len(response.images)} candidates" if len(response.images) > 1 else "Candidate")
                    with box("grid small"):
                        self._choices = [
                            self._candidate(Shown(job=job, number=number, response=response))
                            for number in range(len(response.images))
                        ]
        if response.images:
            self._choose(Shown(job=job, number=0, response=response))

    def _candidate(self, shown: Shown) -> ui.element:
        with box("card"), press(f"Candidate {shown.number + 1}", lambda: self._choose(shown), "result") as button:
            image(shown.source, f"Candidate {shown.number + 1}, seed {shown.image.seed}")
        return button

    def _choose(self, shown: Shown) -> None:
        for number, button in enumerate(self._choices):
            button.props["aria-pressed"] = "true" if number == shown.number else "false"
        self._stage.clear()
        with self._stage:
            region = self._slider(shown)
            with box("buttons"):
                say("span", f"Seed {shown.image.seed}", "muted")
                if region is not None:
                    switch = ui.switch("Outline the changed region", value=True)
                    switch.on_value_change(lambda event: region.set_visibility(event.value))
                ui.button("Details", on_click=lambda: self._on_open(shown)).props("outline no-caps dense")

    def _slider(self, shown: Shown) -> ui.element | None:
        with box("before-after"):
            image(shown.source, "After the edit", "after")
            image(self._before, "Before the edit", "before")
            region = outline(shown.image)
            say("span", "Before", "tag left")
            say("span", "After", "tag right")
            box("split-line")
            box("split", "input", type="range", min="0", max="100", value="50", aria_label="Before and after")
        return region


def outline(made: MadeImage) -> ui.element | None:
    """Outline the changed region. Return None if there is none."""
    if len(made.region) < 3:
        return None
    points = " ".join(f"{100 * x:.2f},{100 * y:.2f}" for x, y in made.region)
    with box("outline", "svg", viewBox="0 0 100 100", aria_hidden="true", preserveAspectRatio="none") as drawn:
        for layer in ("outline-back", "outline-front"):
            box(layer, "polygon", points=points)
    return drawn
