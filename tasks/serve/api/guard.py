"""Access to the API: API keys, and protection of a loopback service from web pages in the user's browser."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from tasks.serve.api.config import ApiConfig
from tasks.serve.api.problems import Problem

PROBES = frozenset({"/livez", "/readyz"})
"""Routes that need no key: an orchestrator has none."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Guarded:
    """ASGI middleware that refuses requests with a foreign host, from a foreign page, or without a key."""

    def __init__(self, app: ASGIApp, config: ApiConfig) -> None:
        """Wrap ``app``."""
        self._app, self._config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request or the handshake of one WebSocket."""
        problem = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if problem is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": problem.detail})
        else:
            await problem.response(scope["path"])(scope, receive, send)

    def _refusal(self, scope: Scope) -> Problem | None:
        """Return why a request is refused, or None."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        accepted = self._config.hosts
        if accepted is not None and name_of(host) not in accepted:
            detail = "the Host header names another site; use the address that the service prints"
            return Problem(status=421, code="foreign_host", detail=detail)
        changes = scope["type"] == "websocket" or scope["method"] not in _SAFE
        if changes and is_foreign(headers.get(b"origin"), host):
            detail = "the request comes from a page of another site; call the service from its own page or a program"
            return Problem(status=403, code="foreign_origin", detail=detail)
        if scope["path"] not in PROBES and not self._config.accepts(scope["headers"]):
            return _unauthorised(b"text/html" in headers.get(b"accept", b""))
        return None


def name_of(host: str) -> str:
    """Return the name in a Host header, without the port."""
    return re.sub(r":\d*$", "", host)


def is_foreign(origin: bytes | None, host: str) -> bool:
    """Return True if a browser sent the request from a page of another site. Programs send no Origin."""
    if origin is None:
        return False
    return origin.decode("latin-1").lower().partition("://")[2] != host  # "null", of a sandboxed page, is foreign


def _unauthorised(browser: bool) -> Problem:
    """Return the problem of a request without an accepted key. A browser asks its user for a password."""
    return Problem(
        status=401,
        code="invalid_api_key",
        detail="the API key is missing or unknown; send it as Authorization: Bearer KEY or as X-API-Key",
        headers={"WWW-Authenticate": 'Basic realm="API key as password"' if browser else "Bearer"},
    )
