"""Micro-batching: a bounded queue, and one thread that runs groups of equal requests.

    put -> queue -> the oldest ticket and all others with its key -> run

The thread never waits for a full batch: while one batch runs, the next one gathers. Requests that arrive one by one
therefore run at once, and many clients fill the batches by themselves.
"""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

from tasks.serve.service.errors import QueueFullError, ServiceClosedError
from tasks.serve.service.jobs import Job

_LATEST_BATCHES = 20
_LEAST_RETRY_S = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ticket:
    """A job in the queue.

    Attributes:
        job: The job.
        plan: What to run, and on which versions.
        key: Tickets with equal keys may run together.
        size: Share of the maximum size of a batch.
        queued: Time of the submission, in seconds of ``time.monotonic``.
    """

    job: Job
    plan: Any
    key: Hashable
    size: int = 1
    queued: float = dataclasses.field(default_factory=time.monotonic)


class BatchQueue:
    """A bounded queue with one thread. Thread-safe."""

    def __init__(
        self,
        name: str,
        run: Callable[[list[Ticket]], None],
        *,
        capacity: int,
        batch: int,
        wait_s: float = 0.0,
        max_wait_s: float = 300.0,
    ) -> None:
        """Create an empty queue; :meth:`start` starts its thread.

        Args:
            name: Name of the lane, in metrics and of the thread.
            run: Runs a batch and finishes its jobs. It must not raise.
            capacity: Maximum number of waiting tickets.
            batch: Maximum sum of the sizes in a batch. A larger ticket runs alone.
            wait_s: Seconds that the oldest ticket waits at most for a full batch.
            max_wait_s: Age at which a waiting ticket is rejected.
        """
        self.name, self._run = name, run
        self._capacity, self._batch, self._wait_s, self._max_wait_s = capacity, batch, wait_s, max_wait_s
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._seconds: deque[float] = deque(maxlen=_LATEST_BATCHES)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"{name} lane", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, ticket: Ticket) -> None:
        """Add a ticket. Raises ``QueueFullError`` or ``ServiceClosedError``."""
        with self._changed:
            if self._closed:
                raise ServiceClosedError("the service is shutting down; try again later")
            if len(self._waiting) >= self._capacity:
                self._drop_finished()
            if len(self._waiting) >= self._capacity:
                raise self._full(f"too many requests are waiting: {len(self._waiting)}; try again later")
            self._waiting.append(ticket)
            self._changed.notify_all()

    def position(self, job: Job) -> int | None:
        """Return the number of jobs before ``job`` in the queue; None if it does not wait."""
        with self._changed:
            waiting = (ticket.job for ticket in self._waiting if not ticket.job.future.done())
            return next((number for number, other in enumerate(waiting) if other is job), None)

    def expire(self) -> None:
        """Reject the tickets that have waited too long. The thread itself does so between batches only."""
        with self._changed:
            self._drop_finished()

    def depth(self) -> int:
        """Return the number of waiting tickets."""
        return len(self._waiting)

    def in_flight(self) -> int:
        """Return the number of tickets that run."""
        return len(self._running)

    def close(self, deadline: float) -> None:
        """Accept no more tickets, wait until all have run or until ``deadline``, and fail the rest.

        The deadline is in seconds of ``time.monotonic``. The thread ends after its current batch.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._thread.ident is not None:
                self._changed.wait_for(
                    lambda: not self._waiting and not self._running, max(0.0, deadline - time.monotonic())
                )
            rest = [*self._waiting, *self._running]
            self._waiting.clear()
            self._changed.notify_all()
        for ticket in rest:
            ticket.job.fail(ServiceClosedError("the service was shut down before the request was finished"))

    def _work(self) -> None:
        while batch := self._next():
            started = time.monotonic()
            self._run(batch)
            with self._changed:
                self._running = []
                self._seconds.append(time.monotonic() - started)
                self._changed.notify_all()
            del batch  # the next one may come much later, and the tickets keep images and versions

    def _next(self) -> list[Ticket]:
        """Wait for the next batch, and mark it as running. Return nothing if the queue is closed and empty."""
        with self._changed:
            while True:
                self._drop_finished()
                if self._waiting:
                    batch = self._oldest_group()
                    missing_s = self._wait_s - (time.monotonic() - self._waiting[0].queued)
                    if self._closed or missing_s <= 0 or sum(ticket.size for ticket in batch) >= self._batch:
                        for ticket in batch:
                            self._waiting.remove(ticket)
                        self._running = batch
                        return batch
                    del batch
                    self._changed.wait(missing_s)
                elif self._closed:
                    return []
                else:
                    self._changed.wait()

    def _oldest_group(self) -> list[Ticket]:
        """Return the oldest ticket and those with its key that fit into the batch, in order."""
        first, batch, room = self._waiting[0], [], self._batch
        for ticket in self._waiting:
            if ticket.key == first.key and (ticket is first or ticket.size <= room):
                batch.append(ticket)
                room -= ticket.size
        return batch

    def _drop_finished(self) -> None:
        """Remove the tickets of cancelled jobs, and reject those that waited too long."""
        oldest = time.monotonic() - self._max_wait_s
        for ticket in self._waiting:
            if ticket.queued < oldest:
                ticket.job.fail(self._full("the request waited too long in the queue; try again later"))
        if any(ticket.job.future.done() for ticket in self._waiting):
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.job.future.done())

    def _full(self, line: str) -> QueueFullError:
        """Return the error with the expected time until the next batch takes tickets from the queue."""
        usual_s = sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
        return QueueFullError(line, retry_after_s=max(_LEAST_RETRY_S, usual_s))
