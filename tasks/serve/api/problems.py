"""Errors as responses: RFC 9457 problem details, and OpenAI's shape on the routes that follow OpenAI."""

import dataclasses
import http
import json
import math
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, Self

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from infra import logs
from infra.errors import InputError, KNNDiffusionError, NotFoundError, TransientError
from model.errors import ModelError
from tasks.serve.service.errors import (
    DatabaseUnavailableError,
    JobCancelledError,
    QueueFullError,
    ServiceClosedError,
    UnknownDatabaseError,
    public_message,
)

PROBLEM_JSON = "application/problem+json"
OPENAI_ROUTES = ("/v1/images/", "/v1/models")
CLIENT_GONE = 499
"""Status in the metrics of a request whose client disconnected."""
RETRY_S = 5
"""Time to wait when a restart or the registry's return is expected."""
_ERRORS: tuple[tuple[type[Exception], int, str], ...] = (
    (QueueFullError, 429, "queue_full"),
    (ServiceClosedError, 503, "closing"),
    (JobCancelledError, 409, "cancelled"),
    (UnknownDatabaseError, 404, "unknown_database"),
    (NotFoundError, 404, "not_found"),
    (TransientError, 503, "unavailable"),
    (DatabaseUnavailableError, 503, "database_unavailable"),
    (InputError, 422, "invalid_input"),
    (ModelError, 422, "invalid_input"),
)
"""Status and code of each error that a client can react to. Others are faults of the service."""
_ROUTING = {404: "there is no such route; see /openapi.json", 405: "the route has no such method; see /openapi.json"}
_log = logs.get("api")


class ProblemDetails(BaseModel):
    """An error, as RFC 9457 describes it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    errors: list[dict[str, str]] = []
    id: str | None = None


class OpenAIError(BaseModel):
    """An error, as OpenAI's clients expect it."""

    error: dict[str, str | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """An error to report.

    Attributes:
        status: HTTP status.
        code: Stable name for programs.
        detail: One line for people.
        errors: Invalid fields: ``pointer`` to the field, and ``detail``.
        id: Name of the log entry of an unexpected error.
        headers: Additional headers.
    """

    status: int
    code: str
    detail: str
    errors: tuple[dict[str, str], ...] = ()
    id: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def response(self, path: str) -> Response:
        """Return the response to a request of ``path``."""
        if path.startswith(OPENAI_ROUTES):
            return self._openai_response()
        title = phrase_of(self.status)
        given = {"errors": list(self.errors) or None, "id": self.id}
        body = {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail, "code": self.code}
        content = json.dumps(body | {name: value for name, value in given.items() if value})
        return Response(content, self.status, dict(self.headers), PROBLEM_JSON)

    def _openai_response(self) -> Response:
        """Return the response in OpenAI's shape. OpenAI answers an invalid request with 400."""
        status = 400 if self.status == 422 else self.status
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        field = self.errors[0]["pointer"].removeprefix("#/") if self.errors else None
        message = self.detail + "".join(f"; {error['pointer'][2:]} {error['detail']}" for error in self.errors)
        error = {"message": message, "type": kind, "param": field, "code": self.code}
        return Response(json.dumps({"error": error}), status, dict(self.headers), "application/json")


class ProblemError(Exception):
    """Raised by the API for a request that it refuses."""

    def __init__(self, status: int, code: str, detail: str, **given: Any) -> None:
        """Store the problem; ``given`` are further fields of :class:`Problem`."""
        super().__init__(detail)
        self.problem = Problem(status=status, code=code, detail=detail, **given)

    @classmethod
    def of(cls, error: Exception) -> Self:
        """Return a new exception that reports ``error``, for one that is stored.

        Each raise of a stored exception would add to its traceback, which keeps the request and its body in memory.
        """
        found = problem_of(error)
        return cls(found.status, found.code, found.detail, errors=found.errors, id=found.id, headers=found.headers)


def problem_of(error: Exception) -> Problem:
    """Return how to report an error. An unexpected one is logged with its traceback, and reported by its id."""
    if isinstance(error, ProblemError):
        return error.problem
    if isinstance(error, HTTPException):
        return Problem(
            status=error.status_code,
            code=phrase_of(error.status_code).lower().replace(" ", "_"),
            detail=_ROUTING.get(error.status_code, str(error.detail)),
            headers=error.headers or {},
        )
    if isinstance(error, RequestValidationError):
        return invalid_fields(error.errors())
    for kind, status, code in _ERRORS:
        if isinstance(error, kind):
            return Problem(status=status, code=code, detail=public_message(error), headers=_retry_after(error))
    name = uuid.uuid4().hex[:12]
    _log.error("request failed with id %s: %s", name, error, exc_info=error)
    return Problem(status=500, code="internal", detail=f"the service failed; its log has the id {name}", id=name)


def invalid_fields(errors: Iterable[Mapping[str, Any]]) -> Problem:
    """Return the problem of a body that fails its validation. The values, which may be long, are not repeated."""
    found = [
        {
            "pointer": "#" + "".join(f"/{part}" for part in error["loc"] if part != "body"),
            "detail": error["msg"].removeprefix("Value error, "),
        }
        for error in errors
    ]
    return Problem(status=422, code="invalid_request", detail="the request is invalid", errors=tuple(found[:20]))


def is_expected(error: object) -> bool:
    """Return True if the message of ``error`` is for the client: not a fault of the service."""
    return isinstance(error, tuple(kind for kind, _, _ in _ERRORS))


def phrase_of(status: int) -> str:
    """Return the phrase of an HTTP status, also of nginx's for a client that is gone."""
    return "Client Closed Request" if status == CLIENT_GONE else http.HTTPStatus(status).phrase


def add_handlers(app: FastAPI) -> None:
    """Make ``app`` report expected errors as problems. ``Observed`` reports all other errors."""

    async def report(request: Request, error: Exception) -> Response:
        return problem_of(error).response(request.url.path)

    for kind in (ProblemError, HTTPException, RequestValidationError, KNNDiffusionError, ModelError):
        app.add_exception_handler(kind, report)


def _retry_after(error: Exception) -> dict[str, str]:
    """Return the header that tells a client when to retry, if a retry can help."""
    if isinstance(error, QueueFullError):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if isinstance(error, ServiceClosedError | TransientError):
        return {"Retry-After": str(RETRY_S)}
    return {}
