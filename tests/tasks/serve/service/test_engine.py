"""The engine on tiny models: responses, batches, progress, cancellation, swaps under load, and shutdown."""

import concurrent.futures
import gc
import io
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_models
from support.tiny_service import ROWS, TinyVersions

from infra.errors import InputError, NotFoundError, StageError
from model.errors import ModelError
from tasks.serve.service import drawing, searching
from tasks.serve.service.config import ServiceConfig
from tasks.serve.service.engine import Engine
from tasks.serve.service.errors import (
    DatabaseUnavailableError,
    JobCancelledError,
    QueueFullError,
    ServiceClosedError,
    UnknownDatabaseError,
)
from tasks.serve.service.jobs import Job
from tasks.serve.service.plans import GeneratePlan, plan
from tasks.serve.service.provenance import CHUNK
from tasks.serve.service.requests import EditRequest, GenerateRequest, Request, SearchRequest
from tasks.serve.service.responses import ImagesResponse, SearchResponse
from tasks.serve.service.served import OpenDatabase

SOURCE = Image.new("RGB", (20, 30), (200, 40, 40))


@pytest.fixture
def versions(tmp_path: Path) -> TinyVersions:
    return TinyVersions(tmp_path, birds=2, cats=1)


@pytest.fixture
def start(versions: TinyVersions) -> Iterator[Callable[..., Engine]]:
    """Start engines that are closed at the end."""
    started: list[Engine] = []

    def start(**options: Any) -> Engine:
        engine = Engine(versions, ServiceConfig(**options))
        started.append(engine)
        engine.start()
        wait_for(lambda: engine.ready or bool(engine.problems()))
        return engine

    yield start
    for engine in started:
        engine.close(0)


@pytest.fixture
def engine(start: Callable[..., Engine]) -> Engine:
    return start()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def search(engine: Engine, **fields: Any) -> SearchResponse:
    response = engine.submit(SearchRequest(**fields)).future.result(20)
    assert isinstance(response, SearchResponse)
    return response


def images(engine: Engine, request: Request) -> ImagesResponse:
    response = engine.submit(request).future.result(20)
    assert isinstance(response, ImagesResponse)
    return response


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def test_search_returns_nearest_rows_with_version_and_urls(engine: Engine) -> None:
    found = search(engine, text="an owl", k=3, database="birds")
    scores = [hit.score for hit in found.hits]
    assert scores == sorted(scores, reverse=True)
    assert (found.database.name, found.database.version, found.database.rows) == ("birds", 2, ROWS)
    assert [hit.rank for hit in found.hits] == [1, 2, 3]
    assert found.model == "knn-diffusion/1"
    assert {name: value for name, value in found.settings.items() if value} == {"text": "an owl", "k": 3}
    assert all(hit.url == f"http://birds/2/{hit.id}" for hit in found.hits)


def test_search_of_a_row_returns_the_others(engine: Engine) -> None:
    found = search(engine, row=4, k=ROWS, database="birds")
    assert sorted(hit.id for hit in found.hits) == [row for row in range(ROWS) if row != 4]


def test_search_combines_text_image_and_row_and_subtracts_negative_texts(engine: Engine) -> None:
    opened, model = engine._catalog.get("birds"), engine._catalog.model
    text, away = model.encoder.embed_texts(["an owl", "night"]).numpy()
    image = model.encoder.embed_images([SOURCE]).numpy()[0]
    row = opened.database.rows(np.array([5]))[0].astype(np.float32)
    query = (text + image + row) / 3 - away
    found = search(engine, text="an owl", image=SOURCE, row=5, negative=["night"], k=2, database="birds")
    nearest = opened.database.nearest((query / np.linalg.norm(query))[None].astype(np.float32), 3)
    expected = [identifier for identifier in nearest.ids[0].tolist() if identifier != 5][:2]
    assert [hit.id for hit in found.hits] == expected


def test_search_leaves_out_rows_below_the_lowest_score(engine: Engine) -> None:
    everything = search(engine, text="an owl", k=ROWS)
    limit = everything.hits[2].score
    assert [hit.id for hit in search(engine, text="an owl", k=ROWS, min_score=limit).hits] == [
        hit.id for hit in everything.hits[:3]
    ]


