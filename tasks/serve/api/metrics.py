"""Metrics of HTTP requests. Labels are route templates and statuses: never a prompt, a URL or a client."""

import time
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasks.serve.api.problems import CLIENT_GONE, problem_of
from tasks.serve.service.metrics import Metrics

_PROTECTION = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""Headers of every response: other sites neither frame nor embed it."""


class Observed:
    """ASGI middleware, the outermost one: counts requests, adds headers, and reports unexpected errors as problems."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wrap ``app``."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = list(message.get("headers", ()))
                names = {name.lower() for name, _ in given}
                message["headers"] = given + [one for one in _PROTECTION if one[0] not in names]
            await send(message)

        try:
            await self._app(scope, receive, observe)
        except ClientDisconnect:  # nobody reads a response
            status = CLIENT_GONE
        except Exception as error:
            problem = problem_of(error)
            if not status:  # else the response has begun, and the server closes the connection
                await problem.response(scope["path"])(scope, receive, observe)
        finally:
            route = route_of(scope)
            self._metrics.requests.labels(route, str(status or CLIENT_GONE)).inc()
            self._metrics.request_seconds.labels(route).observe(time.perf_counter() - begun)


def route_of(scope: Scope) -> str:
    """Return the template of the route that answered, so that no value of the path becomes a label."""
    route: Any = scope.get("route")
    return getattr(route, "path", None) or "other"


def exposition(metrics: Metrics) -> Response:
    """Return the metrics of the service in Prometheus's text format."""
    return Response(metrics.expose(), media_type=CONTENT_TYPE_LATEST)
