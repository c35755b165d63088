"""Requests of the page and their results. In a comparison, a database that fails does not hide the others."""

import logging
import math
from collections.abc import Mapping
from typing import Protocol, TypeAlias

from PIL import Image
from pydantic import ValidationError

from infra.errors import KNNDiffusionError
from model.errors import ModelError
from tasks.serve.playground.state import PageState, problem_of
from tasks.serve.service.errors import JobCancelledError, QueueFullError, public_message
from tasks.serve.service.jobs import Job
from tasks.serve.service.requests import Request

Results: TypeAlias = dict[str, Job | str]
"""Finished jobs by title, and the message of each that failed."""
_LOG = logging.getLogger("knn_diffusion.playground")


class Submits(Protocol):
    """Anything that queues requests, as the engine."""

    def submit(self, request: Request, *, keep: bool = False) -> Job:
        """Queue a request; ``keep`` its job for look-up. Raises ``KNNDiffusionError`` if it is refused."""
        ...


def submit(engine: Submits, state: PageState, image: Image.Image | None, seed: int) -> dict[str, Job]:
    """Queue the requests of a tab, and return their jobs by title. The job of a refused request has failed.

    Raises:
        KNNDiffusionError: Something is missing, or no request is accepted.
        ValidationError: A request is invalid.
    """
    _check(state, image)
    jobs: dict[str, Job] = {}
    refused: list[KNNDiffusionError] = []
    for title, request in state.requests(image, seed).items():
        try:
            jobs[title] = engine.submit(request, keep=True)
        except KNNDiffusionError as error:
            refused.append(error)
            jobs[title] = Job(request)
            jobs[title].fail(error)
    if len(refused) == len(jobs):
        raise refused[0]
    return jobs


def collect(jobs: Mapping[str, Job]) -> Results:
    """Return the results of finished jobs. Raises the first error if all of them failed."""
    failed = {title: error for title, job in jobs.items() if (error := job.future.exception()) is not None}
    if len(failed) == len(jobs):
        raise next(iter(failed.values()))
    return {**jobs, **{title: explain(error) for title, error in failed.items()}}


def explain(error: BaseException) -> str:
    """Return the message of a failed request. An unexpected error is logged."""
    match error:
        case ValidationError():
            return problem_of(error)
        case QueueFullError():
            return f"The service is busy. Try again in {max(1, math.ceil(error.retry_after_s))} s."
        case JobCancelledError():
            return "Cancelled."
        case KNNDiffusionError() | ModelError():
            return public_message(error)
        case _:
            _LOG.error("a request of the playground failed", exc_info=error)
            return "The request failed. The log of the service has the reason."


def _check(state: PageState, image: Image.Image | None) -> None:
    if state.tab == "compare" and len(state.databases) < 2:
        raise KNNDiffusionError("Choose two to four databases to compare.")
    if state.tab == "edit" and image is None:
        raise KNNDiffusionError("Add an image to edit: drop it, paste it, or use the button in the prompt.")
    if state.tab == "edit" and not state.text.strip():
        raise KNNDiffusionError("Describe the edit in the box.")
    if state.tab != "search" and image is None and not state.text.strip():
        raise KNNDiffusionError("Describe an image first, or add one.")
