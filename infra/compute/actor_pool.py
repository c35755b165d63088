"""Fault-tolerant pool of Ray actors that share a queue of shards."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from infra.compute import interruptible
from infra.errors import StageError

SHARD_TRIES = 3
"""Attempts at a shard whose worker dies while it holds no other shard. Exceptions of a worker are not retried here."""
ISOLATED_AFTER = 2
"""Number of deaths of workers that held a shard after which its items are processed in isolation."""
_SHARDS_PER_ACTOR = 2  # one being processed and one queued


def one_line(error: RayError) -> str:
    """Return a Ray error message on one line."""
    return " ".join(str(error).split())


class FailedShard:
    """Shard that could not be processed, and its error."""

    def __init__(self, item: Any, error: BaseException) -> None:
        """Store the item and its last error."""
        self.item, self.error = item, error


@dataclasses.dataclass(eq=False, slots=True)
class _Shard:
    """Shard in the queue or with an actor, and the deaths of actors that held it."""

    item: Any
    deaths: int = 0
    seen: int = 0  # deaths while an actor held this shard, possibly caused by another shard

    @property
    def suspect(self) -> bool:
        """Return True if a worker may have died of this shard."""
        return self.seen > 0

    @property
    def isolate(self) -> bool:
        """Return True if one of its items most likely kills workers, which only isolation can find."""
        return self.seen >= ISOLATED_AFTER


@dataclasses.dataclass(eq=False, slots=True)
class _Slot:
    """Actor, whether it has started, and the shards it holds."""

    actor: Any
    runs: bool = False
    held: list[_Shard] = dataclasses.field(default_factory=list)

    def takes(self, shard: _Shard) -> bool:
        """Return True if there is room for ``shard``. A suspect shares an actor with no other shard."""
        return not self.held or (len(self.held) < _SHARDS_PER_ACTOR and not shard.suspect and not self.held[0].suspect)


class ActorPool:
    """Pool of actors with methods ``ready()`` and ``run(item, isolate)``.

    With ``isolate`` an actor processes a shard item by item, so that an item that kills the process fails alone. The
    shards of a dead actor go to the other actors and to its replacement. From then on each of them is processed
    alone, so that the next death identifies the culprit. An actor gets shards only once it has started, because the
    cluster may have no room for it after the loss of a machine.
    """

    def __init__(self, start: Callable[[], Any], items: Iterable[Any], size: int) -> None:
        """Start ``size`` actors, each created by ``start()``, and queue ``items``."""
        self._start, self._size = start, size
        self._waiting = deque(_Shard(item) for item in items)
        self._slots: list[_Slot] = []
        self._pending: dict[Any, tuple[_Slot, _Shard | None]] = {}
        self._failed_starts = 0
        for _ in range(size):
            self._add_slot()

    def results(self) -> Iterator[Any]:
        """Yield the results of ``run`` in order of completion, and a :class:`FailedShard` for each shard that failed.

        Raises ``StageError`` if actors repeatedly die before they start.
        """
        while self._waiting or any(shard for _, shard in self._pending.values()):
            (done,), _ = interruptible.wait(list(self._pending))
            slot, shard = self._pending.pop(done)
            try:
                (result,) = interruptible.get([done])
            except RayTaskError as error:
                result = FailedShard(shard.item if shard else None, error.cause or error)
            except RayError as error:  # crash, out of memory, failed environment, or lost return value
                self._replace(slot)
                if shard is None:
                    self._failed_starts += 1
                    if self._failed_starts > SHARD_TRIES * self._size:
                        raise StageError(f"no worker could be started ({one_line(error)}); see Ray's logs") from error
                    continue
                shard.deaths += len(slot.held) == 1
                shard.seen += 1
                if shard.deaths < SHARD_TRIES:
                    self._waiting.insert(sum(other.suspect for other in self._waiting), shard)  # suspects go first
                    self._feed()
                    continue
                result = FailedShard(shard.item, error)
            if shard is None:
                slot.runs = True
                self._feed()
                continue
            slot.held.remove(shard)
            self._feed()
            yield result

    def close(self) -> None:
        """Kill the actors, including their unfinished shards."""
        for slot in self._slots:
            ray.kill(slot.actor)

    def _add_slot(self) -> None:
        slot = _Slot(self._start())
        self._slots.append(slot)
        self._pending[slot.actor.ready.remote()] = (slot, None)

    def _replace(self, slot: _Slot) -> None:
        if slot in self._slots:  # otherwise replaced already, for another of its shards
            self._slots.remove(slot)
            ray.kill(slot.actor)
            self._add_slot()

    def _feed(self) -> None:
        """Give every started actor one shard before any actor gets two."""
        for held in range(_SHARDS_PER_ACTOR):
            for slot in self._slots:
                if self._waiting and slot.runs and len(slot.held) <= held and slot.takes(self._waiting[0]):
                    shard = self._waiting.popleft()
                    self._pending[slot.actor.run.remote(shard.item, shard.isolate)] = (slot, shard)
                    slot.held.append(shard)
