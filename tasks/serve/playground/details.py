"""Details of one image beside the results: its settings, its neighbours, and what can be done with it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from nicegui import ui

from tasks.serve.playground.elements import (
    box,
    hit_alt,
    image,
    pairs,
    result_source,
    say,
    score_text,
    served_text,
    shorten,
    source_link,
    thumbnail_source,
)
from tasks.serve.service.jobs import Job
from tasks.serve.service.requests import GenerateRequest, Request
from tasks.serve.service.responses import Hit, ImagesResponse, MadeImage, ServedVersion

_TITLES = {"n": "images", "k": "neighbours", "side": "size in px"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A generated or edited image on the page."""

    job: Job
    number: int
    response: ImagesResponse

    @property
    def image(self) -> MadeImage:
        """The image."""
        return self.response.images[self.number]

    @property
    def source(self) -> str:
        """Address of the PNG."""
        return result_source(self.job.id, self.number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Actions:
    """Actions of the buttons."""

    use_all: Callable[[Shown], Any]
    use_seed: Callable[[Shown], Any]
    search: Callable[[Shown], Any]
    edit: Callable[[Shown], Any]


class Details:
    """The panel. It never changes the controls, unless one of its buttons is clicked."""

    def __init__(self, actions: Actions) -> None:
        """Add the empty panel."""
        self._actions = actions
        self.area = box("details", "aside", aria_label="Details of the image", tabindex="-1")
        self.area.set_visibility(False)

    def hide(self) -> None:
        """Hide the panel."""
        self.area.set_visibility(False)

    def show(self, shown: Shown) -> None:
        """Show an image."""
        self.area.clear()
        self.area.set_visibility(True)
        with self.area:
            with box("details-head"):
                say("h2", f"Seed {shown.image.seed}")
                close = ui.button(icon="close", on_click=self.hide).props("flat round dense").classes("close-details")
                close.props["aria-label"] = "Close the details"
            image(shown.source, f"Image with seed {shown.image.seed}", "details-image")
            self._buttons(shown)
            similarity(shown.image, shown.response.database)
            say("h3", "Settings")
            pairs(settings_of(shown), limit=40)
            say("h3", "Neighbours")
            for hit in shown.image.neighbours:
                neighbour_row(hit, shown.response.database)

    def _buttons(self, shown: Shown) -> None:
        with box("buttons"):
            for label, act in (
                ("Use all", self._actions.use_all),
                ("Use seed", self._actions.use_seed),
                ("Search with it", self._actions.search),
                ("Edit it", self._actions.edit),
            ):
                ui.button(label, on_click=lambda act=act: act(shown)).props("outline no-caps dense")
            download = say("a", "Download PNG", "download")
            download.props.update({"href": result_source(shown.job.id, shown.number, download=True), "download": ""})


def settings_of(shown: Shown) -> dict[str, Any]:
    """Return everything that the image depends on, with names for people."""
    request = shown.job.request
    prompt = prompt_text(request)
    settings = {name: value for name, value in shown.response.settings.items() if value is not None}
    first = {"prompt": prompt, "seed": shown.image.seed}
    settings = dict.fromkeys(first) | settings  # they come first
    last = {"database": served_text(shown.response.database), "model": shown.response.model}
    return {_TITLES.get(name, name.replace("_", " ")): value for name, value in {**settings, **first, **last}.items()}


def prompt_text(request: Request) -> str:
    """Return the prompt of a generation or an edit, for people."""
    text = getattr(request, "prompt", None)
    if text is None or not isinstance(request, GenerateRequest) or request.image is None:
        return text or "an image"
    return f"{text}, with an image"


def similarity(made: MadeImage, database: ServedVersion) -> None:
    """Show how near the image is to its nearest stored image."""
    if made.nearest is None:
        return
    with box("nearest"):
        image(thumbnail_source(database, made.nearest.id), hit_alt(made.nearest))
        say("span", f"Similarity to its nearest stored image: {score_text(made.nearest.score)}")


def neighbour_row(hit: Hit, database: ServedVersion) -> None:
    """Show a neighbour with its score, columns and source."""
    with box("neighbour"):
        image(thumbnail_source(database, hit.id), hit_alt(hit))
        with box("neighbour-text"):
            columns = ", ".join(f"{name}: {shorten(value, 80)}" for name, value in list(hit.columns.items())[:6])
            say("span", f"Similarity {score_text(hit.score)}" + (f" · {columns}" if columns else ""))
            source_link(hit.url)
