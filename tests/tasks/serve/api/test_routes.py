"""REST routes on an engine in memory."""

import asyncio
import base64
import io
import json
import logging
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from support.fake_engine import FakeEngine
from support.hostile_images import encoded, large_canvas, many_scans
from support.served_app import app_of, client

from infra.errors import InputError, IntegrityError, StageError, TransientError
from model.errors import ModelError
from tasks.serve.api.problems import PROBLEM_JSON
from tasks.serve.service.errors import QueueFullError

PNG = encoded(Image.new("RGB", (8, 8), "red"), "PNG")


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def calls() -> Iterator[TestClient]:
    """A client of an engine that no test changes."""
    with client(FakeEngine(step_s=0)) as called:
        yield called


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(step_s=0)


def problem(response: Any, status: int, code: str) -> dict[str, Any]:
    """Check that a response is a problem, and return it."""
    assert (response.status_code, response.headers["content-type"]) == (status, PROBLEM_JSON), response.text
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert body["code"] == code
    assert "Traceback" not in response.text
    return body


def test_search_answers_with_hits_and_names_model_and_version(calls: TestClient) -> None:
    response = calls.post("/v1/search", json={"text": "a red apple", "k": 3, "database": "fish", "negative": ["leaf"]})
    assert response.status_code == 200
    assert [hit["rank"] for hit in response.json()["hits"]] == [1, 2, 3]
    names = {name: response.headers[name] for name in ("X-Model", "X-Database", "X-Database-Version")}
    assert names == {"X-Model": "models:/knn-diffusion/1", "X-Database": "fish", "X-Database-Version": "1"}


def test_generate_returns_pngs_in_base64_with_provenance(calls: TestClient) -> None:
    body = calls.post("/v1/generate", json={"prompt": "an owl", "n": 2, "seed": 7}).json()
    assert [image["seed"] for image in body["images"]] == [7, 8]
    for image in body["images"]:
        assert Image.open(io.BytesIO(base64.b64decode(image["png"], validate=True))).size == (64, 64)
        assert image["neighbours"][0]["columns"]["licence"]
        assert image["nearest"]["score"] > 0


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_edit_takes_an_image_in_base64(calls: TestClient, prefix: str) -> None:
    body = calls.post("/v1/edit", json={"image": prefix + base64_of(PNG), "prompt": "blue", "n": 2}).json()
    assert [image["region"][0] for image in body["images"]] == [[0.25, 0.25]] * 2


