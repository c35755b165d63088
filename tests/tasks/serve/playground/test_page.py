"""The routes of the playground, without a browser."""

import importlib.util
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from support.fake_engine import FakeEngine, running

from infra.errors import ConfigError
from infra.settings import Settings
from tasks.serve.api.app import create_app
from tasks.serve.api.config import ApiConfig
from tasks.serve.api.keys import Keys
from tasks.serve.playground import page
from tasks.serve.service.requests import GenerateRequest, SearchRequest

pytest.importorskip("nicegui")


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    engine = running()
    yield engine
    engine.close(0)


@pytest.fixture(scope="module")
def client(engine: Any) -> Iterator[TestClient]:
    for _ in range(2):  # the second app of a process works as well
        app = FastAPI()
        page.mount(app, engine, Settings())
        with TestClient(app) as client:
            client.get("/").raise_for_status()
    with TestClient(app) as client:
        yield client


def test_page_allows_no_other_host(client: TestClient) -> None:
    headers = client.get("/").headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "http" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_edit_tab_says_why_a_generator_without_edit_methods_cannot_edit(client: TestClient, engine: FakeEngine) -> None:
    reason, methods = "cannot edit. To edit images, serve the generator that it was made from", "FlowEdit"
    disabled = re.compile(r'"class":\["run","filled"\],"props":\{[^}]*"disable":true')
    before = client.get("/?tab=edit").text
    assert reason not in before and methods in before and not disabled.search(before)
    engine.edit_methods = []
    try:
        shown, other = client.get("/?tab=edit").text, client.get("/?tab=generate").text
    finally:
        engine.edit_methods = ["flow", "local", "sdedit"]
    assert reason in shown and methods not in shown
    assert disabled.search(shown) and not disabled.search(other)


@pytest.mark.parametrize("path", ["/unknown", "/v1/unknown", "/playground/static/../page.py", "/playground/static/x"])
def test_unknown_path_gets_the_answer_of_the_service(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404 and response.headers["content-type"] == "application/json"


def test_styles_and_scripts_are_served(client: TestClient) -> None:
    for name, kind in (("playground.css", "text/css"), ("playground.js", "text/javascript")):
        assert client.get(f"/playground/static/{name}").headers["content-type"].startswith(kind)


def test_thumbnail_of_a_replaced_version_is_refused(client: TestClient, engine: FakeEngine) -> None:
    shown = client.get("/playground/thumbnails/birds/5?generation=0")
    assert shown.headers["content-type"] == "image/webp" and "max-age=30" in shown.headers["cache-control"]
    engine.swap("birds", 2)
    assert client.get("/playground/thumbnails/birds/5?generation=0").status_code == 404
    assert client.get("/playground/thumbnails/birds/5?generation=1").status_code == 200


@pytest.mark.parametrize("path", ["birds/13", "birds/999999", "nothing/1"])
def test_thumbnail_that_is_gone_is_not_found(client: TestClient, path: str) -> None:
    assert client.get(f"/playground/thumbnails/{path}").status_code == 404


def test_result_is_the_png_of_the_engine(client: TestClient, engine: FakeEngine) -> None:
    job = engine.submit(GenerateRequest(prompt="a", n=2, seed=3), keep=True)
    made: Any = job.future.result(10)
    saved = client.get(f"/playground/results/{job.id}/1.png?download=1")
    assert saved.content == made.images[1].png
    assert saved.headers["content-disposition"] == 'attachment; filename="knn-diffusion-generate-4.png"'


def test_result_that_does_not_exist_is_not_found(client: TestClient, engine: FakeEngine) -> None:
    found = engine.submit(SearchRequest(text="a"), keep=True)
    found.future.result(10)
    drawn = engine.submit(GenerateRequest(prompt="a"), keep=True)
    drawn.future.result(10)
    for path in (f"{found.id}/0", f"{drawn.id}/1", f"{drawn.id}/-1", "unknown/0"):
        assert client.get(f"/playground/results/{path}.png").status_code == 404
    assert client.get("/playground/images/unknown").status_code == 404


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://testserver.evil.example"])
def test_page_of_another_site_cannot_open_the_websocket(client: TestClient, origin: str) -> None:
    polling, websocket = (f"/_nicegui_ws/socket.io/?EIO=4&transport={name}" for name in ("polling", "websocket"))
    own, foreign = ({"origin": one, "upgrade": "websocket"} for one in ("http://testserver", origin))
    assert client.get(polling, headers={"origin": "http://testserver"}).status_code == 200
    assert client.get(polling, headers={"origin": origin}).status_code == 400
    with client.websocket_connect(websocket, headers=own) as socket:
        assert socket.receive_text().startswith("0")
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(websocket, headers=foreign) as socket:
        socket.receive_text()


def test_api_keys_protect_the_page_and_its_images(engine: Any) -> None:
    app = create_app(Settings(), engine=engine, api=ApiConfig(keys=Keys(["k" * 32])), page=True)
    client = TestClient(app)  # without its lifespan, which would start the engine again
    for path in ("/", "/playground/thumbnails/birds/1", "/_nicegui_ws/socket.io/?EIO=4&transport=polling"):
        assert client.get(path).status_code == 401
    assert client.get("/playground/thumbnails/birds/1", auth=("anyone", "k" * 32)).status_code == 200


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'knn-diffusion\[web\]'"):
        page.mount(FastAPI(), running(), Settings())
