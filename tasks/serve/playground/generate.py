"""Generated images: a grid, or a strip of an interpolation, each with its neighbours and its similarity."""

from collections.abc import Callable
from typing import Any

from tasks.serve.playground.details import Shown, prompt_text
from tasks.serve.playground.elements import box, hit_alt, image, press, say, score_text, served_text, thumbnail_source
from tasks.serve.service.jobs import Job
from tasks.serve.service.requests import GenerateRequest
from tasks.serve.service.responses import ImagesResponse

_SHOWN_NEIGHBOURS = 6


class GeneratedImages:
    """The images of one job."""

    def __init__(self, on_open: Callable[[Shown], Any]) -> None:
        """Add the empty area. ``on_open`` shows the details of an image."""
        self._on_open = on_open
        self.area = box("results")
        with self.area:
            say("p", "Describe an image, and the generator draws it from the nearest stored images.", "empty")

    def show(self, job: Job, response: ImagesResponse) -> None:
        """Show a response instead of the earlier one."""
        request = job.request
        strip = isinstance(request, GenerateRequest) and request.interpolate_to is not None
        self.area.clear()
        with self.area:
            with box("results-head"):
                say("h2", f"Generated with {served_text(response.database)}")
                if strip and isinstance(request, GenerateRequest):
                    say("p", f"From “{prompt_text(request)}” to “{request.interpolate_to}”", "muted")
            with box("strip" if strip else "grid large"):
                for number in range(len(response.images)):
                    generated_card(Shown(job=job, number=number, response=response), self._on_open)


def generated_card(shown: Shown, on_open: Callable[[Shown], Any]) -> None:
    """Add an image. A click shows its details."""
    made, database = shown.image, shown.response.database
    with box("card made"):
        with press(f"Details of image {shown.number + 1}, seed {made.seed}", lambda: on_open(shown), "result"):
            image(shown.source, f"Generated image {shown.number + 1}, seed {made.seed}")
        with box("caption"):
            say("span", f"Seed {made.seed}")
            if made.nearest is not None:
                say("span", f"Nearest stored: {score_text(made.nearest.score)}", "muted")
        with box("neighbours"):
            for hit in made.neighbours[:_SHOWN_NEIGHBOURS]:
                image(thumbnail_source(database, hit.id), hit_alt(hit))
