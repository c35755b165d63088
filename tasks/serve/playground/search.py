"""Results of a search: the nearest stored images with their scores."""

from collections.abc import Callable
from typing import Any

from nicegui import ui

from tasks.serve.playground.elements import (
    box,
    hit_alt,
    image,
    pairs,
    press,
    say,
    score_text,
    served_text,
    source_link,
    thumbnail_source,
)
from tasks.serve.playground.state import PageState
from tasks.serve.service.responses import Hit, SearchResponse, ServedVersion


class SearchResults:
    """The grid of a response, and the slider that hides results below a score."""

    def __init__(self, state: PageState, on_like: Callable[[Hit, ServedVersion], Any], on_change: Callable[[], None]):
        """Add the empty area. ``on_like`` searches for more images like a hit."""
        self._state, self._on_like, self._on_change = state, on_like, on_change
        self.area = box("results")
        with self.area:
            say(
                "p",
                "Describe what you look for, or drop an image into the box. The nearest stored images appear here.",
                "empty",
            )

    def show(self, response: SearchResponse) -> None:
        """Show a response instead of the earlier one."""
        self.area.clear()
        with self.area:
            if not response.hits:
                say("p", f"No image of {served_text(response.database)} matches.", "empty")
                return
            with box("results-head"):
                say("h2", f"Nearest images in {served_text(response.database)}")
                self._slider(response)
            self._grid = box("grid")
        self._fill(response)

    def _slider(self, response: SearchResponse) -> None:
        with box("threshold"):
            self._count = ui.label().classes("muted")
            self._count.props["aria-live"] = "polite"
            slider = box("range", "input", type="range", min="0", max="1", step="0.01", aria_label="Lowest similarity")
            slider.props["value"] = self._state.min_score or 0
            emit = "(event) => emit(Number(event.target.value))"
            slider.on("input", lambda event: self._limit(float(event.args), response), throttle=0.1, js_handler=emit)

    def _limit(self, score: float, response: SearchResponse) -> None:
        self._state.min_score = min(1.0, score) if score > 0 else None  # cosines may be negative
        self._fill(response)
        self._on_change()

    def _fill(self, response: SearchResponse) -> None:
        least = self._state.min_score
        shown = [hit for hit in response.hits if least is None or hit.score >= least]
        lowest = "" if least is None else f" with similarity {score_text(least)} or more"
        self._count.text = f"{len(shown)} of {len(response.hits)} images{lowest}"
        self._grid.clear()
        with self._grid:
            for hit in shown:
                hit_card(hit, response.database, self._on_like)


def hit_card(hit: Hit, database: ServedVersion, on_like: Callable[[Hit, ServedVersion], Any]) -> None:
    """Add a stored image. A click searches for more like it; hover or focus shows its columns and source."""
    with box("card"):
        with press(f"More like stored image {hit.id}", lambda: on_like(hit, database), "result"):
            image(thumbnail_source(database, hit.id), hit_alt(hit))
        say("span", score_text(hit.score), "score")
        with box("about"):
            say("strong", "Click for more like this")
            pairs({name: value for name, value in hit.columns.items() if value not in (None, "")})
            source_link(hit.url)
