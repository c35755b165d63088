"""Limits on requests: how many are in progress, the size of a body, the time to send it, and where it is decoded."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasks.serve.api.config import ApiConfig
from tasks.serve.api.guard import PROBES
from tasks.serve.api.problems import RETRY_S, ProblemError, invalid_fields

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
DECODERS = 4
"""Images that are decoded at the same time. Each takes up to 200 MB."""
_INLINE_BYTES = 16_384
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})
_decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")


class Bounded:
    """ASGI middleware that limits the requests in progress, and reads a body before the application sees the request.

    Bytes are counted as they arrive, because a chunked body does not announce its length.
    """

    def __init__(self, app: ASGIApp, config: ApiConfig) -> None:
        """Wrap ``app``."""
        self._app, self._config = app, config
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        if self._running >= self._config.max_requests:
            await _too_many("requests are in progress").problem.response(scope["path"])(scope, receive, send)
            return
        self._running += 1
        try:
            await self._handle(scope, receive, send)
        finally:
            self._running -= 1

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then call the application."""
        if scope["method"] in _BODILESS:
            await self._app(scope, receive, send)
            return
        try:
            messages = await self._messages(scope, receive)
        except ProblemError as error:
            await error.problem.response(scope["path"])(scope, receive, send)
            return
        if messages is None:  # the client is gone
            return
        rest = iter(messages)

        async def replay() -> Message:
            message = next(rest, None)
            return await receive() if message is None else message

        await self._app(scope, replay, send)

    async def _messages(self, scope: Scope, receive: Receive) -> list[Message] | None:
        """Return the messages of the body, or None if the client disconnects. Raises ``ProblemError``."""
        limit, size = self._config.max_body_bytes, 0
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and int(announced[:20]) > limit:
            raise _too_large(limit)
        messages: list[Message] = []
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                while not messages or messages[-1].get("more_body", False):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(message.get("body", b""))
                    if size > limit:
                        raise _too_large(limit)
                    messages.append(message)
        except TimeoutError:
            detail = f"the body did not arrive within {self._config.body_timeout_s:g} s"
            raise ProblemError(408, "body_timeout", detail, headers={"Connection": "close"}) from None
        return messages


async def read_json(request: Request, parse: Callable[[Any], T]) -> T:
    """Return ``parse`` of the JSON body. Bodies that are long or have an image are parsed in a thread."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ProblemError(415, "unsupported_media_type", "the body is not JSON; send Content-Type: application/json")
    body = await request.body()
    if len(body) <= _INLINE_BYTES:
        value = _from_json(body)
        if not (isinstance(value, dict) and value.get("image") is not None):
            return parse(value)
    return await in_decoder(lambda: parse(_from_json(body)))


async def in_decoder(call: Callable[[], T]) -> T:
    """Return the result of ``call``, which may decode an image, without blocking the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_decoders, call)


def validated(model: type[M], value: Any) -> M:
    """Return ``value`` as a request. Raises ``ProblemError`` (422) that names the invalid fields."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problem = invalid_fields(error.errors(include_url=False, include_context=False, include_input=False))
        raise ProblemError(problem.status, problem.code, problem.detail, errors=problem.errors) from None


def _from_json(body: bytes) -> Any:
    """Return the value of a JSON body. Raises ``ProblemError`` (400)."""
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError:  # its message quotes the body
        raise ProblemError(400, "malformed_json", "the body is not valid JSON; check its syntax") from None


def _too_many(what: str) -> ProblemError:
    """Return the error of a request that the service has no room for. Its body is not read."""
    headers = {"Retry-After": str(RETRY_S), "Connection": "close"}
    return ProblemError(429, "queue_full", f"too many {what}; try again later", headers=headers)


def _too_large(limit: int) -> ProblemError:
    """Return the error of a body above the limit. The connection is closed, because the rest is not read."""
    detail = f"the body is too large; the limit is {limit:,} bytes"
    return ProblemError(413, "body_too_large", detail, headers={"Connection": "close"})
