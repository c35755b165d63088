"""An engine in memory: the methods of the service's engine, without networks, databases or a registry."""

import colorsys
import hashlib
import io
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from infra.errors import InputError, NotFoundError
from tasks.serve.service.errors import QueueFullError, ServiceClosedError, UnknownDatabaseError
from tasks.serve.service.jobs import Job, JobTable
from tasks.serve.service.metrics import Metrics
from tasks.serve.service.requests import EditRequest, GenerateRequest, Request, SearchRequest
from tasks.serve.service.responses import (
    Hit,
    ImagesResponse,
    MadeImage,
    SearchResponse,
    ServedDatabase,
    ServedVersion,
    ServiceInfo,
)

MODEL = "models:/knn-diffusion/1"
ENCODER = "sticker-clip"
DEFAULTS = {"steps": 6, "guidance": 3.0, "candidates": 2, "k": 3, "start": "neighbour", "strength": 0.8}
LIMITS = {"n": 16, "k": 500, "prompt_characters": 2_000, "pixels": 16_000_000, "queue": 8}


class FakeEngine:
    """An engine that draws discs: the same prompt, seed and database give the same image.

    Attributes:
        gate: Jobs run while it is set. Clear it to hold running and queued jobs.
        fault: Error that every following job raises. None: jobs succeed.
        submitted: All jobs, oldest first.
        requests: Their requests as submitted; a finished search drops its image.
        drains: Drain times that ``close`` was called with.
    """

    def __init__(
        self,
        *names: str,
        capacity: int = 8,
        step_s: float = 0.002,
        warm: bool = True,
        side_px: int = 64,
        rows: int = 1_000,
    ) -> None:
        """Create an engine with the databases ``names``, by default birds, fish and flowers."""
        self.gate = threading.Event()
        self.gate.set()
        self.fault: BaseException | None = None
        self.drains: list[float] = []
        self.edit_methods = ["flow", "local", "sdedit"]
        self.jobs = JobTable()
        self.submitted: list[Job] = []
        self.requests: list[Request] = []
        self.metrics = Metrics()
        self.ready = False
        self._capacity, self._step_s, self._warm, self._side_px, self._rows = capacity, step_s, warm, side_px, rows
        self._closed = False
        self._problems: list[str] = []
        self._served = {
            name: ServedVersion(name=name, version=1, rows=rows, generation=0) for name in names or _DEFAULT_NAMES
        }
        self._lanes = {"search": deque[tuple[Job, ServedVersion]](), "image": deque[tuple[Job, ServedVersion]]()}
        self._running: set[str] = set()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, args=(lane,), daemon=True) for lane in self._lanes]

    def start(self) -> None:
        """Start one thread per lane. The engine is ready at once, unless ``warm`` is False."""
        for thread in self._threads:
            thread.start()
        self.ready = self._warm

    def close(self, drain_s: float) -> None:
        """Finish accepted jobs within ``drain_s``; fail the others."""
        self.drains.append(drain_s)
        self.ready, self._closed = False, True
        deadline = time.monotonic() + drain_s
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running and not any(self._lanes.values()), timeout=drain_s)
            for lane in self._lanes.values():
                while lane:
                    lane.popleft()[0].fail(ServiceClosedError("the service is shutting down; try another replica"))
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def problems(self) -> list[str]:
        """Return the problems that a test set with :meth:`report`, and the reasons not to be ready."""
        if self._closed:
            return [*self._problems, "the service is shutting down"]
        return [*self._problems, *([] if self.ready else ["the first image is not generated yet"])]

    def report(self, *problems: str) -> None:
        """Set the problems."""
        self._problems = [*problems]

    def submit(self, request: Request, keep: bool = False) -> Job:
        """Queue a request. Raises the errors of the real engine."""
        if self._closed:
            raise ServiceClosedError("the service is shutting down; try another replica")
        served = self._version(request.database)
        if isinstance(request, SearchRequest) and request.row is not None and request.row >= self._rows:
            raise InputError(f"row does not exist: {request.row}; {served.name} has rows 0 to {self._rows - 1}")
        lane = self._lanes["search" if isinstance(request, SearchRequest) else "image"]
        with self._changed:
            if len(lane) >= self._capacity:
                raise QueueFullError(f"the queue is full: {self._capacity} requests; retry later", retry_after_s=2.5)
            job = Job(request, self._position)
            self.submitted.append(job)
            self.requests.append(request)
            if keep:
                self.jobs.add(job)
            lane.append((job, served))
            self._changed.notify_all()
        return job

    def databases(self) -> list[ServedDatabase]:
        """Return the served databases, and one that is registered but not served."""
        served = [
            ServedDatabase(
                name=one.name,
                served=one,
                champion=one.version,
                versions=[1, 2],
                aliases={"champion": one.version or 1},
                recall_at_10_image=0.995,
                recall_at_10_text=0.98,
                created_ms=1_700_000_000_000,
            )
            for one in self._served.values()
        ]
        if "trees" in self._served:
            return served
        return [*served, ServedDatabase(name="trees", served=None, champion=1, versions=[1], aliases={"champion": 1})]

    def swap(self, name: str, version: int | None = None) -> ServedDatabase:
        """Serve another version, which takes one step: the next generation. Versions above 9 do not exist."""
        if self._closed:
            raise ServiceClosedError("the service is shutting down; try another replica")
        time.sleep(self._step_s)
        before = self._served.get(name)
        if before is None and name != "trees":
            raise UnknownDatabaseError(f"database is not served: {name}; served: {', '.join(self._served)}")
        if version is not None and not 1 <= version <= 9:
            raise NotFoundError(f"{name} has no version {version}; versions: 1, 2")
        generation = 0 if before is None else before.generation + 1
        chosen = version or (1 if before is None else before.version)
        self._served[name] = ServedVersion(name=name, version=chosen, rows=self._rows, generation=generation)
        return next(one for one in self.databases() if one.name == name)

    def thumbnail(self, database: str, row: int, side_px: int = 192) -> bytes:
        """Return a WEBP of a stored row. Row 13 was taken down."""
        self._version(database)
        if row == 13 or not 0 <= row < self._rows:
            raise NotFoundError(f"row has no image: {row}; it may have been taken down")
        out = io.BytesIO()
        _disc(f"{database}/{row}", side_px).save(out, "WEBP", quality=70)
        return out.getvalue()

    def info(self) -> ServiceInfo:
        """Return the defaults and limits."""
        return ServiceInfo(
            model=MODEL,
            side_px=self._side_px,
            encoder=ENCODER,
            defaults=DEFAULTS,
            limits=LIMITS | {"queue": self._capacity},
            starts_from_images=True,
            edit_methods=self.edit_methods,
        )

    def _version(self, name: str | None) -> ServedVersion:
        """Return the served version of a database, by default of the first one."""
        chosen = next(iter(self._served)) if name is None else name
        if chosen not in self._served:
            raise UnknownDatabaseError(f"database is not served: {chosen}; served: {', '.join(self._served)}")
        return self._served[chosen]

    def _position(self, job: Job) -> int | None:
        """Return the number of jobs before ``job`` in its lane."""
        with self._changed:
            for lane in self._lanes.values():
                for place, (other, _) in enumerate(lane):
                    if other is job:
                        return place
        return None

    def _work(self, lane: str) -> None:
        """Run the jobs of a lane, one at a time, until the engine is closed."""
        queue = self._lanes[lane]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: queue or self._closed)
                if not queue:
                    return
                job, served = queue.popleft()
                self._running.add(job.id)
            try:
                if job.begin():
                    job.finish(self._response(job, served))
            except BaseException as error:
                job.fail(error)
            finally:
                with self._changed:
                    self._running.discard(job.id)
                    self._changed.notify_all()

    def _response(self, job: Job, served: ServedVersion) -> SearchResponse | ImagesResponse:
        """Return the response of a job, after the time that it takes."""
        request = job.request
        while not self.gate.wait(0.01):
            job.advance(0, 0)  # a cancelled job does not wait for the gate
        if self.fault is not None:
            raise self.fault
        if isinstance(request, SearchRequest):
            hits = _hits(f"{request.text}/{request.row}/{request.negative}", served, self._rows)[: request.k]
            shown = [hit for hit in hits if request.min_score is None or hit.score >= request.min_score]
            settings = request.model_dump(exclude={"image", "database"})
            return SearchResponse(model=MODEL, database=served, encoder=ENCODER, settings=settings, hits=shown)
        return self._images(job, request, served)

    def _images(self, job: Job, request: GenerateRequest | EditRequest, served: ServedVersion) -> ImagesResponse:
        """Return one disc per image of the request."""
        steps = request.steps or DEFAULTS["steps"]
        for step in range(1, int(steps) + 1):
            time.sleep(self._step_s)
            job.advance(step, int(steps))
        seed = secrets.randbits(32) if request.seed is None else request.seed
        kind = "edit" if isinstance(request, EditRequest) else "generate"
        given = request.model_dump(exclude={"image", "database", "n", "seed"}, exclude_none=True)
        settings: dict[str, Any] = DEFAULTS | given | {"seed": seed}
        hits = _hits(str(request.prompt), served, self._rows)[: request.k or 3]
        images = []
        for number in range(request.n):
            key = f"{kind}/{request.prompt}/{seed + number}/{served.name}/{served.generation}"
            region = [[0.25, 0.25], [0.75, 0.25], [0.75, 0.75], [0.25, 0.75]] if kind == "edit" else []
            png = _png(_disc(key, self._side_px), {"database": f"{served.name}/{served.version}", "seed": str(seed)})
            images.append(MadeImage(png=png, seed=seed + number, neighbours=hits, nearest=hits[0], region=region))
        return ImagesResponse(model=MODEL, database=served, kind=kind, settings=settings, images=images)


