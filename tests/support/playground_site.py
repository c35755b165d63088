"""The playground on an engine in memory, opened in headless Chromium. Importing it skips without the packages."""

import dataclasses
import io
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image
from support.fake_engine import FakeEngine

from infra.settings import Settings
from tasks.serve.service.errors import DatabaseUnavailableError
from tasks.serve.service.jobs import Job
from tasks.serve.service.responses import SearchResponse, ServedVersion

pytest.importorskip("nicegui")
playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
LOADED = """() => [...document.images].every((one) =>
    one.complete || !one.offsetParent || one.getBoundingClientRect().top > innerHeight)"""
DESKTOP = {"width": 1280, "height": 900}


class Engine(FakeEngine):
    """The engine in memory, with hostile columns for one query, and databases that fail."""

    broken: frozenset[str] = frozenset()

    def _response(self, job: Job, served: ServedVersion) -> Any:
        if served.name in self.broken:
            raise DatabaseUnavailableError(f"database {served.name} cannot answer")
        response = super()._response(job, served)
        if isinstance(response, SearchResponse) and getattr(job.request, "text", None) == "hostile":
            changed = {"columns": {"caption": HOSTILE, HOSTILE: "{{ 1 }}"}, "url": "javascript:document.title='hacked'"}
            return response.model_copy(update={"hits": [hit.model_copy(update=changed) for hit in response.hits]})
        return response


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    engine: Engine
    address: str
    shots: Path
    context: Any
    requested: list[str]


@contextmanager
def serving(folder: Path) -> Iterator[Site]:
    """Serve the playground and open a browser inside the block; ``folder`` takes the root and the screenshots."""
    from tasks.serve.playground.page import mount

    root = folder / "root"
    root.mkdir()
    engine = Engine(capacity=4, step_s=0.01)
    engine.start()
    app = FastAPI(docs_url=None, redoc_url=None)
    mount(app, engine, Settings(root=str(root)))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    shots = Path(os.environ.get("PLAYGROUND_SCREENSHOTS") or folder / "screenshots")
    shots.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        context = browser.new_context(viewport=DESKTOP, reduced_motion="reduce", accept_downloads=True)
        context.set_default_timeout(10_000)
        requested: list[str] = []
        context.on("request", lambda request: requested.append(request.url))
        context.on("page", lambda page: page.on("websocket", lambda socket: requested.append(socket.url)))
        yield Site(engine=engine, address=f"http://127.0.0.1:{port}", shots=shots, context=context, requested=requested)
        browser.close()
    server.should_exit = True
    thread.join(10)
    engine.close(0)


def opened(site: Site, page: Any, query: str = "") -> Any:
    page.goto(f"{site.address}/{query}")
    page.wait_for_selector(".tabs")
    page.wait_for_function("window.socket?.connected")
    return page


def ask(page: Any, text: str) -> None:
    page.get_by_role("textbox", name="Prompt").fill(text)
    page.keyboard.press("Enter")


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()
    page.wait_for_selector(f'[role=tab][aria-selected=true]:has-text("{name}")')


def finish(site: Site, page: Any, name: str, *, audit: bool = True) -> None:
    """Take a screenshot, and check the page with axe-core."""
    page.wait_for_function(LOADED)
    page.screenshot(path=site.shots / f"{name}.png")
    if not audit:  # its elements are those of an audited page
        return
    found = axe.Axe().run(page).response["violations"]
    serious = [
        f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found if one["impact"] in ("serious", "critical")
    ]
    assert not serious


def png(colour: str = "teal", side_px: int = 48) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side_px, side_px), colour).save(out, "PNG")
    return out.getvalue()


def requests_of(site: Site, kind: type) -> list[Any]:
    return [request for request in site.engine.requests if isinstance(request, kind)]
