"""Limits on requests: how many are in progress, the size of a body, the time to send it, and where it is decoded."""

import asyncio
import dataclasses
import threading
from collections import deque
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
_WAITING = 8 * DECODERS
"""Images that wait for a decoder. Each is in memory."""
MAX_SWAP_BYTES = 64 * 1024
_INLINE_BYTES = 16_384
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})
_decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
_decoder_places = threading.BoundedSemaphore(DECODERS + _WAITING)


@dataclasses.dataclass(slots=True)
class _Body:
    """Body of a request: the messages that the application has not received, and the size of all in bytes."""

    messages: deque[Message] = dataclasses.field(default_factory=deque)
    size: int = 0


class Bounded:
    """ASGI middleware that limits the requests in progress, and reads a body before the application sees the request.

    Bytes are counted as they arrive, because a chunked body does not announce its length.
    """

    def __init__(self, app: ASGIApp, config: ApiConfig) -> None:
        """Wrap ``app``."""
        self._app, self._config = app, config
        self._running = self._held_bytes = 0

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
        """Handle one request, and count its body until the response is sent."""
        if scope["method"] in _BODILESS:
            await self._app(scope, receive, send)
            return
        body = _Body()
        try:
            await self._answer(body, scope, receive, send)
        finally:
            self._held_bytes -= body.size

    async def _answer(self, body: _Body, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then call the application, unless the client is gone."""
        try:
            is_complete = await self._read(body, scope, receive)
        except ProblemError as error:
            await error.problem.response(scope["path"])(scope, receive, send)
            return

        async def replay() -> Message:
            return body.messages.popleft() if body.messages else await receive()

        if is_complete:
            await self._app(scope, replay, send)

    async def _read(self, body: _Body, scope: Scope, receive: Receive) -> bool:
        """Read the body. Return False if the client disconnects. Raises ``ProblemError``."""
        limit = self._config.max_body_bytes
        if scope["path"].endswith("/swap"):
            limit = min(limit, MAX_SWAP_BYTES)
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and int(announced[:20]) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                while not body.messages or body.messages[-1].get("more_body", False):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    body.messages.append(message)
                    size = len(message.get("body", b""))
                    body.size += size
                    self._held_bytes += size
                    if body.size > limit:
                        raise _too_large(limit)
                    if self._held_bytes > self._config.max_bodies_bytes:
                        raise _too_many("bodies are in memory")
        except TimeoutError:
            detail = f"the body did not arrive within {self._config.body_timeout_s:g} s"
            raise ProblemError(408, "body_timeout", detail, headers={"Connection": "close"}) from None
        return True


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
    """Return the result of ``call``, which may decode an image, without blocking the event loop.

    Raises ``ProblemError`` (429) if too many images wait.
    """
    if not _decoder_places.acquire(blocking=False):
        raise _too_many("images are waiting to be decoded")
    decoding = _decoders.submit(call)
    decoding.add_done_callback(lambda _: _decoder_places.release())
    return await asyncio.wrap_future(decoding)


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