@pytest.mark.parametrize(
    ("route", "body", "pointer"),
    [
        ("search", {}, "#"),
        ("search", {"text": "a", "unknown": 1}, "#/unknown"),
        ("search", {"text": "a" * 1_000_000}, "#/text"),
        ("search", {"text": "a", "k": 501}, "#/k"),
        ("search", {"embedding": [0.5, "NaN"]}, "#/embedding/1"),
        ("search", {"embedding": [1e300]}, "#/embedding/0"),
        ("search", {"text": "a", "negative": ["", "b"]}, "#/negative/0"),
        ("generate", {"prompt": "a" * 1_000_000}, "#/prompt"),
        ("generate", {"prompt": "a", "n": 17}, "#/n"),
        ("generate", {"prompt": "a", "seed": -1}, "#/seed"),
        ("edit", {"prompt": "a"}, "#/image"),
        ("jobs", {"prompt": "a"}, "#/kind"),
        ("jobs", {"kind": "generate", "prompt": ""}, "#/prompt"),
        ("databases/birds/swap", {"version": 0}, "#/version"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_field_is_named_and_not_repeated(
    calls: TestClient, route: str, body: dict[str, Any], pointer: str
) -> None:
    response = calls.post(f"/v1/{route}", json=body)
    assert [error["pointer"] for error in problem(response, 422, "invalid_request")["errors"]] == [pointer]
    assert len(response.content) < 1_000


@pytest.mark.parametrize(
    "image",
    [
        b"", b"<html></html>", PNG[:40], b"\xff\xd8\xff" + bytes(1_000), many_scans(500), large_canvas("PNG", 4_001),
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/>", b"GIF89a" + bytes(20),
    ],
    ids=["empty", "html", "truncated", "noise", "scans", "pixels", "svg", "gif"],
)  # fmt: skip
def test_odd_image_is_refused_with_a_reason(calls: TestClient, image: bytes) -> None:
    response = calls.post("/v1/edit", json={"image": base64_of(image), "prompt": "blue"})
    (error,) = problem(response, 422, "invalid_request")["errors"]
    assert error["pointer"] == "#/image"
    assert error["detail"].startswith("is not a readable image: ")


@pytest.mark.parametrize(
    "content", [b"{", b"", b"\xff\xfe", b'{"text": "\\ud800"}', b'{"min_score": NaN}', b"[" * 9_999]
)
def test_malformed_json_is_refused_without_quoting_it(calls: TestClient, content: bytes) -> None:
    response = calls.post("/v1/search", content=content, headers={"Content-Type": "application/json"})
    problem(response, 400, "malformed_json")


@pytest.mark.parametrize("value", [[], 1, "a", None])
def test_json_other_than_an_object_is_refused(calls: TestClient, value: Any) -> None:
    for route in ("search", "jobs", "images/generations"):
        assert calls.post(f"/v1/{route}", content=json.dumps(value), headers=JSON).status_code in (400, 422)


JSON = {"Content-Type": "application/json"}


def test_body_that_is_not_json_is_refused(calls: TestClient) -> None:
    problem(calls.post("/v1/search", data={"text": "a"}), 415, "unsupported_media_type")


def test_unknown_names_are_not_found(calls: TestClient) -> None:
    unknown = problem(calls.post("/v1/search", json={"text": "a", "database": "trees"}), 404, "unknown_database")
    assert "birds, fish, flowers" in unknown["detail"]
    problem(calls.post("/v1/databases/nope/swap"), 404, "unknown_database")
    problem(calls.get("/v1/jobs/nope"), 404, "not_found")
    problem(calls.get("/v1/nope"), 404, "not_found")
    problem(calls.put("/v1/search"), 405, "method_not_allowed")


def test_row_that_does_not_exist_is_invalid(calls: TestClient) -> None:
    problem(calls.post("/v1/search", json={"row": 5_000}), 422, "invalid_input")


def test_info_and_databases_describe_what_is_served(calls: TestClient) -> None:
    info = calls.get("/v1/info").json()
    assert info["defaults"]["steps"] == 6
    assert info["limits"]["body_bytes"] == 32 * 2**20
    databases = {one["name"]: one for one in calls.get("/v1/databases").json()}
    assert databases["birds"]["served"]["version"] == 1
    assert databases["trees"]["served"] is None


def test_swap_changes_the_version_of_later_requests(engine: FakeEngine) -> None:
    with client(engine) as calls:
        swapped = calls.post("/v1/databases/birds/swap", json={"version": 2}).json()
        assert swapped["served"] == {"name": "birds", "version": 2, "rows": 1_000, "generation": 1}
        assert calls.post("/v1/search", json={"text": "a"}).headers["X-Database-Version"] == "2"
        assert calls.post("/v1/databases/birds/swap").json()["served"]["generation"] == 2
        problem(calls.post("/v1/databases/birds/swap", json={"version": 99}), 404, "not_found")


@pytest.mark.parametrize("kind", [IntegrityError, StageError, InputError, ModelError])
def test_swap_to_a_damaged_version_is_a_conflict_without_paths(engine: FakeEngine, kind: type[Exception]) -> None:
    def damaged(name: str, version: int | None = None) -> Any:
        raise kind("/srv/root/birds/database/0f/index.faiss is damaged; rebuild it")

    engine.swap = damaged  # type: ignore[method-assign]
    with client(engine) as calls:
        body = problem(calls.post("/v1/databases/birds/swap"), 409, "version_does_not_open")
        assert "/srv" not in body["detail"]
        assert "is damaged; rebuild it" in body["detail"]


def test_swap_without_the_registry_can_be_retried(engine: FakeEngine) -> None:
    def unavailable(name: str, version: int | None = None) -> Any:
        raise TransientError("the registry does not answer; try again later")

    engine.swap = unavailable  # type: ignore[method-assign]
    with client(engine) as calls:
        response = calls.post("/v1/databases/birds/swap")
        problem(response, 503, "unavailable")
        assert int(response.headers["Retry-After"]) > 0


def test_full_queue_answers_429_while_probes_answer() -> None:
    engine = FakeEngine(capacity=2, step_s=0)
    engine.gate.clear()
    with client(engine) as calls:
        replies = [calls.post("/v1/jobs", json={"kind": "generate", "prompt": "a"}) for _ in range(8)]
        refused = [reply for reply in replies if reply.status_code != 202]
        assert len(refused) >= 5
        for reply in refused:
            problem(reply, 429, "queue_full")
            assert reply.headers["Retry-After"] == "3"
        begun = time.monotonic()
        for probe in ("/livez", "/readyz", "/metrics", "/v1/info"):
            assert calls.get(probe).status_code == 200
        assert time.monotonic() - begun < 2
        engine.gate.set()


def test_job_reports_its_place_progress_and_result(engine: FakeEngine) -> None:
    engine.gate.clear()
    with client(engine) as calls:
        first, second = (calls.post("/v1/jobs", json={"kind": "generate", "prompt": "a"}) for _ in range(2))
        assert (first.status_code, second.status_code) == (202, 202)
        place = second.headers["Location"]
        assert place == f"/v1/jobs/{second.json()['id']}"
        assert calls.get(place).json()["state"] == "queued"
        assert calls.get(place).json()["position"] == 0
        problem(calls.get(f"{place}/result"), 409, "not_finished")
        engine.gate.set()
        events = [line for line in calls.get(f"{place}/events").text.splitlines() if line]
        assert events[-2] == "event: done"
        last = json.loads(events[-1].removeprefix("data: "))
        assert (last["state"], last["step"], last["steps"]) == ("done", 6, 6)
        result = calls.get(f"{place}/result")
        assert result.json()["images"]
        assert result.headers["X-Database"] == "birds"


def test_deleted_job_is_cancelled(engine: FakeEngine) -> None:
    engine.gate.clear()
    with client(engine) as calls:
        places = [
            calls.post("/v1/jobs", json={"kind": "edit", "image": base64_of(PNG), "prompt": "a"}).headers["Location"]
            for _ in range(2)
        ]
        for place in reversed(places):  # one that waits, and one that runs
            calls.delete(place)
            assert "event: cancelled" in calls.get(f"{place}/events").text
            assert calls.delete(place).json()["state"] == "cancelled"
            problem(calls.get(f"{place}/result"), 409, "cancelled")
        engine.gate.set()


def test_client_that_disconnects_cancels_its_job(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    engine.gate.clear()
    app = app_of(engine)
    body = json.dumps({"prompt": "an owl"}).encode()
    sent: list[Any] = []

    async def call() -> None:
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            message = next(messages, None)
            if message is None:
                while not engine.submitted:
                    await asyncio.sleep(0.01)
                return {"type": "http.disconnect"}
            return message

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/generate", "raw_path": b"/v1/generate", "root_path": "",
            "query_string": b"", "headers": headers, "scheme": "http", "server": ("localhost", 80),
        }  # fmt: skip
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)
            engine.gate.set()

    asyncio.run(call())
    (job,) = engine.submitted
    assert job.status().state == "cancelled"
    assert caplog.text == ""
    assert b'{route="/v1/generate",status="499"} 1.0' in engine.metrics.expose()


def test_unexpected_error_is_logged_with_the_id_of_the_answer(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fault = RuntimeError("secret: /srv/data")
    with client(engine) as calls, caplog.at_level(logging.ERROR, "knn_diffusion.api"):
        for route, body in {"search": {"text": "a"}, "generate": {"prompt": "a"}}.items():
            answer = problem(calls.post(f"/v1/{route}", json=body), 500, "internal")
            assert "secret" not in json.dumps(answer)
            assert answer["id"] in caplog.text
        assert "RuntimeError: secret" in caplog.text
        place = calls.post("/v1/jobs", json={"kind": "search", "text": "a"}).headers["Location"]
        assert "secret" not in calls.get(f"{place}/events").text


def test_failed_job_keeps_no_request_in_memory(engine: FakeEngine) -> None:
    engine.fault = QueueFullError("the request waited too long in the queue", retry_after_s=2)
    with client(engine) as calls:
        problem(calls.post("/v1/generate", json={"prompt": "a"}), 429, "queue_full")
        place = calls.post("/v1/jobs", json={"kind": "generate", "prompt": "a"}).headers["Location"]
        calls.get(f"{place}/events")
        before = engine.fault.__traceback__
        for _ in range(2):
            failed = calls.get(f"{place}/result")
            assert failed.headers["Retry-After"] == "2"
            problem(failed, 429, "queue_full")
    assert engine.fault.__traceback__ is before
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(before)]
    assert not [name for name in frames if "tasks/serve/api" in name or "starlette" in name]


def test_readyz_is_unavailable_before_the_warm_up_and_after_closing() -> None:
    engine = FakeEngine(warm=False)
    with client(engine) as calls:
        cold = calls.get("/readyz")
        assert (cold.status_code, cold.json()["ready"]) == (503, False)
        assert cold.json()["problems"]
        engine.ready = True
        engine.report("fish version 3 does not open; version 2 is served")
        warm = calls.get("/readyz")
        assert (warm.status_code, warm.json()["problems"]) == (
            200,
            ["fish version 3 does not open; version 2 is served"],
        )
        engine.close(1)
        assert calls.get("/readyz").status_code == 503
        assert calls.get("/livez").status_code == 200
        closed = calls.post("/v1/search", json={"text": "a"})
        problem(closed, 503, "closing")
        assert int(closed.headers["Retry-After"]) > 0


def test_lifespan_closes_the_engine(engine: FakeEngine) -> None:
    with client(engine, drain_s=7):
        assert engine.ready
    assert engine.drains == [7]


def test_metrics_count_routes_and_name_no_client_and_no_prompt() -> None:
    with client() as calls:
        calls.post("/v1/search?secret=1", json={"text": "a secret prompt"})
        calls.get("/v1/jobs/secret")
        calls.get("/secret")
        text = calls.get("/metrics").text
    samples = [
        sample for family in text_string_to_metric_families(text) for sample in family.samples
        if sample.name == "knn_diffusion_requests_total"
    ]  # fmt: skip
    counted = {(sample.labels["route"], sample.labels["status"]): sample.value for sample in samples}
    assert counted == {("/v1/search", "200"): 1, ("/v1/jobs/{job}", "404"): 1, ("other", "404"): 1}
    assert "secret" not in text
    assert 'knn_diffusion_request_duration_seconds_count{route="/v1/search"} 1.0' in text


def test_answers_forbid_framing_and_embedding(calls: TestClient) -> None:
    for response in (calls.get("/livez"), calls.get("/nope"), calls.post("/v1/search", json={})):
        assert response.headers["X-Frame-Options"] == "DENY"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "access-control-allow-origin" not in response.headers


def test_requests_of_many_threads_are_answered_each_with_its_own() -> None:
    answers: dict[int, Any] = {}
    with client(FakeEngine(capacity=100, step_s=0)) as calls:

        def call(seed: int) -> None:
            answers[seed] = calls.post("/v1/generate", json={"prompt": "a", "seed": seed}).json()

        threads = [threading.Thread(target=call, args=(seed,)) for seed in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {seed: answer["images"][0]["seed"] for seed, answer in answers.items()} == {n: n for n in range(20)}
