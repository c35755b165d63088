"""A crew of Ray actors that share a queue of shards, and what becomes of the shards when one dies."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from infra.errors import StageError

SHARD_TRIES = 3
"""How often a shard is tried when its worker dies under it alone; what a worker raises is not tried again here."""
ISOLATED_AFTER = 2
"""Deaths of workers that held a shard, after which its items are processed in isolation."""
_HELD = 2  # shards of an actor: one in hand, one that waits for it


def one_line(error: RayError) -> str:
    """What Ray says of a worker, which takes it many lines, in one."""
    return " ".join(str(error).split())


class FailedShard:
    """A shard that could not be processed, and why."""

    def __init__(self, item: Any, error: BaseException) -> None:
        """Keep the item and the error that ended it."""
        self.item, self.error = item, error


@dataclasses.dataclass(eq=False, slots=True)
class _Shard:
    """A shard, and how many actors have died under it alone."""

    item: Any
    deaths: int = 0
    seen: int = 0  # deaths while an actor held this one, perhaps for another's sake

    @property
    def suspect(self) -> bool:
        """Return True if a worker may have died of it."""
        return self.seen > 0

    @property
    def isolate(self) -> bool:
        """Return True if workers most likely die of one of its items, which only isolation can find."""
        return self.seen >= ISOLATED_AFTER


@dataclasses.dataclass(eq=False, slots=True)
class _Slot:
    """An actor, whether it runs yet, and the shards it holds."""

    actor: Any
    runs: bool = False
    held: list[_Shard] = dataclasses.field(default_factory=list)

    def takes(self, shard: _Shard) -> bool:
        """Whether there is room: a suspect is alone with its actor, so that no other pays for it."""
        return not self.held or (len(self.held) < _HELD and not shard.suspect and not self.held[0].suspect)


class ActorPool:
    """Actors with methods ``ready()`` and ``run(item, isolate)``.

    ``isolate`` asks to process a shard item by item, where an item that kills costs no other. The shards of an actor
    that dies go to the others, and to a new one in its place. From then on each is alone with its actor: which of them
    it died of shows when the next one dies. An actor is given shards once it runs: where a machine died there may be
    no room for another.
    """

    def __init__(self, start: Callable[[], Any], items: Iterable[Any], size: int) -> None:
        """Have ``size`` actors, each made by ``start()``, run ``items``."""
        self._start, self._size = start, size
        self._waiting = deque(_Shard(item) for item in items)
        self._seats: list[_Slot] = []
        self._pending: dict[Any, tuple[_Slot, _Shard | None]] = {}
        self._failed_starts = 0
        for _ in range(size):
            self._take_seat()

    def results(self) -> Iterator[Any]:
        """What ``run`` returned, in order of completion; a :class:`Lost` for a shard that failed.

        Raises ``StageError`` when actors die before they run.
        """
        while self._waiting or any(shard for _, shard in self._pending.values()):
            (done,), _ = ray.wait(list(self._pending), num_returns=1)
            seat, shard = self._pending.pop(done)
            try:
                result = ray.get(done)
            except RayTaskError as error:
                result = FailedShard(shard.item if shard else None, error.cause or error)
            except RayError as error:  # died, was killed for its memory, found no environment, lost what it returned
                self._replace(seat)
                if shard is None:
                    self._failed_starts += 1
                    if self._failed_starts > SHARD_TRIES * self._size:
                        raise StageError(f"no worker could be started ({one_line(error)}); see Ray's logs") from error
                    continue
                shard.deaths += len(seat.held) == 1
                shard.seen += 1
                if shard.deaths < SHARD_TRIES:
                    self._waiting.insert(sum(other.suspect for other in self._waiting), shard)  # suspects go first
                    self._feed()
                    continue
                result = FailedShard(shard.item, error)
            if shard is None:
                seat.runs = True
                self._feed()
                continue
            seat.held.remove(shard)
            self._feed()
            yield result

    def close(self) -> None:
        """End the actors, whatever they have in hand."""
        for seat in self._seats:
            ray.kill(seat.actor)

    def _take_seat(self) -> None:
        seat = _Slot(self._start())
        self._seats.append(seat)
        self._pending[seat.actor.ready.remote()] = (seat, None)

    def _replace(self, seat: _Slot) -> None:
        if seat in self._seats:  # not yet for another of its shards
            self._seats.remove(seat)
            ray.kill(seat.actor)
            self._take_seat()

    def _feed(self) -> None:
        """Give every running actor one shard before any has two."""
        for held in range(_HELD):
            for seat in self._seats:
                if self._waiting and seat.runs and len(seat.held) <= held and seat.takes(self._waiting[0]):
                    shard = self._waiting.popleft()
                    self._pending[seat.actor.run.remote(shard.item, shard.isolate)] = (seat, shard)
                    seat.held.append(shard)