def test_searches_of_a_batch_equal_single_ones(engine: Engine) -> None:
    requests = [SearchRequest(text=f"text {number}", k=number + 1) for number in range(8)]
    single = [engine.submit(request).future.result(20) for request in requests]
    opened, model = engine._catalog.get(None), engine._catalog.model
    plans = [plan(request, opened, model) for request in requests]
    together = searching.search(plans)  # type: ignore[arg-type]
    assert [one.model_dump() for one in together] == [one.model_dump() for one in single]  # type: ignore[union-attr]


def test_search_by_negative_text_alone_that_cancels_the_query_is_invalid(engine: Engine) -> None:
    with pytest.raises(InputError, match="cancel the query"):
        search(engine, text="an owl", negative=["an owl"])


def test_search_does_not_wait_for_generation(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    free, generate = threading.Event(), drawing.generate

    def slow(*arguments: Any) -> Any:
        assert free.wait(20)
        return generate(*arguments)

    monkeypatch.setattr(drawing, "generate", slow)
    generation = engine.submit(GenerateRequest(prompt="an owl"))
    assert search(engine, text="an owl").hits
    assert not generation.future.done()
    free.set()
    generation.future.result(20)


def test_generation_names_versions_settings_and_provenance(engine: Engine) -> None:
    made = images(engine, GenerateRequest(prompt="an owl", n=3, seed=5, database="birds"))
    assert (made.model, made.kind, made.database.version) == ("knn-diffusion/1", "generate", 2)
    assert made.settings["steps"] == 3
    assert [made.settings[name] for name in ("quality", "candidates", "start")] == ["fast", 3, "neighbour"]
    assert [image.seed for image in made.images] == [5, 6, 7]
    assert all(len(image.neighbours) == 3 and image.nearest is not None for image in made.images)
    assert made.images[0].neighbours[0].url == f"http://birds/2/{made.images[0].neighbours[0].id}"
    assert CHUNK in Image.open(io.BytesIO(made.images[0].png)).info


def test_quality_is_a_preset_that_given_settings_override(engine: Engine) -> None:
    best = images(engine, GenerateRequest(prompt="an owl", quality="best")).settings
    assert (best["candidates"], best["start"]) == (8, "neighbour")
    given = images(engine, GenerateRequest(prompt="an owl", quality="best", candidates=1, start="noise")).settings
    assert (given["candidates"], given["start"], given["strength"]) == (1, "noise", None)


def test_generation_without_stored_images_is_that_of_the_pipeline(engine: Engine, tmp_path: Path) -> None:
    model = engine._catalog.model
    plain = tiny_models.database(tmp_path / "plain", tiny_models.unit_rows(40))
    opened = OpenDatabase(plain, name="plain", version=1)
    planned = plan(GenerateRequest(prompt="an owl", seed=9), opened, model)
    assert isinstance(planned, GeneratePlan)
    used = [planned.settings[name] for name in ("candidates", "query", "start", "strength")]
    assert used == [3, "both", "noise", None]
    (made,) = drawing.generate([planned], lambda step, steps: None)
    alone = model.with_database(opened)("an owl", generator=torch.Generator().manual_seed(9), quality="fast").images[0]
    assert np.abs(pixels(made.images[0].png) - np.asarray(alone).astype(int)).max() <= 1
    with pytest.raises(InputError, match="database plain has no images to start from"):
        plan(GenerateRequest(prompt="an owl", start="neighbour"), opened, model)


def test_image_depends_on_its_seed_but_not_on_the_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    many = images(engine, GenerateRequest(prompt="an owl", n=4, seed=5))
    for number in range(4):
        alone = images(engine, GenerateRequest(prompt="an owl", seed=5 + number))
        assert np.abs(pixels(alone.images[0].png) - pixels(many.images[number].png)).max() <= 1
    opened, model = engine._catalog.get(None), engine._catalog.model
    requests = [GenerateRequest(prompt=prompt, n=2, seed=seed) for prompt, seed in (("a cat", 1), ("an owl", 5))]
    plans = [plan(request, opened, model) for request in requests]
    assert plans[0].key == plans[1].key
    batch = drawing.generate(plans, lambda step, steps: None)  # type: ignore[arg-type]
    for number in range(2):
        assert np.abs(pixels(batch[1].images[number].png) - pixels(many.images[number].png)).max() <= 1


def test_first_image_equals_that_of_the_pipeline_with_the_seed(engine: Engine) -> None:
    made = images(engine, GenerateRequest(prompt="an owl", seed=9))
    pipeline = engine._catalog.model.with_database(engine._catalog.get(None))
    alone = pipeline("an owl", generator=torch.Generator().manual_seed(9), quality="fast").images[0]
    assert np.abs(pixels(made.images[0].png) - np.asarray(alone).astype(int)).max() <= 1


def test_generation_with_negative_prompt_image_and_noise(engine: Engine) -> None:
    made = images(engine, GenerateRequest(prompt="a", negative_prompt="b", start="noise", steps=2, guidance=2, k=2))
    assert made.settings["strength"] is None
    assert len(made.images[0].neighbours) == 2
    assert images(engine, GenerateRequest(image=SOURCE)).settings["image_sha256"]


def test_generation_of_text_and_image_uses_the_unit_mean_of_both(engine: Engine) -> None:
    pipeline = engine._catalog.model.with_database(engine._catalog.get(None))
    mean = pipeline.embed(["an owl", SOURCE]).mean(0, keepdim=True)
    expected = pipeline(mean / mean.norm(), generator=torch.Generator().manual_seed(9), quality="fast").images[0]
    made = images(engine, GenerateRequest(prompt="an owl", image=SOURCE, seed=9))
    assert np.abs(pixels(made.images[0].png) - np.asarray(expected).astype(int)).max() <= 1
    assert made.settings["prompt"] == "an owl" and made.settings["image_sha256"]
    for alone in (GenerateRequest(prompt="an owl", seed=9), GenerateRequest(image=SOURCE, seed=9)):
        assert made.images[0].neighbours != images(engine, alone).images[0].neighbours


def test_interpolation_has_the_neighbours_of_the_nearer_end(engine: Engine) -> None:
    made = images(engine, GenerateRequest(prompt="an owl", interpolate_to="a cat", n=4, seed=2))
    assert made.kind == "interpolate"
    assert [image.seed for image in made.images] == [2] * 4
    first, last = (images(engine, GenerateRequest(prompt=prompt)).images[0] for prompt in ("an owl", "a cat"))
    expected = [[hit.id for hit in one.neighbours] for one in (first, first, last, last)]
    assert [[hit.id for hit in image.neighbours] for image in made.images] == expected


def test_edit_makes_one_edit_for_each_seed_with_its_region(engine: Engine) -> None:
    request = EditRequest(image=SOURCE, prompt="a cat", n=2, seed=3, method="sdedit", steps=2)
    made = images(engine, request)
    assert (made.kind, made.settings["method"], made.settings["steps"]) == ("edit", "sdedit", 2)
    assert [image.seed for image in made.images] == [3, 4]
    again = images(engine, request.model_copy(update={"n": 1, "seed": 4})).images[0]
    assert np.abs(pixels(again.png) - pixels(made.images[1].png)).max() <= 1
    points = [point for image in made.images for point in image.region]
    assert all(0 <= value <= 1 for point in points for value in point)


def test_region_outline_surrounds_the_changed_pixels() -> None:
    before = np.zeros((16, 16, 3), np.uint8)
    after = before.copy()
    after[4:8, 6:10] = 255
    outline = np.array(drawing.region_outline(before, after)) * 16
    assert outline.min(0).tolist() == pytest.approx([4.5, 2.5], abs=0.1)
    assert outline.max(0).tolist() == pytest.approx([11.5, 9.5], abs=0.1)
    assert drawing.region_outline(before, before) == []


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (SearchRequest(text=" "), "a text is empty"),
        (SearchRequest(text="x", negative=[201 * "y"]), "a word is too long: 201 characters; give at most 200"),
        (GenerateRequest(prompt=(100 * "x" + "\x1c") * 2 + "x"), "a word is too long: 203 characters"),
        (SearchRequest(row=ROWS), f"has no row {ROWS}"),
        (GenerateRequest(prompt="x", negative_prompt="y", guidance=1), "guidance is too small for a negative prompt"),
        (GenerateRequest(prompt="x", interpolate_to="y"), "n is too small for an interpolation: 1"),
        (GenerateRequest(prompt="x", interpolate_to="y", n=2, start="neighbour"), "does not apply"),
        (GenerateRequest(prompt="x", start="noise", strength=0.5), "strength has no effect on pure noise"),
        (GenerateRequest(prompt="x", n=16, candidates=16, steps=26), "16 × 16 × 26 = 6656; give at most 6400"),
        (EditRequest(image=SOURCE, prompt="x", n=16, method="local", steps=51), "16 × 8 × 51 = 6528"),
        (EditRequest(image=SOURCE, prompt="x", method="restore"), "was not trained for method='restore'"),
    ],
)
def test_submit_rejects_unsupported_requests_at_once(engine: Engine, given: Request, line: str) -> None:
    with pytest.raises(InputError, match=line):
        engine.submit(given)


