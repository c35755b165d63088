"""Jobs: one request on its way through the queue, its progress, and its response."""

import dataclasses
import itertools
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, TypeAlias

from infra.errors import NotFoundError
from tasks.serve.service.errors import JobCancelledError
from tasks.serve.service.requests import Request, SearchRequest
from tasks.serve.service.responses import ImagesResponse, SearchResponse

State: TypeAlias = Literal["queued", "running", "done", "failed", "cancelled"]
Response: TypeAlias = SearchResponse | ImagesResponse


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """State of a job at one moment.

    Attributes:
        state: "queued", "running", "done", "failed" or "cancelled".
        position: Number of jobs before it in the queue; None if it is not queued.
        step: Finished steps.
        steps: Total steps; 0 if unknown.
        error: Message of a failed job, for the user.
    """

    state: State
    position: int | None = None
    step: int = 0
    steps: int = 0
    error: str | None = None


class Job:
    """A submitted request. Thread-safe.

    Attributes:
        id: Random name of the job.
        request: The request. A finished search has lost its image and its embedding.
        future: The response, or its error. A cancelled job raises ``JobCancelledError``.
    """

    def __init__(self, request: Request, position: Callable[["Job"], int | None] = lambda job: None) -> None:
        """Create a queued job. ``position`` returns the number of jobs before it."""
        self.id = uuid.uuid4().hex
        self.request = request
        self.future: Future[Response] = Future()
        self.created = time.monotonic()
        self._position = position
        self._lock = threading.Lock()
        self._running = self._cancelled = False
        self._step = self._steps = 0

    @property
    def cancelled(self) -> bool:
        """True after :meth:`cancel`. The engine checks it between steps."""
        return self._cancelled

    def cancel(self) -> None:
        """Cancel the job: at once if it is queued, else before the next step. No effect on a finished one."""
        with self._lock:
            self._cancelled = not self.future.done()
            if self._cancelled and not self._running:
                self._drop_inputs()
                self.future.set_exception(JobCancelledError("the job was cancelled"))

    def begin(self) -> bool:
        """Mark the job as running. Return False if it was cancelled."""
        with self._lock:
            self._running = not self._cancelled
            return self._running

    def advance(self, step: int, steps: int) -> None:
        """Record progress. Raises ``JobCancelledError`` if the job was cancelled."""
        self._step, self._steps = step, steps
        if self._cancelled:
            raise JobCancelledError("the job was cancelled")

    def finish(self, response: Response) -> None:
        """Set the response, unless the job is already finished."""
        with self._lock:
            if not self.future.done():
                self._drop_inputs()
                self.future.set_result(response)

    def fail(self, error: BaseException) -> None:
        """Set the error, unless the job is already finished.

        The error loses its traceback and causes: their frames would keep tensors and versions as long as the job.
        """
        error.__cause__ = error.__context__ = error.__traceback__ = None
        with self._lock:
            if not self.future.done():
                self._drop_inputs()
                self.future.set_exception(error)

    def _drop_inputs(self) -> None:
        """Drop image and embedding of a search. Nothing reads them again, and a kept job would keep them."""
        if isinstance(self.request, SearchRequest):
            self.request = self.request.model_copy(update={"image": None, "embedding": None})

    def status(self) -> JobStatus:
        """Return the state, the position in the queue and the progress."""
        progress: dict[str, Any] = {"step": self._step, "steps": self._steps}
        if not self.future.done():
            if self._running:
                return JobStatus(state="running", **progress)
            return JobStatus(state="queued", position=self._position(self), **progress)
        error = self.future.exception()
        if error is None:
            return JobStatus(state="done", **progress)
        if isinstance(error, JobCancelledError):
            return JobStatus(state="cancelled", **progress)
        return JobStatus(state="failed", error=str(error), **progress)


class JobTable:
    """The jobs that a client may ask for: the latest ``size`` searches, generations and edits each. Thread-safe.

    The playground reads the images of the results and of the requests. Those of finished jobs take at most
    ``max_bytes``: the jobs that finished first expire first, but never the last one.
    """

    def __init__(self, size: int = 250, max_bytes: int = 256 * 2**20) -> None:
        """Create an empty table."""
        self._size, self._max_bytes = size, max_bytes
        self._jobs: dict[type, OrderedDict[str, Job]] = {}
        self._bytes: OrderedDict[str, int] = OrderedDict()  # of finished jobs with images, as they finished
        self._lock = threading.Lock()

    def add(self, job: Job) -> Job:
        """Add a job, and delete the oldest finished ones of its kind beyond ``size``."""
        with self._lock:
            jobs = self._jobs.setdefault(type(job.request), OrderedDict())
            jobs[job.id] = job
            for name in list(itertools.islice(jobs, max(0, len(jobs) - self._size))):
                if jobs[name].future.done():
                    self._delete(name)
        job.future.add_done_callback(lambda _: self._count(job))
        return job

    def _count(self, job: Job) -> None:
        """Count the bytes of a finished job, and delete others beyond ``max_bytes``."""
        size = _bytes_of(job)
        with self._lock:
            if not size or job.id not in self._jobs[type(job.request)]:
                return
            self._bytes[job.id] = size
            while sum(self._bytes.values()) > self._max_bytes and len(self._bytes) > 1:
                self._delete(next(iter(self._bytes)))

    def _delete(self, name: str) -> None:
        self._bytes.pop(name, None)
        for jobs in self._jobs.values():
            jobs.pop(name, None)

    def get(self, name: str) -> Job:
        """Return a job by id. Raises ``NotFoundError`` if it is unknown or expired."""
        with self._lock:
            for jobs in self._jobs.values():
                if name in jobs:
                    return jobs[name]
        raise NotFoundError("there is no such job; it may have expired")

    def recent(self) -> list[Job]:
        """Return the jobs, oldest first."""
        with self._lock:
            jobs = [job for jobs in self._jobs.values() for job in jobs.values()]
        return sorted(jobs, key=lambda job: job.created)


def _bytes_of(job: Job) -> int:
    """Return the bytes of the images in the request and the response of a finished job."""
    image = job.request.image
    total = 0 if image is None else image.width * image.height * (1 if image.mode in ("L", "P", "1") else 4)
    if job.future.exception() is None and isinstance(response := job.future.result(), ImagesResponse):
        total += sum(len(made.png) for made in response.images)
    return total
