"""The application: the engine behind HTTP."""

import asyncio
import importlib.metadata
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

from infra.settings import Settings
from tasks.serve.api import openai_routes, problems, routes, telemetry
from tasks.serve.api.config import ApiConfig
from tasks.serve.api.guard import Guarded
from tasks.serve.api.limits import Bounded
from tasks.serve.api.metrics import Observed
from tasks.serve.api.swaps import Swaps
from tasks.serve.service.config import ServiceConfig

if TYPE_CHECKING:
    from tasks.serve.service.engine import Engine

_PAGE = """<!doctype html>
<html lang="en"><title>knn-diffusion</title>
<h1>knn-diffusion</h1>
<p>The service runs. Its routes are described in <a href="/openapi.json">openapi.json</a>.
<p>Install the extra <code>web</code> for a page to search, generate and edit.
"""


def create_app(
    settings: Settings,
    *,
    config: ServiceConfig | None = None,
    engine: "Engine | None" = None,
    api: ApiConfig | None = None,
    page: bool | None = None,
) -> FastAPI:
    """Return the application. Its lifespan starts the engine, and closes it unless :func:`server.run` has done so.

    Args:
        settings: Root, registry and cache.
        config: Model, databases and limits of the engine. Default: those of :class:`ServiceConfig`.
        engine: An open engine. Default: one is opened, which loads the model and the databases.
        api: Access and limits of the API. Default: for requests from this machine.
        page: Serve the playground at ``/``. Default: if the extra ``web`` is installed.

    Raises:
        KNNDiffusionError: The model or a database cannot be opened.
        ConfigError: An extra is required, but not installed.
    """
    api = api or ApiConfig()
    opened = engine or _open_engine(config or ServiceConfig(), settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        opened.start()
        yield
        if not app.state.closed:
            await asyncio.to_thread(opened.close, api.drain_s)
        await asyncio.to_thread(end_traces)

    app = FastAPI(
        title="knn-diffusion",
        description="Search, generate and edit with databases of images that are swapped while the service runs.",
        version=importlib.metadata.version("knn-diffusion"),
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.engine, app.state.config, app.state.closed = opened, api, False
    app.state.swaps = Swaps(opened)
    app.include_router(routes.probes)
    app.include_router(routes.router)
    app.include_router(openai_routes.router)
    problems.add_handlers(app)
    app.add_middleware(Bounded, config=api)
    app.add_middleware(Guarded, config=api)
    app.add_middleware(Observed, metrics=opened.metrics)  # the last one added is the outermost
    end_traces = telemetry.instrument(app)
    _add_page(app, opened, settings, page)
    return app


def _open_engine(config: ServiceConfig, settings: Settings) -> "Engine":
    """Load the model and the databases."""
    from tasks.serve.service.engine import Engine  # imports torch

    return Engine.open(config, settings)


def _add_page(app: FastAPI, engine: "Engine", settings: Settings, wanted: bool | None) -> None:
    """Serve the playground at ``/``, or a short page if it is not wanted or not installed."""
    installed = importlib.util.find_spec("nicegui") is not None
    if installed if wanted is None else wanted:
        from tasks.serve.playground.page import mount

        mount(app, engine, settings)
        return

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return HTMLResponse(_PAGE, headers={"Content-Security-Policy": "default-src 'none'"})
