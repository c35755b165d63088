import pytest
from PIL import Image

from infra.errors import KNNDiffusionError
from tasks.serve.playground.results import collect, submit
from tasks.serve.playground.state import PageState
from tasks.serve.service.errors import DatabaseUnavailableError, JobCancelledError, QueueFullError
from tasks.serve.service.jobs import Job
from tasks.serve.service.requests import Request
from tasks.serve.service.responses import SearchResponse, ServedVersion

IMAGE = Image.new("RGB", (2, 2))
COMPARED = PageState(tab="compare", view="search", text="a", databases=["birds", "fish", "flowers"])


class Queue:
    """A queue that refuses some databases, and finishes no job by itself."""

    def __init__(self, **refused: KNNDiffusionError) -> None:
        self._refused = refused

    def submit(self, request: Request, *, keep: bool = False) -> Job:
        if request.database in self._refused:
            raise self._refused[request.database]
        return Job(request)


def finish(job: Job) -> None:
    served = ServedVersion(name=job.request.database or "", version=1, rows=1, generation=0)
    job.finish(SearchResponse(model="m", settings={}, database=served, encoder="e", hits=[]))


def test_comparison_shows_finished_databases_beside_the_failed_ones() -> None:
    queue = Queue(fish=QueueFullError("full", retry_after_s=1.5))
    jobs = submit(queue, COMPARED, None, 1)
    assert not any(job.cancelled for job in jobs.values())
    finish(jobs["birds"])
    jobs["flowers"].fail(DatabaseUnavailableError("database flowers cannot answer"))
    assert list(collect(jobs).items()) == [
        ("birds", jobs["birds"]),
        ("fish", "The service is busy. Try again in 2 s."),
        ("flowers", "database flowers cannot answer"),
    ]


def test_comparison_fails_if_every_database_fails() -> None:
    full = QueueFullError("full", retry_after_s=1)
    with pytest.raises(QueueFullError):
        submit(Queue(birds=full, fish=full, flowers=full), COMPARED, None, 1)
    jobs = submit(Queue(flowers=full), COMPARED, None, 1)
    for job in jobs.values():
        job.cancel()
    with pytest.raises(JobCancelledError):
        collect(jobs)


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (PageState(tab="compare", text="a", databases=["birds"]), "Choose two to four databases"),
        (PageState(tab="edit", text="a"), "Add an image to edit"),
        (PageState(tab="generate"), "Describe an image first"),
    ],
)
def test_submit_says_what_is_missing(state: PageState, line: str) -> None:
    with pytest.raises(KNNDiffusionError, match=line):
        submit(Queue(), state, None, 1)
    with pytest.raises(KNNDiffusionError, match=r"Describe the edit in the box\."):
        submit(Queue(), PageState(tab="edit"), IMAGE, 1)


def test_submit_generates_from_a_text_and_an_image() -> None:
    (job,) = submit(Queue(), PageState(tab="generate", text="a"), IMAGE, 1).values()
    assert (job.request.prompt, job.request.image) == ("a", IMAGE)  # type: ignore[union-attr]
