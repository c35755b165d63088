"""REST routes: search, generate, edit, databases, jobs, probes and metrics."""

import asyncio
import functools
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path, Request
from starlette.responses import JSONResponse, Response

from infra import logs
from infra.errors import EncoderMismatchError, InputError, IntegrityError, StageError
from model.errors import ModelError
from tasks.serve.api import events, metrics
from tasks.serve.api.config import ApiConfig
from tasks.serve.api.limits import in_decoder, read_json, validated
from tasks.serve.api.problems import CLIENT_GONE, ProblemDetails, ProblemError
from tasks.serve.api.schema import body_of, job_body
from tasks.serve.api.swaps import Swaps
from tasks.serve.api.views import JobView, Readiness, SwapRequest
from tasks.serve.service.errors import public_message
from tasks.serve.service.jobs import Job
from tasks.serve.service.jobs import Response as EngineResponse
from tasks.serve.service.requests import EditRequest, GenerateRequest, SearchRequest
from tasks.serve.service.requests import Request as EngineRequest
from tasks.serve.service.responses import ImagesResponse, SearchResponse, ServedDatabase, ServiceInfo

if TYPE_CHECKING:
    from tasks.serve.service.engine import Engine

Name = Annotated[str, Path(max_length=200)]
KINDS: dict[str, type[EngineRequest]] = {"search": SearchRequest, "generate": GenerateRequest, "edit": EditRequest}
PROBLEM: dict[str, Any] = {"model": ProblemDetails, "content": {"application/problem+json": {}}}
_REFUSED: dict[int | str, dict[str, Any]] = dict.fromkeys((401, 404, 413, 415, 422, 429, 503), PROBLEM)
_log = logs.get("api")

router = APIRouter(prefix="/v1", responses={401: PROBLEM, 422: PROBLEM})
probes = APIRouter()


def engine_of(request: Request) -> "Engine":
    """Return the engine of the application."""
    engine: Engine = request.app.state.engine
    return engine


async def submitted(request: Request, body: EngineRequest, *, keep: bool = False) -> Job:
    """Submit a request. One with an image is submitted in a thread, because the engine reduces the image."""
    submit = functools.partial(engine_of(request).submit, body, keep=keep)
    return submit() if body.image is None else await in_decoder(submit)


async def answered(request: Request, job: Job) -> EngineResponse:
    """Return the response of ``job``, or raise ``ProblemError``. If the client disconnects before, cancel the job."""
    finished = asyncio.wrap_future(job.future)
    finished.add_done_callback(lambda done: done.cancelled() or done.exception())  # read, so that asyncio logs nothing
    gone = asyncio.ensure_future(_disconnection(request))
    try:
        ends: set[asyncio.Future[Any]] = {finished, gone}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not job.future.done():
            job.cancel()
    if not finished.done():
        raise ProblemError(CLIENT_GONE, "client_closed_request", "the client closed the connection")
    return result_of(job)


def result_of(job: Job) -> EngineResponse:
    """Return the response of a finished job. Raises ``ProblemError`` if it failed."""
    error = job.future.exception()
    if isinstance(error, Exception):
        raise ProblemError.of(error)
    return job.future.result()


def named(request: Request, response: EngineResponse) -> Response:
    """Return a response as JSON, with the model and the database version in headers."""
    content = response.model_dump_json()
    return Response(content, media_type="application/json", headers=names_of(request, response))


def names_of(request: Request, response: EngineResponse) -> dict[str, str]:
    """Return the headers that name the model and the database version of a response."""
    version = response.database.version
    return {
        "X-Model": quote(response.model, safe="/:@"),
        "X-Database": quote(response.database.name, safe="/:@"),
        "X-Database-Version": "" if version is None else str(version),
    }


async def _run(request: Request, model: type[EngineRequest]) -> Response:
    """Read a request of the given model, run it, and return its response."""
    job = await submitted(request, await read_json(request, functools.partial(validated, model)))
    return named(request, await answered(request, job))


@router.post("/search", response_model=SearchResponse, responses=_REFUSED, openapi_extra=body_of(SearchRequest))
async def search(request: Request) -> Response:
    """Search for stored images near a text, an image, a stored row or an embedding."""
    return await _run(request, SearchRequest)


@router.post("/generate", response_model=ImagesResponse, responses=_REFUSED, openapi_extra=body_of(GenerateRequest))
async def generate(request: Request) -> Response:
    """Generate images of a prompt with the neighbours of a database."""
    return await _run(request, GenerateRequest)


