"""Two to four databases side by side: the same prompt and seed from each."""

from collections.abc import Callable
from typing import Any

from tasks.serve.playground.details import Shown
from tasks.serve.playground.elements import box, hit_alt, image, press, say, served_text, thumbnail_source
from tasks.serve.playground.results import Results
from tasks.serve.playground.search import hit_card
from tasks.serve.service.jobs import Job
from tasks.serve.service.responses import Hit, ImagesResponse, SearchResponse, ServedVersion

_SHOWN_NEIGHBOURS = 4


class ComparedDatabases:
    """One column for each database."""

    def __init__(self, on_open: Callable[[Shown], Any], on_like: Callable[[Hit, ServedVersion], Any]) -> None:
        """Add the empty area."""
        self._on_open, self._on_like = on_open, on_like
        self.area = box("results")
        with self.area:
            say("p", "Describe an image, and see what each database makes of it, side by side.", "empty")

    def show(self, results: Results) -> None:
        """Show results instead of the earlier ones. A database that failed has its message in its column."""
        self.area.clear()
        with self.area, box("sides"):
            for title, job in results.items():
                with box("side", "section"):
                    if isinstance(job, str):
                        say("h2", title)
                        say("p", job, "message")
                        continue
                    response = job.future.result()
                    say("h2", served_text(response.database))
                    if isinstance(response, SearchResponse):
                        with box("grid small"):
                            for hit in response.hits:
                                hit_card(hit, response.database, self._on_like)
                    else:
                        self._images(job, response)

    def _images(self, job: Job, response: ImagesResponse) -> None:
        say("h3", "Nearest to the prompt")
        with box("neighbours wide-row"):
            for hit in response.images[0].neighbours[:_SHOWN_NEIGHBOURS] if response.images else []:
                image(thumbnail_source(response.database, hit.id), hit_alt(hit))
        say("h3", "Generated from them")
        with box("grid small"):
            for number, made in enumerate(response.images):
                shown = Shown(job=job, number=number, response=response)
                label = f"Details of image {number + 1} of {response.database.name}, seed {made.seed}"
                with box("card"), press(label, lambda shown=shown: self._on_open(shown), "result"):
                    image(shown.source, f"Generated image {number + 1}, seed {made.seed}")