def test_submit_to_unknown_database_names_the_served_ones(engine: Engine) -> None:
    with pytest.raises(UnknownDatabaseError, match="no database is served as 'dogs'; served: birds, cats"):
        engine.submit(SearchRequest(text="x", database="dogs"))


def test_cancelled_job_stops_between_steps_and_the_rest_of_its_batch_goes_on(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(batch_wait_s=0.2)
    steps, generate = list[int](), drawing.generate

    def watched(plans: Sequence[Any], on_step: Callable[[int, int], None]) -> Any:
        def step(number: int, total: int) -> None:
            steps.append(number)
            jobs[0].cancel()
            on_step(number, total)

        return generate(plans, step)

    monkeypatch.setattr(drawing, "generate", watched)
    jobs = [engine.submit(GenerateRequest(prompt="an owl", steps=5)) for _ in range(2)]
    assert jobs[1].future.result(20)
    with pytest.raises(JobCancelledError):
        jobs[0].future.result(0)
    assert (jobs[0].status().state, jobs[1].status().step, steps) == ("cancelled", 5, [1, 2, 3, 4, 5])
    steps.clear()
    jobs = [engine.submit(GenerateRequest(prompt="an owl", steps=5))]
    with pytest.raises(JobCancelledError):
        jobs[0].future.result(20)
    wait_for(lambda: engine._lanes["image"].in_flight() == 0)
    assert steps == [1]


def test_cancelled_edit_stops_within_a_candidate(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    network, calls = engine._catalog.model.pipeline.transformer, list[int]()

    def count(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            job.cancel()

    hook = network.register_forward_pre_hook(count)
    job = engine.submit(EditRequest(image=SOURCE, prompt="a cat", method="sdedit", steps=50))
    with pytest.raises(JobCancelledError):
        job.future.result(20)
    hook.remove()
    assert len(calls) == 2
    wait_for(lambda: not network._forward_pre_hooks)


def test_failing_request_fails_alone_and_without_paths(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    search_all = searching.search

    def fragile(plans: Sequence[Any]) -> Any:
        for one in plans:
            if one.request.text == "damaged":
                raise ModelError("row 3 is not finite: /srv/secret/rows.npy; embed it again")
            if one.request.text == "bug":
                raise RuntimeError("/srv/secret")
        return search_all(plans)

    monkeypatch.setattr(searching, "search", fragile)
    jobs = [engine.submit(SearchRequest(text=text)) for text in ("an owl", "damaged", "bug", "a cat")]
    assert jobs[0].future.result(20)
    assert jobs[3].future.result(20)
    with pytest.raises(DatabaseUnavailableError, match="database birds cannot answer: row 3 is not finite: …"):
        jobs[1].future.result(20)
    with pytest.raises(StageError, match="the request failed: RuntimeError; see the log of the service"):
        jobs[2].future.result(20)


def test_full_queue_rejects_and_counts(start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(image_queue=1)
    free, running = threading.Event(), threading.Event()

    def blocked(plans: Sequence[Any], on_step: Any) -> Any:
        running.set()
        assert free.wait(20)
        raise JobCancelledError("ended")

    monkeypatch.setattr(drawing, "generate", blocked)
    engine.submit(GenerateRequest(prompt="an owl"))
    assert running.wait(20)
    waiting = engine.submit(GenerateRequest(prompt="an owl"))
    assert waiting.status().position == 0
    with pytest.raises(QueueFullError) as caught:
        engine.submit(GenerateRequest(prompt="an owl"))
    assert caught.value.retry_after_s >= 1
    text = engine.metrics.expose().decode()
    assert 'knn_diffusion_rejected_total{reason="queue_full"} 1.0' in text
    assert 'knn_diffusion_queue_depth{lane="image"} 1.0' in text
    assert 'knn_diffusion_in_flight{lane="image"} 1.0' in text
    free.set()


def test_request_that_waits_too_long_is_rejected_while_another_runs(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(max_wait_s=0.5)
    free = threading.Event()

    def blocked(plans: Sequence[Any], on_step: Any) -> Any:
        assert free.wait(20)
        raise JobCancelledError("ended")

    monkeypatch.setattr(drawing, "generate", blocked)
    running = engine.submit(GenerateRequest(prompt="an owl"))
    wait_for(lambda: running.status().state == "running")
    with pytest.raises(QueueFullError, match="waited too long"):
        engine.submit(GenerateRequest(prompt="an owl")).future.result(20)
    assert not running.future.done()
    free.set()


def test_twenty_swaps_under_sixteen_threads_lose_and_mix_nothing(engine: Engine, versions: TinyVersions) -> None:
    versions.databases["birds"] = [1, 2, 3]
    ended, failures = threading.Event(), list[str]()
    counts = [0] * 16

    def client(number: int) -> None:
        requests: list[Request] = [
            SearchRequest(text=f"text {number}", k=3, database="birds"),
            GenerateRequest(prompt="an owl", steps=1, candidates=1, database="birds"),
        ]
        while not ended.is_set():
            try:
                response: Any = engine.submit(requests[number % 8 == 0]).future.result(20)
            except Exception as error:
                failures.append(repr(error))
                return
            hits = response.hits if number % 8 else [*response.images[0].neighbours, response.images[0].nearest]
            if {hit.url.split("/")[3] for hit in hits} != {str(response.database.version)}:
                failures.append(f"{response.database} answered with {hits}")
            counts[number] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for number in range(20):
        before = sum(counts)
        assert engine.swap("birds", 1 + number % 3).served.version == 1 + number % 3  # type: ignore[union-attr]
        wait_for(lambda before=before: sum(counts) > before or bool(failures))  # type: ignore[misc]
    ended.set()
    for thread in threads:
        thread.join(20)
    assert failures == []
    assert min(counts) > 0
    assert engine._catalog.get("birds").generation == 20


def test_queued_job_keeps_the_version_that_it_was_submitted_with(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, run = threading.Event(), searching.search

    def slow(plans: Sequence[Any]) -> Any:
        assert free.wait(20)
        return run(plans)

    monkeypatch.setattr(searching, "search", slow)
    jobs = [engine.submit(SearchRequest(text="an owl", database="birds")) for _ in range(3)]
    engine.swap("birds", 1)
    late = engine.submit(SearchRequest(text="an owl", database="birds"))
    free.set()
    assert [job.future.result(20).database.version for job in (*jobs, late)] == [2, 2, 2, 1]


def test_replaced_version_is_freed_with_its_last_request(engine: Engine) -> None:
    replaced = weakref.ref(engine._catalog.get("birds"))
    jobs = [engine.submit(SearchRequest(text="an owl", database="birds"))]
    jobs.append(engine.submit(GenerateRequest(prompt="an owl", database="birds", steps=5)))
    wait_for(lambda: jobs[1].status().state != "queued")
    jobs[1].cancel()
    concurrent.futures.wait([job.future for job in jobs], 20)
    assert engine.thumbnail("birds", 3)
    gc.disable()
    try:
        engine.swap("birds", 1)
        wait_for(lambda: replaced() is None)
    finally:
        gc.enable()


def test_only_jobs_that_are_looked_up_are_kept(engine: Engine) -> None:
    engine.submit(SearchRequest(image=SOURCE)).future.result(20)
    jobs = [engine.submit(one, keep=True) for one in (SearchRequest(image=SOURCE), GenerateRequest(image=SOURCE))]
    concurrent.futures.wait([job.future for job in jobs], 20)
    assert engine.jobs.recent() == jobs
    assert jobs[0].request.image is None
    assert jobs[1].request.image is not None, "the playground can use it again"


def test_failed_job_keeps_no_frames_alive() -> None:
    job = Job(SearchRequest(text="x"))
    try:
        try:
            raise ValueError("cause")
        except ValueError as error:
            raise ModelError("a row is not finite") from error
    except ModelError as error:
        job.fail(error)
    kept = job.future.exception(0)
    assert kept is not None
    assert (kept.__traceback__, kept.__cause__, kept.__context__) == (None, None, None)


def test_thumbnail_is_small_webp_of_a_row_that_is_not_hidden(engine: Engine) -> None:
    image = Image.open(io.BytesIO(engine.thumbnail("birds", 3, side_px=8)))
    assert (image.format, image.size) == ("WEBP", (8, 8))
    opened = engine._catalog.get("birds")
    opened._database = opened.database.without(np.array([3]))
    for row in (3, ROWS, -1):
        with pytest.raises(NotFoundError, match=f"has no row {row}"):
            engine.thumbnail("birds", row)


def test_info_has_defaults_limits_and_methods(engine: Engine) -> None:
    info = engine.info()
    assert (info.model, info.side_px, info.encoder) == ("knn-diffusion/1", 8, "tiny-clip")
    assert info.defaults["steps"] == 3
    assert info.edit_methods == ["flow", "local", "sdedit"]
    assert (info.limits["n"], info.limits["image_steps"]) == (16, 6_400)


def test_engine_is_ready_only_after_warm_up_and_not_while_closing(
    versions: TinyVersions, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, generate = threading.Event(), drawing.generate

    def slow(*arguments: Any) -> Any:
        assert free.wait(20)
        return generate(*arguments)

    monkeypatch.setattr(drawing, "generate", slow)
    engine = Engine(versions, ServiceConfig())
    engine.start()
    assert not engine.ready
    free.set()
    wait_for(lambda: engine.ready)
    engine.close(20)
    assert not engine.ready
    with pytest.raises(ServiceClosedError):
        engine.submit(SearchRequest(text="x"))
    with pytest.raises(ServiceClosedError):
        engine.swap("birds", 1)


def test_failed_warm_up_is_a_problem_until_a_retry_succeeds(
    versions: TinyVersions, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, repaired = drawing.generate, threading.Event()

    def fail(*arguments: Any) -> Any:
        if repaired.is_set():
            return generate(*arguments)
        raise ModelError("the weights at /srv/secret are NaN")

    monkeypatch.setattr(drawing, "generate", fail)
    engine = Engine(versions, ServiceConfig(poll_s=0.01))
    engine.start()
    wait_for(lambda: bool(engine.problems()))
    assert not engine.ready
    assert engine.problems() == ["the warm-up failed: database birds cannot answer: the weights at … are NaN"]
    repaired.set()
    wait_for(lambda: engine.ready)
    assert engine.problems() == []
    engine.close(0)


def test_metrics_name_versions_and_batches_but_no_prompts(engine: Engine) -> None:
    search(engine, text="a very private prompt")
    text = engine.metrics.expose().decode()
    assert 'knn_diffusion_serving_info{database="birds",model="knn-diffusion/1",rows="12"} 1.0' in text
    assert 'knn_diffusion_batch_duration_seconds_count{kind="generate"} 1.0' in text
    assert "private" not in text