_DEFAULT_NAMES = ("birds", "fish", "flowers")


def running(make: Callable[[], FakeEngine] = FakeEngine) -> FakeEngine:
    """Return a started engine."""
    engine = make()
    engine.start()
    return engine


def _number(key: str) -> int:
    """Return a number that depends on ``key`` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")


def _hits(key: str, served: ServedVersion, rows: int) -> list[Hit]:
    """Return 500 rows, best first."""
    first = _number(f"{served.name}/{key}") % rows
    names = [(first + 7 * rank) % rows for rank in range(min(500, rows))]
    return [
        Hit(
            id=row,
            rank=rank,
            score=round(0.9 * 0.985**rank, 4),
            url=f"https://images.example/{served.name}/{row}.png",
            key=f"{row:09d}",
            columns={"caption": f"{served.name} {row}", "licence": ("CC0-1.0", "CC-BY-4.0")[row % 2]},
        )
        for rank, row in enumerate(names, start=1)
    ]


def _disc(key: str, side_px: int) -> Image.Image:
    """Return a disc on a white ground, in a colour and size of its own."""
    number = _number(key)
    red, green, blue = colorsys.hls_to_rgb((number % 360) / 360, 0.5, 0.7)
    image = Image.new("RGB", (side_px, side_px), "white")
    edge = side_px * (5 + number // 360 % 20) // 100
    colour = (round(255 * red), round(255 * green), round(255 * blue))
    ImageDraw.Draw(image).ellipse((edge, edge, side_px - edge - 1, side_px - edge - 1), fill=colour)
    return image


def _png(image: Image.Image, texts: dict[str, str]) -> bytes:
    """Return a PNG with text chunks."""
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=chunks)
    return out.getvalue()