@router.post("/edit", response_model=ImagesResponse, responses=_REFUSED, openapi_extra=body_of(EditRequest))
async def edit(request: Request) -> Response:
    """Edit an image by a text, without a mask."""
    return await _run(request, EditRequest)


@router.get("/info")
async def info(request: Request) -> ServiceInfo:
    """Return the model, its defaults, and the limits of a request."""
    config: ApiConfig = request.app.state.config
    found = engine_of(request).info()
    return found.model_copy(update={"limits": found.limits | {"body_bytes": config.max_body_bytes}})


@router.get("/databases")
async def databases(request: Request) -> list[ServedDatabase]:
    """List the registered databases, and the versions that are served."""
    return await asyncio.to_thread(engine_of(request).databases)


@router.post("/databases/{name}/swap", responses={404: PROBLEM, 409: PROBLEM, 503: PROBLEM})
async def swap(request: Request, name: Name, body: SwapRequest | None = None) -> ServedDatabase:
    """Serve another version of a database. Running requests finish with the version that they started with."""
    swaps: Swaps = request.app.state.swaps
    version = None if body is None else body.version
    try:
        return await swaps.run(name, version)
    except (EncoderMismatchError, InputError, IntegrityError, ModelError, StageError) as error:
        _log.warning("%s was not swapped: %s", name, error)
        detail = f"the version does not open, and the served one stays: {public_message(error)}"
        raise ProblemError(409, "version_does_not_open", detail) from error


@router.post("/jobs", status_code=202, response_model=JobView, responses=_REFUSED, openapi_extra=job_body(KINDS))
async def create_job(request: Request) -> Response:
    """Queue a request, and return at once. ``kind`` is search, generate or edit."""
    job = await submitted(request, await read_json(request, _job_request), keep=True)
    location = f"/v1/jobs/{job.id}"
    return JSONResponse(JobView.of(job).model_dump(mode="json"), 202, {"Location": location})


@router.get("/jobs/{job}", responses={404: PROBLEM})
async def job_state(request: Request, job: Name) -> JobView:
    """Return the state of a job, its position in the queue, and its progress."""
    return JobView.of(engine_of(request).jobs.get(job))


@router.delete("/jobs/{job}", responses={404: PROBLEM})
async def cancel_job(request: Request, job: Name) -> JobView:
    """Cancel a job: at once if it is queued, else before its next step. No effect on a finished one."""
    found = engine_of(request).jobs.get(job)
    found.cancel()
    return JobView.of(found)


@router.get(
    "/jobs/{job}/result",
    response_model=SearchResponse | ImagesResponse,
    responses={404: PROBLEM, 409: PROBLEM},
)
async def job_result(request: Request, job: Name) -> Response:
    """Return the response of a finished job, or its error."""
    found = engine_of(request).jobs.get(job)
    if not found.future.done():
        raise ProblemError(409, "not_finished", "the job is not finished; follow its events, or ask again later")
    return named(request, result_of(found))


@router.get(
    "/jobs/{job}/events",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {}}}, 404: PROBLEM},
)
async def job_events(request: Request, job: Name) -> Response:
    """Stream the progress of a job as server-sent events, until it is finished."""
    return events.stream(engine_of(request).jobs.get(job))


@probes.get("/livez", response_model=dict[str, str])
async def livez() -> Response:
    """Return 200 while the process answers."""
    return JSONResponse({"status": "ok"})


@probes.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
async def readyz(request: Request) -> Response:
    """Return 200 if requests are accepted: after the warm-up, and until the service closes.

    The problems name databases. If the service has keys, they are sent only to clients with one.
    """
    engine = engine_of(request)
    ready, problems = engine.ready, engine.problems()
    config: ApiConfig = request.app.state.config
    if not config.accepts(request.headers.raw):
        return JSONResponse({"ready": ready}, 200 if ready else 503)
    if not (ready or problems):
        problems = ["the service is warming up or shutting down"]
    return JSONResponse({"ready": ready, "problems": problems}, 200 if ready else 503)


@probes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def prometheus_metrics(request: Request) -> Response:
    """Return the metrics in Prometheus's text format."""
    return metrics.exposition(engine_of(request).metrics)


async def _disconnection(request: Request) -> None:
    """Return when the client disconnects. The body is read already, so the next message says so."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _job_request(value: Any) -> EngineRequest:
    """Return the request in the body of a job."""
    kind = value.pop("kind", None) if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        error = {"pointer": "#/kind", "detail": f"is not one of {', '.join(KINDS)}"}
        raise ProblemError(422, "invalid_request", "the request is invalid", errors=(error,))
    return validated(KINDS[kind], value)
