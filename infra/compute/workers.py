"""Ray workers: actors that process shards, single function calls, and groups of long-lived actors.

Workers receive references and settings, and read the data themselves. Their exceptions reach the caller unchanged.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

import ray
from ray.exceptions import RayError, RayTaskError

from infra import uris
from infra.compute import interruptible
from infra.compute.actor_pool import SHARD_TRIES, ActorPool, one_line
from infra.compute.progress import progress_bar
from infra.compute.ray_cluster import capacity, clamp_cpus, start
from infra.errors import StageError, TransientError
from infra.progress import ProgressBar

Item = TypeVar("Item", contravariant=True)
Result = TypeVar("Result", covariant=True)
_START_S = 180.0  # time limit for the workers of a group to start
_CHECK_S = 30.0  # interval of checks that the cluster still has room for a group, while its results are awaited


class Worker(Protocol[Item, Result]):
    """Callable that is built once on an actor and called for each shard."""

    def __call__(self, item: Item) -> Result:
        """Process one shard and return its result."""
        ...


@runtime_checkable
class IsolatingWorker(Protocol):
    """Worker that can process a shard even if one of its items kills the process."""

    def isolated(self, item: Any) -> Any:
        """Process a shard that killed workers, running the dangerous part in a child process."""
        ...


class _Actor:
    """Ray actor that builds its worker at the first item, so that errors of the factory reach the caller unchanged."""

    def __init__(
        self, factory: Callable[..., Worker[Any, Any]], settings: tuple[Any, ...], secrets: Mapping[str, str]
    ) -> None:
        uris.learn(secrets)
        self._factory, self._settings = factory, settings
        self._worker: Worker[Any, Any] | None = None
        self._build_lock = threading.Lock()

    def ready(self) -> None:
        """Return as soon as the process runs."""

    def run(self, item: Any, isolate: bool = False) -> Any:
        with self._build_lock:
            self._worker = self._worker or self._factory(*self._settings)
        if isolate and isinstance(self._worker, IsolatingWorker):
            return self._worker.isolated(item)
        return self._worker(item)


_RemoteActor: Any = ray.remote(_Actor)


def map_shards(
    factory: Callable[..., Worker[Any, Any]],
    settings: tuple[Any, ...],
    items: Iterable[Any],
    *,
    actors: int,
    cpus_per_actor: float = 1,
    gpus_per_actor: float = 0,
    concurrency: int = 1,
    description: str,
) -> Iterator[Any]:
    """Yield the result of each shard, or its :class:`~infra.compute.actor_pool.FailedShard`, in order of completion.

    Each actor builds ``factory(*settings)`` once and holds at most two shards. If an actor dies, its shards go to the
    other actors and to a replacement. After the loss of a machine, the cluster may have no room for the replacement, so
    it gets shards only once it has started. If two actors die while they hold a shard, an :class:`IsolatingWorker`
    processes it in isolation.

    Args:
        factory: Builds the worker on its actor.
        settings: Arguments of ``factory``.
        items: One item per shard.
        actors: Maximum number of actors.
        cpus_per_actor: CPU cores of each actor.
        gpus_per_actor: GPUs of each actor.
        concurrency: Number of shards that an actor processes at once, each in a thread.
        description: Label of the progress bar.
    """
    queue = list(items)
    if not queue:
        return
    start()
    cpus_per_actor = clamp_cpus(cpus_per_actor, gpus_per_actor)
    actor_class = _RemoteActor.options(num_cpus=cpus_per_actor, num_gpus=gpus_per_actor, max_concurrency=concurrency)
    # Actors for which the cluster has no room would never start.
    size = min(actors, len(queue), max(1, capacity(cpus_per_actor, gpus_per_actor)))
    with (
        ProgressBar(total=len(queue), desc=description, unit="shard", leave=False) as progress,
        contextlib.closing(
            ActorPool(lambda: actor_class.remote(factory, settings, uris.secrets()), queue, size)
        ) as pool,
    ):
        for result in pool.results():
            progress.update()
            yield result


class ActorGroup:
    """Group of long-lived workers that are called together. A worker that dies is restarted if the cluster has room."""

    def __init__(self, actors: Sequence[Any], cpus_each: float) -> None:
        """Store the actors, which reserve ``cpus_each`` cores each."""
        self._actors, self._cpus_each = list(actors), cpus_each

    def call(self, item: Any, of: int | None = None) -> list[Any]:
        """Call every worker, or only worker number ``of``, with ``item`` and return the results in order.

        Raises:
            TransientError: A worker was lost and the cluster has no room to restart it.
            Exception: Any error of a worker, unchanged.
        """
        called = self._actors if of is None else [self._actors[of]]
        results = [actor.run.remote(item) for actor in called]
        try:
            while interruptible.wait(results, len(results), _CHECK_S)[1]:
                self._require_room()
            return interruptible.get(results)
        except RayTaskError as error:
            raise (error.cause or error) from None
        except RayError as error:
            raise TransientError(
                f"a worker was lost and could not be restarted ({one_line(error)}); try again"
            ) from error

    def _require_room(self) -> None:
        room = capacity(self._cpus_each)
        if room < len(self._actors):
            raise TransientError(
                f"a machine was lost: {len(self._actors)} workers of {self._cpus_each:g} cores are needed, but the "
                f"cluster has room for {room}; try again once the machine is back"
            )


@contextmanager
def actor_group(
    factory: Callable[..., Worker[Any, Any]], settings: Sequence[tuple[Any, ...]], *, cpus_each: float = 1
) -> Iterator[ActorGroup]:
    """Run one worker ``factory(*arguments)`` for each entry of ``settings`` within the block, spread over the machines.

    Raises ``StageError`` if the cluster has no room for all workers and does not grow.
    """
    start()
    cpus_each = clamp_cpus(cpus_each)
    options = {"num_cpus": cpus_each, "max_restarts": -1, "scheduling_strategy": "SPREAD"}
    actor_class = _RemoteActor.options(**options, max_task_retries=SHARD_TRIES)
    actors = [actor_class.remote(factory, arguments, uris.secrets()) for arguments in settings]
    try:
        starts = [actor.ready.remote() for actor in actors]
        started, starting = interruptible.wait(starts, len(actors), _START_S)
        try:
            interruptible.get(started)
        except RayError as error:
            raise StageError(f"no worker could be started ({one_line(error)}); see Ray's logs") from error
        if starting:
            raise StageError(
                f"{len(starting)} of {len(actors)} workers of {cpus_each:g} cores did not start in {_START_S:g} s; the "
                f"cluster has room for {capacity(cpus_each)}, shared with other jobs; use fewer or smaller workers"
            )
        yield ActorGroup(actors, cpus_each)
    finally:
        for actor in actors:
            ray.kill(actor)


def run(
    function: Callable[..., Any], *arguments: Any, cpus: float = 1, gpus: float = 0, watch: str | None = None
) -> Any:
    """Return ``function(*arguments)``, computed on a worker.

    Args:
        function: A picklable function.
        arguments: Its arguments.
        cpus: CPU cores of the worker.
        gpus: GPUs of the worker.
        watch: Folder URI to which the function writes its :class:`Progress`, shown as a bar. Default: no bar.

    Raises:
        StageError: No machine has ``gpus`` GPUs, or the worker died on every attempt.
        Exception: Any error of the function, unchanged.
    """
    start()
    cpus = clamp_cpus(cpus, gpus)
    capacity(cpus, gpus)  # raises if no machine has the GPUs
    remote = ray.remote(_call).options(num_cpus=cpus, num_gpus=gpus, max_retries=SHARD_TRIES)
    try:
        with progress_bar(watch, function.__name__) if watch else contextlib.nullcontext():
            return interruptible.get([remote.remote(function, arguments, uris.secrets())])[0]
    except RayTaskError as error:
        raise (error.cause or error) from None
    except RayError as error:
        raise StageError(
            f"the worker of {function.__name__} was lost ({one_line(error)}); give it more memory, or see Ray's logs, "
            "and run again"
        ) from error


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], secrets: Mapping[str, str]) -> Any:
    uris.learn(secrets)
    return function(*arguments)
