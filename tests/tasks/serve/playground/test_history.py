"""Playground history entries, tested without a browser."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.fake_engine import FakeEngine, running

from tasks.serve.playground.state import PageState
from tasks.serve.service.jobs import Job, JobTable
from tasks.serve.service.requests import GenerateRequest, SearchRequest

pytest.importorskip("nicegui")
history = pytest.importorskip("tasks.serve.playground.history")


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    engine = running()
    yield engine
    engine.close(0)


def finished(engine: FakeEngine, text: str = "a") -> Job:
    job = engine.submit(SearchRequest(text=text), keep=True)
    job.future.result(10)
    return job


def test_entries_with_equal_queries_keep_their_own_jobs(engine: FakeEngine) -> None:
    entries = history.Entries({}, engine.jobs)
    first, second = finished(engine), finished(engine)
    for job in (first, second):
        entries.add(PageState(text="a"), "tab=search&text=a", {"search": job})
    assert [entries.results_of(entry) for entry in entries] == [{"search": second}, {"search": first}]
    assert entries.latest(PageState(text="a", min_score=0.5)) == {"search": second}
    assert entries.latest(PageState(text="b")) == {}


def test_expired_entry_is_replaced_by_the_next_run_of_its_query(engine: FakeEngine) -> None:
    stored: dict[str, Any] = {}
    history.Entries(stored, engine.jobs).add(PageState(text="a"), "text=a", {"search": finished(engine)})
    later = history.Entries(stored, JobTable())
    (expired,) = later
    assert later.results_of(expired) == later.latest(PageState(text="a")) == {}
    job = finished(engine)
    later.add(PageState(text="a"), "text=a", {"search": job})
    assert [entry["results"] for entry in later] == [{"search": [job.id]}]


def test_entry_shows_the_jobs_that_have_not_expired(engine: FakeEngine) -> None:
    kept, gone = finished(engine), Job(GenerateRequest(prompt="a"))
    entries = history.Entries({}, engine.jobs)
    results = {"trees": "is busy", "birds": kept, "fish": gone}
    entries.add(PageState(tab="compare", text="a"), "tab=compare&text=a", results)
    assert entries.latest(PageState(tab="compare", text="a")) == {"trees": "is busy", "birds": kept}
