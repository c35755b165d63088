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
"""Number of actor deaths after which a shard fails. A death counts if the actor held no other shard.

Exceptions of a worker are not retried.
"""
ISOLATED_AFTER = 2
"""Number of actor deaths after which the items of a shard are isolated. Deaths count even if other shards were held."""
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
    """Shard in the queue or on an actor, with the number of actors that died while they held it."""

    item: Any
    deaths: int = 0  # possibly caused by another shard that the actor held
    deaths_alone: int = 0  # of actors that held no other shard

    @property
    def suspect(self) -> bool:
        """Return True if this shard may have killed an actor."""
        return self.deaths > 0

    @property
    def isolate(self) -> bool:
        """Return True if an item of this shard probably kills actors. Only isolation shows which one."""
        return self.deaths >= ISOLATED_AFTER


@dataclasses.dataclass(eq=False, slots=True)
class _Slot:
    """Place of an actor in the pool, with the shards that the actor holds."""

    actor: Any
    started: bool = False
    held: list[_Shard] = dataclasses.field(default_factory=list)

    def accepts(self, shard: _Shard) -> bool:
        """Return True if the actor has room for ``shard``. A suspect never shares an actor."""
        return not self.held or (len(self.held) < _SHARDS_PER_ACTOR and not shard.suspect and not self.held[0].suspect)


class ActorPool:
    """Pool of actors with methods ``ready()`` and ``run(item, isolate)``.

    With ``isolate`` an actor processes a shard item by item, so that an item that kills the process fails alone. The
    shards of a dead actor go to the other actors and to its replacement. From then on, none of them shares an actor, so
    that the next death identifies the culprit. An actor gets shards only once it has started, because the cluster may
    have no room for it after the loss of a machine.
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
                shard.deaths_alone += len(slot.held) == 1
                shard.deaths += 1
                if shard.deaths_alone < SHARD_TRIES:
                    suspects = sum(other.suspect for other in self._waiting)  # they are at the front of the queue
                    self._waiting.insert(suspects, shard)
                    self._assign_shards()
                    continue
                result = FailedShard(shard.item, error)
            if shard is None:
                slot.started = True
                self._assign_shards()
                continue
            slot.held.remove(shard)
            self._assign_shards()
            yield result

    def close(self) -> None:
        """Kill the actors. Their unfinished shards yield no results."""
        for slot in self._slots:
            ray.kill(slot.actor)

    def _add_slot(self) -> None:
        slot = _Slot(self._start())
        self._slots.append(slot)
        self._pending[slot.actor.ready.remote()] = (slot, None)

    def _replace(self, slot: _Slot) -> None:
        if slot in self._slots:  # otherwise the failure of another of its shards replaced it
            self._slots.remove(slot)
            ray.kill(slot.actor)
            self._add_slot()

    def _assign_shards(self) -> None:
        """Give every started actor one shard before any actor gets two."""
        for held in range(_SHARDS_PER_ACTOR):
            for slot in self._slots:
                if self._waiting and slot.started and len(slot.held) <= held and slot.accepts(self._waiting[0]):
                    shard = self._waiting.popleft()
                    self._pending[slot.actor.run.remote(shard.item, shard.isolate)] = (slot, shard)
                    slot.held.append(shard)
