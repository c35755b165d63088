"""Execution on Ray: map shards over actors, run one function on a worker, and call groups of actors.

Workers get references and settings, and read the data themselves. Their exceptions reach the caller unchanged.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import ray
from ray.exceptions import RayError, RayTaskError

from infra import uris
from infra.compute import interruptible, local_ray, ray_token
from infra.compute.actor_pool import SHARD_TRIES, ActorPool, one_line
from infra.compute.interruptible import interruptions
from infra.compute.progress import progress_bar
from infra.errors import InputError, StageError, TransientError
from infra.progress import ProgressBar
from infra.quiet import QUIET

Item = TypeVar("Item", contravariant=True)
Result = TypeVar("Result", covariant=True)


class Worker(Protocol[Item, Result]):
    """Callable that is built once on an actor and called for each shard."""

    def __call__(self, item: Item) -> Result:
        """Process one shard and return what its manifest needs."""
        ...


@runtime_checkable
class IsolatingWorker(Protocol):
    """Worker that can process a shard despite an item that kills the process."""

    def isolated(self, item: Any) -> Any:
        """Process a shard that killed workers, running the dangerous part in a child process."""
        ...


@contextmanager
def cluster(address: str | None = None, cores: int | None = None) -> Iterator[None]:
    """Provide Ray within the block: the cluster at ``address``, or a local cluster with ``cores``.

    Ray starts when the first stage needs it, so a flow whose stages are all committed does not start it. Nested blocks
    share the outer cluster.
    """
    global _address, _cores, _depth
    if _depth == 0:
        _address, _cores = address, cores
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            ray.shutdown()
            _reinstall_handler()
            _local_cluster.close()


def cpus() -> int:
    """Return the number of CPU cores of the cluster."""
    start()
    return int(ray.cluster_resources().get("CPU", 1))


def gpus() -> float:
    """Return the number of GPUs of the cluster."""
    start()
    return float(ray.cluster_resources().get("GPU", 0))


def clamp_cpus(wanted: float, gpus: float = 0) -> float:
    """Limit ``wanted`` to the cores of the largest machine with ``gpus`` GPUs. Ray would wait indefinitely for more."""
    return min(wanted, max((one.get("CPU", 0) for one in _machines() if one.get("GPU", 0) >= gpus), default=wanted))


def _machines() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def capacity(cpus_each: float, gpus_each: float = 0) -> int:
    """Return the number of workers of this size that the machines can run at once.

    Raises ``StageError`` if no machine has ``gpus_each`` GPUs, because Ray would wait for one indefinitely.
    """
    machines = _machines()
    largest = max((machine.get("GPU", 0) for machine in machines), default=0)
    if gpus_each > largest:
        raise StageError(
            f"{gpus_each:g} GPUs per worker requested, but the largest machine has {largest:g}; request no more than "
            "that, or use a cluster with GPUs (KNN_DIFFUSION_RAY_ADDRESS)"
        )
    requested = [(name, each) for name, each in (("CPU", cpus_each), ("GPU", gpus_each)) if each]
    if not requested:
        return sys.maxsize
    return sum(min(int(machine.get(name, 0) / each + _ROUNDING) for name, each in requested) for machine in machines)


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
    """Yield results in order of completion, and a :class:`~infra.compute.actor_pool.FailedShard` for a failed shard.

    Each actor builds ``factory(*settings)`` once and holds at most two shards. If an actor dies, its shards go to the
    others and to a replacement, which gets shards only once it has started: after the loss of a machine the cluster may
    have no room for it. After the second death of actors that held a shard, an :class:`IsolatingWorker` processes the
    shard in isolation.

    Args:
        factory: Builds the worker on its actor.
        settings: Arguments of ``factory``.
        items: One item per shard.
        actors: Maximum number of actors.
        cpus_per_actor: CPU cores of each actor.
        gpus_per_actor: GPUs of each actor.
        concurrency: Threads of an actor that call its worker, each with one shard.
        description: Label of the progress bar.
    """
    queue = list(items)
    if not queue:
        return
    start()
    cpus_per_actor = clamp_cpus(cpus_per_actor, gpus_per_actor)
    kind = _ACTOR.options(num_cpus=cpus_per_actor, num_gpus=gpus_per_actor, max_concurrency=concurrency)
    # A shard given to an actor that never starts would wait indefinitely.
    size = min(actors, len(queue), max(1, capacity(cpus_per_actor, gpus_per_actor)))
    with (
        ProgressBar(total=len(queue), desc=description, unit="shard", leave=False) as progress,
        contextlib.closing(ActorPool(lambda: kind.remote(factory, settings, uris.secrets()), queue, size)) as pool,
    ):
        for result in pool.results():
            progress.update()
            yield result


class ActorGroup:
    """Group of long-lived workers that are called together. A worker that dies is rebuilt if the cluster has room."""

    def __init__(self, actors: Sequence[Any], cpus_each: float) -> None:
        """Store the actors, which reserve ``cpus_each`` cores each."""
        self._actors, self._cpus_each = list(actors), cpus_each

    def call(self, item: Any, of: int | None = None) -> list[Any]:
        """Call every worker, or only worker number ``of``, with ``item`` and return the results in order.

        Raises:
            TransientError: A worker was lost and the cluster has no room to rebuild it.
            Exception: Any error of a worker, unchanged.
        """
        called = self._actors if of is None else [self._actors[of]]
        answers = [actor.run.remote(item) for actor in called]
        try:
            with interruptions():
                while ray.wait(answers, num_returns=len(answers), timeout=_CHECK_S)[1]:
                    self._require_room()
                return list(ray.get(answers))
        except RayTaskError as error:
            raise (error.cause or error) from None
        except RayError as error:
            raise TransientError(
                f"a worker was lost and could not be rebuilt ({one_line(error)}); try again"
            ) from error

    def _require_room(self) -> None:
        room = capacity(self._cpus_each)
        if room < len(self._actors):
            raise TransientError(
                f"a machine was lost: {len(self._actors)} workers of {self._cpus_each:g} cores are needed, the cluster "
                f"has room for {room}; try again once it is back"
            )


@contextmanager
def actor_group(
    factory: Callable[..., Worker[Any, Any]], settings: Sequence[tuple[Any, ...]], *, cpus_each: float = 1
) -> Iterator[ActorGroup]:
    """Run a worker ``factory(*one)`` for each of ``settings``, spread over the cluster's machines, within the block.

    Raises ``StageError`` if the cluster has no room for all workers and does not grow.
    """
    start()
    cpus_each = clamp_cpus(cpus_each)
    options = {"num_cpus": cpus_each, "max_restarts": -1, "scheduling_strategy": "SPREAD"}
    kind = _ACTOR.options(**options, max_task_retries=SHARD_TRIES)
    actors = [kind.remote(factory, one, uris.secrets()) for one in settings]
    try:
        begun = [actor.ready.remote() for actor in actors]
        with interruptions():
            running, waiting = ray.wait(begun, num_returns=len(actors), timeout=_START_S)
        try:
            ray.get(running)
        except RayError as error:
            raise StageError(f"no worker could be started ({one_line(error)}); see Ray's logs") from error
        if waiting:
            raise StageError(
                f"{len(waiting)} of {len(actors)} workers of {cpus_each:g} cores did not start in {_START_S:g} s; the "
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
        watch: Folder URI to which the function reports :class:`Progress`, shown as a bar. Default: no bar.

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
            return ray.get(remote.remote(function, arguments, uris.secrets()))
    except RayTaskError as error:
        raise (error.cause or error) from None
    except RayError as error:
        raise StageError(
            f"the worker of {function.__name__} was lost ({one_line(error)}); give it more memory, or see Ray's logs, "
            "and run again"
        ) from error


_CHECKOUT = Path(__file__).parents[2]
_IS_CHECKOUT = (_CHECKOUT / "pyproject.toml").exists()
_address: str | None = None
_cores: int | None = None
_depth = 0
_local_cluster = contextlib.ExitStack()
_START_S = 180.0  # time limit for the workers of a group to start
_ROUNDING = 1e-6  # five workers of 0.2 cores fit on one core, despite rounding errors
_CHECK_S = 30.0  # interval of checks that the cluster still has room for workers that do not answer


class _Actor:
    """Worker in its own process, built at its first item so that errors of the factory reach the caller unchanged."""

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


_ACTOR: Any = ray.remote(_Actor)

# Ray warns about each start that leaves the handler alone, as _init wants.
logging.getLogger("ray._private.worker").addFilter(lambda record: "SIGTERM handler" not in record.getMessage())


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], secrets: Mapping[str, str]) -> Any:
    uris.learn(secrets)
    return function(*arguments)


def start() -> None:
    """Start or join Ray, if that has not happened yet.

    Raises ``StageError`` outside :func:`cluster` or if no cluster answers, and ``InputError`` for a malformed address.
    """
    if ray.is_initialized():
        return
    if _depth == 0:
        raise StageError("no Ray cluster is open; run stages inside compute.cluster()")
    options: dict[str, Any] = {"address": _address, "runtime_env": _shipped_checkout()}
    if _address is None:
        options = {
            "address": "local",
            "num_cpus": _cores or len(os.sched_getaffinity(0)),
            "include_dashboard": False,
            "object_store_memory": 256 << 20,
            "runtime_env": {
                "env_vars": {
                    **({"PYTHONPATH": str(_CHECKOUT)} if _IS_CHECKOUT else {}),
                    **QUIET,
                    "OMP_WAIT_POLICY": "PASSIVE",  # spinning idle threads slow each other down on shared cores
                }
            },
        }
    quiet = {"logging_level": logging.ERROR, "configure_logging": False, "log_to_driver": False}
    try:
        if _address is None:
            _local_cluster.enter_context(local_ray.private_token())
            with local_ray.loopback():
                _init(_temp_dir=local_ray.session_folder(), **quiet, **options)
        else:
            with local_ray.loopback_of(_address):
                _local_cluster.enter_context(ray_token.cluster_token(_address))
                _init(**quiet, **options)
    except ValueError as error:
        if _address is None:
            raise
        raise InputError(
            f"not an address of a Ray cluster: {_address} ({error}); use HOST:PORT, ray://HOST:PORT or auto"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise StageError(
            f"no Ray cluster at {_address or 'this machine'} ({one_line(error)}); start one, or unset the address"
        ) from error


def _init(**options: Any) -> None:
    """Call ``ray.init`` so that the caller's SIGTERM handler remains, and interrupts it.

    In the main thread Ray replaces the handler by one that ends the process. With Prefect's handler, a cancelled run
    unwinds and ends as Cancelled instead of Crashed. Without an earlier handler Ray's is useful: it ends the processes
    of a local cluster.
    """
    if callable(signal.getsignal(signal.SIGTERM)) and threading.current_thread() is threading.main_thread():
        # The processes of a local cluster end with the thread that started them.
        _local_cluster.callback((ended := threading.Event()).set)
        interruptible.call(lambda: ray.init(**options), until=ended)
        _reinstall_handler()
    else:
        ray.init(**options)


def _reinstall_handler() -> None:
    """Install Python's SIGTERM handler again: Ray's native code replaces it at the start and resets it at the end."""
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _shipped_checkout() -> dict[str, Any]:
    """Return the runtime environment that ships a checkout. An installed package must be on the machines already."""
    if not _IS_CHECKOUT:
        return {}
    return {"working_dir": str(_CHECKOUT), "excludes": [".venv", "build", ".git", "tests", "knn-diffusion-data"]}
