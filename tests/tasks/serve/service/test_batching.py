"""Micro-batching: order, groups, bounds, cancellation and shutdown, without a model."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from infra.errors import KNNDiffusionError
from tasks.serve.service.batching import BatchQueue, Ticket
from tasks.serve.service.errors import JobCancelledError, QueueFullError, ServiceClosedError
from tasks.serve.service.jobs import Job
from tasks.serve.service.requests import SearchRequest
from tasks.serve.service.responses import SearchResponse, ServedVersion

VERSION = ServedVersion(name="tiny", version=1, rows=1, generation=0)
RESPONSE = SearchResponse(model="tiny", database=VERSION, encoder="tiny", settings={}, hits=[])


class Runner:
    """Runner that blocks until ``free`` is set and records the keys and sizes of each batch."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.free = threading.Event()
        self.running = threading.Event()

    def __call__(self, tickets: list[Ticket]) -> None:
        self.batches.append([(ticket.key, ticket.size) for ticket in tickets])
        self.running.set()
        assert self.free.wait(10)
        for ticket in tickets:
            if ticket.job.begin():
                ticket.job.finish(RESPONSE)


@pytest.fixture
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.free.set()


def started_queue(runner: Runner, **options: Any) -> BatchQueue:
    queue = BatchQueue("test", runner, **{"capacity": 10, "batch": 4} | options)
    queue.start()
    return queue


def ticket(queue: BatchQueue, key: object = "a", size: int = 1) -> Ticket:
    return Ticket(job=Job(SearchRequest(text="x"), queue.position), plan=None, key=key, size=size)


def put(queue: BatchQueue, *sizes: int, key: object = "a") -> list[Ticket]:
    added = [ticket(queue, key, size) for size in sizes]
    for one in added:
        queue.put(one)
    return added


def put_first(queue: BatchQueue, runner: Runner) -> Ticket:
    """Add a ticket and wait until it runs, so that later ones wait behind it."""
    (first,) = put(queue, 1, key="first")
    assert runner.running.wait(10)
    return first


def test_queue_batches_oldest_ticket_with_others_of_its_key(runner: Runner) -> None:
    queue = started_queue(runner)
    put_first(queue, runner)
    waiting = [*put(queue, 1, key="a"), *put(queue, 1, key="b"), *put(queue, 1, 1, key="a")]
    runner.free.set()
    for one in waiting:
        assert one.job.future.result(10) is RESPONSE
    assert runner.batches == [[("first", 1)], [("a", 1)] * 3, [("b", 1)]]


def test_queue_fills_batches_up_to_their_size_and_runs_larger_tickets_alone(runner: Runner) -> None:
    queue = started_queue(runner)
    put_first(queue, runner)
    waiting = put(queue, 3, 2, 1, 9, 1)
    runner.free.set()
    for one in waiting:
        one.job.future.result(10)
    sizes = [[size for _, size in batch] for batch in runner.batches[1:]]
    assert sizes == [[3, 1], [2, 1], [9]]


def test_full_queue_rejects_with_mean_batch_time(runner: Runner) -> None:
    queue = started_queue(runner, capacity=2)
    put_first(queue, runner)
    put(queue, 1, 1)
    queue._seconds.extend([1.0, 1.0, 10.0])
    with pytest.raises(QueueFullError, match="too many requests are waiting: 2") as caught:
        queue.put(ticket(queue))
    assert caught.value.retry_after_s == 4.0


def test_position_counts_jobs_ahead(runner: Runner) -> None:
    queue = started_queue(runner)
    first = put_first(queue, runner)
    waiting = put(queue, 1, 1, 1)
    waiting[1].job.cancel()
    assert [one.job.status().position for one in waiting] == [0, None, 1]
    assert queue.position(first.job) is None


def test_cancelled_tickets_free_their_places_and_never_run(runner: Runner) -> None:
    queue = started_queue(runner, capacity=1)
    put_first(queue, runner)
    (cancelled,) = put(queue, 1, key="cancelled")
    cancelled.job.cancel()
    (other,) = put(queue, 1, key="other")
    runner.free.set()
    assert other.job.future.result(10) is RESPONSE
    assert runner.batches == [[("first", 1)], [("other", 1)]]
    with pytest.raises(JobCancelledError):
        cancelled.job.future.result(0)


def test_ticket_that_waits_too_long_is_rejected(runner: Runner) -> None:
    queue = started_queue(runner, max_wait_s=0.01)
    put_first(queue, runner)
    (late,) = put(queue, 1)
    time.sleep(0.02)
    runner.free.set()
    with pytest.raises(QueueFullError, match="waited too long"):
        late.job.future.result(10)


def test_ticket_that_waits_too_long_is_rejected_while_a_batch_runs(runner: Runner) -> None:
    queue = started_queue(runner, max_wait_s=0.01)
    put_first(queue, runner)
    (late,) = put(queue, 1)
    time.sleep(0.02)
    queue.expire()
    assert isinstance(late.job.future.exception(0), QueueFullError)
    assert queue.depth() == 0


def test_close_runs_accepted_tickets_and_rejects_new_ones(runner: Runner) -> None:
    queue = started_queue(runner)
    tickets = [put_first(queue, runner), *put(queue, 1, 1)]
    closing = threading.Thread(target=queue.close, args=(time.monotonic() + 10,))
    closing.start()
    deadline = time.monotonic() + 10
    while not queue._closed:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    with pytest.raises(ServiceClosedError):
        queue.put(ticket(queue))
    runner.free.set()
    closing.join(10)
    assert [one.job.future.result(0) for one in tickets] == [RESPONSE] * 3


def test_close_at_the_deadline_fails_remaining_tickets(runner: Runner) -> None:
    queue = started_queue(runner)
    tickets = [put_first(queue, runner), *put(queue, 1)]
    queue.close(time.monotonic())
    for one in tickets:
        with pytest.raises(ServiceClosedError, match="shut down before"):
            one.job.future.result(0)
    assert queue.depth() == 0


def test_close_of_a_queue_that_was_never_started_fails_its_tickets(runner: Runner) -> None:
    queue = BatchQueue("test", runner, capacity=1, batch=1)
    (waiting,) = put(queue, 1)
    queue.close(time.monotonic() + 10)
    assert isinstance(waiting.job.future.exception(0), KNNDiffusionError)


def test_batch_that_is_not_full_waits_for_more(runner: Runner) -> None:
    runner.free.set()
    queue = started_queue(runner, wait_s=0.2, batch=2)
    tickets = put(queue, 1, 1)
    for one in tickets:
        one.job.future.result(10)
    assert runner.batches == [[("a", 1), ("a", 1)]]
