"""The application: what it adds to the routes, and how it is embedded."""

import http.server
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import ray
from support import replicas
from support.fake_engine import FakeEngine
from support.served_app import app_of, client

from infra.compute import local_ray
from infra.errors import ConfigError
from tasks.serve.api import server

CHECKOUT = Path(__file__).parents[4]


def test_root_without_the_playground_links_to_the_description() -> None:
    with client() as calls:
        page = calls.get("/")
        assert 'href="/openapi.json"' in page.text
        assert page.headers["Content-Security-Policy"] == "default-src 'none'"
        assert calls.get("/docs").status_code == calls.get("/redoc").status_code == 404


def test_description_names_every_request_body() -> None:
    schema: dict[str, Any] = app_of(FakeEngine()).openapi()
    posts = {path: one["post"] for path, one in schema["paths"].items() if "post" in one}
    bodies = {path: one["requestBody"]["content"] for path, one in posts.items()}
    assert "image" in bodies["/v1/edit"]["application/json"]["schema"]["required"]
    assert "image" in bodies["/v1/images/edits"]["multipart/form-data"]["schema"]["required"]
    kinds = [one["properties"]["kind"]["const"] for one in bodies["/v1/jobs"]["application/json"]["schema"]["oneOf"]]
    assert kinds == ["search", "generate", "edit"]
    assert "HTTPValidationError" not in str(schema)


class _Collector(http.server.BaseHTTPRequestHandler):
    """A collector of traces that keeps the bodies."""

    bodies: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def test_traces_are_sent_to_the_endpoint_without_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.instrumentation.fastapi")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Collector) as collector:
        threading.Thread(target=collector.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        with client() as calls:
            calls.post("/v1/search", json={"text": "a secret prompt"})
            calls.get("/livez")
        collector.shutdown()
    sent = b"".join(_Collector.bodies)
    assert b"/v1/search" in sent
    assert b"livez" not in sent
    assert b"secret" not in sent


def test_endpoint_without_the_extra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.instrumentation.fastapi", None)
    with pytest.raises(ConfigError, match=r"knn-diffusion\[telemetry\]"):
        app_of(FakeEngine())


def test_import_of_the_api_leaves_heavy_libraries_out() -> None:
    heavy = ("torch", "mlflow", "ray", "nicegui", "prefect", "opentelemetry.sdk")
    code = f"import sys, tasks.serve.api.app, tasks.serve.api.server; print([n for n in {heavy} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.on_ray
def test_two_replicas_on_ray_answer_on_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = pytest.importorskip("ray.serve")
    monkeypatch.setenv("PYTHONPATH", f"{CHECKOUT / 'tests'}:{CHECKOUT}")  # of the replicas
    with server.bind("127.0.0.1", 0) as bound:
        address = server.address_of(bound)
    # Without an address, Ray Serve joins any cluster that it finds, for example that of another test.
    with local_ray.loopback():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": int(address.rpartition(":")[2])})
            serve.run(replicas.service(2), route_prefix="/")
            seen = set()
            deadline = time.monotonic() + 20
            while len(seen) < 2 and time.monotonic() < deadline:
                answer = httpx.post(f"{address}/v1/generate", json={"prompt": "an owl", "seed": 1}, timeout=30)
                assert answer.status_code == 200, answer.text
                assert answer.headers["X-Database"] == "birds"
                seen.add(httpx.get(f"{address}/v1/info").json()["model"])
            assert len(seen) == 2
            assert httpx.post(f"{address}/v1/search", json={}).json()["code"] == "invalid_request"
        finally:
            serve.shutdown()
            ray.shutdown()
