"""The engine: requests become jobs, jobs wait in a lane, a lane runs batches, and a batch answers its jobs.

    submit -> plan -> queue of a lane -> batch -> run -> response

There are three lanes, each with a thread of its own: searches never wait for generation, nor for the evaluation of a
filter over all rows. The thread of the image lane is the only one that runs the generator.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Self

from infra import logs
from infra.errors import InputError, KNNDiffusionError, StageError
from infra.settings import Settings
from model.errors import ModelError
from tasks.serve.service import drawing, searching
from tasks.serve.service.batching import BatchQueue, Ticket
from tasks.serve.service.catalog import Catalog
from tasks.serve.service.checks import MAX_IMAGE_STEPS, MAX_WORD_CHARACTERS
from tasks.serve.service.config import ServiceConfig
from tasks.serve.service.errors import (
    DatabaseUnavailableError,
    JobCancelledError,
    QueueFullError,
    ServiceClosedError,
    UnknownDatabaseError,
    public_message,
)
from tasks.serve.service.jobs import Job, JobTable, Response
from tasks.serve.service.metrics import Metrics
from tasks.serve.service.plans import (
    EditPlan,
    GeneratePlan,
    SearchPlan,
    plan,
    reduced,
    size,
)
from tasks.serve.service.requests import (
    MAX_IMAGES,
    MAX_NEIGHBOURS,
    MAX_PIXELS,
    MAX_PROMPT_CHARACTERS,
    GenerateRequest,
    Request,
    SearchRequest,
)
from tasks.serve.service.responses import ServedDatabase, ServiceInfo
from tasks.serve.service.versions import RegisteredVersions, Versions
from tasks.serve.service.watcher import Watcher

_WARM_UP_PROMPT = "a red heart"
_JOIN_S = 5.0
_EXPIRY_S = 1.0
"""Time between two looks at the tickets that have waited too long."""


class Engine:
    """The service without HTTP. Thread-safe.

    Attributes:
        jobs: The latest jobs that were submitted with ``keep``, by id.
        metrics: Prometheus metrics.
    """

    def __init__(self, versions: Versions, config: ServiceConfig) -> None:
        """Open the model and the databases. Raises as :class:`Catalog`."""
        self.config, self.metrics, self.jobs = config, Metrics(), JobTable(config.kept_jobs)
        self._catalog = Catalog(versions, config, self.metrics)
        self._ended = threading.Event()
        self._watcher = Watcher(self._catalog, config.poll_s, ended=self._ended)
        self._lanes = {
            "search": self._lane("search", config.search_queue, config.search_batch),
            "filter": self._lane("filter", config.search_queue, config.search_batch),
            "image": self._lane("image", config.image_queue, config.images_at_once, config.batch_wait_s),
        }
        for name, lane in self._lanes.items():
            self.metrics.queue_depth.labels(lane=name).set_function(lane.depth)
            self.metrics.in_flight.labels(lane=name).set_function(lane.in_flight)
        self._warm = self._closed = False
        self._warm_up_problem: str | None = None

    @classmethod
    def open(cls, config: ServiceConfig, settings: Settings) -> Self:
        """Open what the config names, in the registry of the settings. Raises ``KNNDiffusionError``, ``ModelError``."""
        return cls(RegisteredVersions(settings, device=config.device, trust=config.trust), config)

    def start(self) -> None:
        """Start the threads, and warm up in the background. :attr:`ready` becomes True after it."""
        for lane in self._lanes.values():
            lane.start()
        self._watcher.start()
        threading.Thread(target=self._expire, name="queue watcher", daemon=True).start()
        threading.Thread(target=self._warm_up, name="warm-up", daemon=True).start()

    def close(self, drain_s: float) -> None:
        """Stop accepting requests, wait at most ``drain_s`` for the accepted ones, and fail the rest."""
        self._closed = True
        self._ended.set()
        deadline = time.monotonic() + drain_s
        closing = [threading.Thread(target=lane.close, args=(deadline,)) for lane in self._lanes.values()]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(drain_s + _JOIN_S)

    @property
    def ready(self) -> bool:
        """True after the warm-up, until :meth:`close`."""
        return self._warm and not self._closed

    def problems(self) -> list[str]:
        """Return what is wrong at present, without paths: versions that do not open, a registry that is away, …."""
        own = [] if self._warm_up_problem is None else [self._warm_up_problem]
        return [*own, *self._watcher.problems()]

    def submit(self, request: Request, keep: bool = False) -> Job:
        """Queue a request, and return its job. With ``keep``, :attr:`jobs` has it too.

        Raises:
            QueueFullError: Too many requests are waiting.
            UnknownDatabaseError: The database is not served.
            ServiceClosedError: The service is shutting down.
            InputError: The model or the database does not support the request.
        """
        try:
            if self._closed:
                raise ServiceClosedError("the service is shutting down; try again later")
            opened, model = self._catalog.get(request.database), self._catalog.model
            request = reduced(request, opened)
            planned = plan(request, opened, model)
            lane = self._lanes[_lane_of(request)]
            job = Job(request, lane.position)
            lane.put(Ticket(job=job, plan=planned, key=planned.key, size=size(planned)))
        except KNNDiffusionError as error:
            self.metrics.rejected.labels(reason=_reason(error)).inc()
            raise
        return self.jobs.add(job) if keep else job

    def databases(self) -> list[ServedDatabase]:
        """Return the served databases, and then the registered ones that could be served."""
        return self._catalog.databases()

    def swap(self, name: str, version: int | None = None) -> ServedDatabase:
        """Open a version of a database, by default its champion, and serve it. Slow; see :meth:`Catalog.swap`."""
        if self._closed:
            raise ServiceClosedError("the service is shutting down; try again later")
        return self._catalog.swap(name, version)

    def thumbnail(self, database: str, row: int, side_px: int = 192) -> bytes:
        """Return a stored image as WebP. Raises ``NotFoundError`` for an unknown, hidden or taken-down row."""
        return self._catalog.get(database).thumbnail(row, side_px)

    def info(self) -> ServiceInfo:
        """Return the model, its defaults and the limits of a request."""
        model = self._catalog.model
        return ServiceInfo(
            model=model.name,
            side_px=model.pipeline.side,
            encoder=model.pipeline.identity.name,
            defaults=model.defaults,
            limits={
                "n": MAX_IMAGES,
                "k": MAX_NEIGHBOURS,
                "embedding": model.pipeline.identity.dimension,
                "image_steps": MAX_IMAGE_STEPS,
                "prompt_characters": MAX_PROMPT_CHARACTERS,
                "word_characters": MAX_WORD_CHARACTERS,
                "pixels": MAX_PIXELS,
                "image_queue": self.config.image_queue,
                "search_queue": self.config.search_queue,
            },
            starts_from_images=model.pipeline.starts_from_images,
            edit_methods=model.edit_methods,
        )

    def _lane(self, name: str, capacity: int, batch: int, wait_s: float = 0.0) -> BatchQueue:
        return BatchQueue(
            name, self._run, capacity=capacity, batch=batch, wait_s=wait_s, max_wait_s=self.config.max_wait_s
        )

    def _expire(self) -> None:
        while not self._ended.wait(_EXPIRY_S):
            for lane in self._lanes.values():
                lane.expire()

    def _run(self, tickets: list[Ticket]) -> None:
        """Run a batch and finish its jobs. If a batch fails, its jobs run one by one: only the faulty one fails."""
        tickets = [ticket for ticket in tickets if ticket.job.begin()]
        if not tickets:
            return
        kind, started = tickets[0].plan.kind, time.monotonic()
        for ticket in tickets:
            self.metrics.queue_wait.labels(lane=_lane_of(ticket.job.request)).observe(started - ticket.queued)
        self.metrics.batch_size.labels(kind=kind).observe(len(tickets))
        failed = self._attempt(tickets)
        if failed is not None and len(tickets) > 1:
            for ticket in tickets:
                if not ticket.job.future.done():
                    self._fail(ticket, self._attempt([ticket]))
        elif failed is not None:
            self._fail(tickets[0], failed)
        del failed  # its traceback leads to this frame: a reference cycle, which would keep tensors and versions
        self.metrics.batch_seconds.labels(kind=kind).observe(time.monotonic() - started)

    def _attempt(self, tickets: Sequence[Ticket]) -> Exception | None:
        """Run a batch and answer its jobs. Return the error if it fails."""
        try:
            responses = _responses([ticket.plan for ticket in tickets], _progress_of(tickets))
        except Exception as error:  # whatever fails, the lane must go on
            return error
        for ticket, response in zip(tickets, responses, strict=True):
            ticket.job.finish(response)
        return None

    def _fail(self, ticket: Ticket, error: Exception | None) -> None:
        """Fail a job with an error whose message may be shown to a client."""
        if error is None or isinstance(error, JobCancelledError):
            ticket.job.fail(JobCancelledError("the job was cancelled"))
        elif isinstance(error, InputError):
            ticket.job.fail(InputError(public_message(error)))
        elif isinstance(error, KNNDiffusionError | ModelError):  # requests were checked: it is not the client's fault
            name = ticket.plan.opened.name
            logs.get("serve").warning("a request to %s failed: %s", name, error)
            ticket.job.fail(DatabaseUnavailableError(f"database {name} cannot answer: {public_message(error)}"))
        else:
            logs.get("serve").error("a request failed", exc_info=error)
            ticket.job.fail(StageError(f"the request failed: {type(error).__name__}; see the log of the service"))

    def _warm_up(self) -> None:
        """Search every database and generate an image with the default settings. Retry until it succeeds."""
        while not self._ended.is_set():
            try:
                self._run_warm_up()
            except (KNNDiffusionError, ModelError) as error:
                self._warm_up_problem = f"the warm-up failed: {public_message(error)}"
                logs.get("serve").error("the warm-up failed: %s", error)
            else:
                self._warm_up_problem, self._warm = None, True
                return
            self._ended.wait(self.config.poll_s)

    def _run_warm_up(self) -> None:
        names = list(self._catalog.entries)
        jobs = [self.submit(SearchRequest(text=_WARM_UP_PROMPT, database=name)) for name in names]
        jobs.append(self.submit(GenerateRequest(prompt=_WARM_UP_PROMPT, seed=0)))
        for job in jobs:
            job.future.result()


def _lane_of(request: Request) -> str:
    if not isinstance(request, SearchRequest):
        return "image"
    return "search" if request.where is None else "filter"


def _responses(
    plans: Sequence[SearchPlan | GeneratePlan | EditPlan], on_step: Callable[[int, int], None]
) -> Sequence[Response]:
    """Run plans with equal keys."""
    if isinstance(plans[0], SearchPlan):
        return searching.search(plans)  # type: ignore[arg-type]
    if isinstance(plans[0], GeneratePlan):
        return drawing.generate(plans, on_step)  # type: ignore[arg-type]
    return drawing.edit(plans, on_step)  # type: ignore[arg-type]


def _progress_of(tickets: Sequence[Ticket]) -> Callable[[int, int], None]:
    """Return a callback that records the progress of each job, and stops the batch once no job needs it."""

    def on_step(step: int, steps: int) -> None:
        for ticket in tickets:
            try:
                ticket.job.advance(step, steps)
            except JobCancelledError:
                ticket.job.fail(JobCancelledError("the job was cancelled"))
        if all(ticket.job.future.done() for ticket in tickets):
            raise JobCancelledError("the job was cancelled")

    return on_step


def _reason(error: KNNDiffusionError) -> str:
    match error:
        case QueueFullError():
            return "queue_full"
        case ServiceClosedError():
            return "closed"
        case UnknownDatabaseError():
            return "unknown_database"
        case InputError():
            return "invalid"
        case _:
            return "other"
