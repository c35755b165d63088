"""The engine on tiny models: submission, cancellation, failures, limits of the queue, warm-up and shutdown."""

import concurrent.futures
import io
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import tiny_models
from support.tiny_service import ROWS, SOURCE, TinyVersions, search, wait_for

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
from tasks.serve.service.requests import EditRequest, GenerateRequest, Request, SearchRequest


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


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (SearchRequest(text=" "), "a text is empty"),
        (SearchRequest(text="x", negative=[201 * "y"]), "a word is too long: 201 characters; give at most 200"),
        (GenerateRequest(prompt=(100 * "x" + "\x1c") * 2 + "x"), "a word is too long: 203 characters"),
        (SearchRequest(row=ROWS), f"has no row {ROWS}"),
        (SearchRequest(embedding=[1.0, 2.0]), "embedding has 2 numbers; give 8, as encoder tiny-clip does"),
        (SearchRequest(embedding=tiny_models.WIDTH * [0.0]), "embedding has no direction"),
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


def test_cancelled_edit_stops_at_its_next_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
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
    wait_for(lambda: engine._lanes["image"].in_flight() == 0)
    assert len(calls) == 2


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
