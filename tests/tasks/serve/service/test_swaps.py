"""Swaps of a database while the engine serves requests."""

import concurrent.futures
import gc
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
from support.tiny_service import TinyVersions, wait_for

from tasks.serve.service import searching
from tasks.serve.service.engine import Engine
from tasks.serve.service.requests import GenerateRequest, Request, SearchRequest


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
