"""The page at ``/`` of the service.

NiceGUI is imported when the page is mounted: the extra ``web`` is optional. It has one page for each process, so the
app that was mounted last shows it.
"""

import importlib.util
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.datastructures import MutableHeaders
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.errors import ConfigError
from infra.settings import Settings
from tasks.serve.playground.images import SentImages
from tasks.serve.playground.routes import make_router
from tasks.serve.playground.state import PageState

if TYPE_CHECKING:
    from tasks.serve.playground.view import Context
    from tasks.serve.service.engine import Engine

_RECONNECT_S = 20.0
_POLICY = (
    "default-src 'self'",
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # NiceGUI compiles its templates in the browser
    "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data:",
    "font-src 'self' data:",
    "object-src 'none'",
    "base-uri 'self'",
    "form-action 'self'",
    "frame-ancestors 'none'",
)
HEADERS = {
    "content-security-policy": "; ".join(_POLICY),
    "referrer-policy": "same-origin",  # a link to a source does not reveal the prompt
    "x-content-type-options": "nosniff",
}
"""Headers of the page. They keep the browser from contacting other hosts."""


def mount(app: FastAPI, engine: "Engine", settings: Settings) -> None:
    """Add the playground to an app, after all other routes.

    Args:
        app: The app of the service.
        engine: The engine of the service.
        settings: Where the registry and the flows are, for the list of versions.

    Raises:
        ConfigError: NiceGUI is not installed.
    """
    if importlib.util.find_spec("nicegui") is None:
        raise ConfigError("the playground needs NiceGUI, which is not installed; run pip install 'knn-diffusion[web]'")
    from nicegui import core, ui

    from tasks.serve.playground.view import Context

    context = Context(engine=engine, images=SentImages(), settings=settings)
    app.include_router(make_router(engine, context.images))
    core.app.middleware_stack = None  # another app of this process may have started it
    core.app.user_middleware.clear()
    core.sio.eio.cors_allowed_origins = same_origin  # by default any page may open the websocket
    core.app.config.quasar_config["loadingBar"]["skipHijack"] = True  # the page shows progress of its own
    ui.page("/", title="knn-diffusion", response_timeout=30)(_page_of(context))
    ui.run_with(
        app,
        language="en-US",
        reconnect_timeout=_RECONNECT_S,
        tailwind=False,
        show_welcome_message=False,
    )
    mounted = app.router.routes.pop()
    if not isinstance(mounted, Mount):
        raise TypeError("ui.run_with added no mount")
    app.router.routes.append(_PlaygroundMount("/", app=_Headers(mounted.app), name="playground"))


def _page_of(context: "Context") -> Callable[[Request], Awaitable[None]]:
    from nicegui import ui

    from tasks.serve.playground.view import DARK_COOKIE, View

    async def playground(request: Request) -> None:
        ui.add_head_html('<link rel="stylesheet" href="playground/static/playground.css">')
        ui.add_head_html('<script defer src="playground/static/playground.js"></script>')
        dark = ui.dark_mode({"1": True, "0": False}.get(request.cookies.get(DARK_COOKIE, "")))
        view = View(context, PageState.from_query(request.query_params), dark)
        client = ui.context.client
        await client.connected()
        if client.has_socket_connection:  # a program that only reads the page is dropped instead
            await view.connected()

    return playground


def same_origin(origin: str, environ: dict[str, Any]) -> bool:
    """Return True if a websocket comes from a page of this host: a foreign page must not read it or swap databases."""
    hosts = [environ.get("HTTP_HOST", "")]
    if forwarded := environ.get("HTTP_X_FORWARDED_HOST"):
        hosts.append(forwarded.split(",")[0].strip())
    return origin.partition("://")[2] in hosts


class _PlaygroundMount(Mount):
    """NiceGUI's app for its own paths alone, so that unknown paths get the answer of the service."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in ("", "/", "/favicon.ico") or path.startswith("/_nicegui"):
            return super().matches(scope)
        return Match.NONE, {}


class _Headers:
    """ASGI middleware that adds ``HEADERS``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
