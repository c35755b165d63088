"""Ray: shards mapped over actors, bounded in flight; one function on a worker; Ray Train.

Workers get references and settings, and read the data themselves. What they raise comes back as it was raised.
"""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import ray
from ray.exceptions import RayError, RayTaskError
from tqdm.auto import tqdm

from infra import uris
from infra.compute import local_ray
from infra.compute.actor_pool import SHARD_TRIES, ActorPool, one_line
from infra.compute.progress import progress_bar
from infra.errors import InputError, StageError, TransientError

Item = TypeVar("Item", contravariant=True)
Result = TypeVar("Result", covariant=True)


class Worker(Protocol[Item, Result]):
    """What runs on an actor: built once there, then called for shard after shard."""

    def __call__(self, item: Item) -> Result:
        """Process one shard and return what the manifest needs to know of it."""
        ...


@runtime_checkable
class IsolatingWorker(Protocol):
    """A worker that can find which item of a shard kills it, and process the others."""

    def isolated(self, item: Any) -> Any:
        """Process a shard that workers died of, with what may kill in a child process."""
        ...


@contextmanager
def cluster(address: str | None = None, cores: int | None = None) -> Iterator[None]:
    """Ray for the length of a flow: the cluster at ``address``, or a local one of ``cores``.

    It is started when the first stage needs it, so a flow whose stages are all committed starts none. Nested uses share
    the outer one.
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
            _of_local_cluster.close()


def cpus() -> int:
    """Cores of the cluster."""
    start()
    return int(ray.cluster_resources().get("CPU", 1))


def gpus() -> float:
    """GPUs of the cluster."""
    start()
    return float(ray.cluster_resources().get("GPU", 0))


def clamp_cpus(wanted: float, gpus: float = 0) -> float:
    """``wanted`` cores, or all that the largest machine with so many GPUs has: more would wait for ever."""
    return min(wanted, max((one.get("CPU", 0) for one in _machines() if one.get("GPU", 0) >= gpus), default=wanted))


def _machines() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def capacity(cpus_each: float, gpus_each: float = 0) -> int:
    """How many workers of that size the machines hold at once.

    Raises ``StageError`` when no machine has so many GPUs: to wait for one is to wait for ever.
    """
    machines = _machines()
    largest = max((machine.get("GPU", 0) for machine in machines), default=0)
    if gpus_each > largest:
        raise StageError(
            f"{gpus_each:g} GPUs are asked for each worker, the largest machine has {largest:g}; ask for no more than "
            "that, or name a cluster with GPUs (KNN_DIFFUSION_RAY_ADDRESS)"
        )
    asked = [(name, each) for name, each in (("CPU", cpus_each), ("GPU", gpus_each)) if each]
    if not asked:
        return sys.maxsize
    return sum(min(int(machine.get(name, 0) / each + _ROUNDING) for name, each in asked) for machine in machines)


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
    """Results in order of completion; a :class:`infra.compute.actor_pool.FailedShard` stands for a shard that failed.

    Each actor builds ``factory(*settings)`` once and holds two shards at most, so a dead one costs little: its shards
    go to the others and to a new one, which is given some once it runs, for where its machine died there may be no
    room. After the second death of actors that held a shard, an :class:`IsolatingWorker` processes it in isolation.
    With a ``concurrency`` of 2, two threads of the actor call what was built, each with a shard.
    """
    queue = list(items)
    if not queue:
        return
    start()
    cpus_per_actor = clamp_cpus(cpus_per_actor, gpus_per_actor)
    kind = _ACTOR.options(num_cpus=cpus_per_actor, num_gpus=gpus_per_actor, max_concurrency=concurrency)
    # A shard given to an actor that never starts would wait for ever.
    size = min(actors, len(queue), max(1, capacity(cpus_per_actor, gpus_per_actor)))
    with (
        tqdm(total=len(queue), desc=description, unit="shard", leave=False) as progress,
        contextlib.closing(ActorPool(lambda: kind.remote(factory, settings, uris.secrets()), queue, size)) as crew,
    ):
        for result in crew.results():
            progress.update()
            yield result


class ActorGroup:
    """Workers that stay where they are placed and answer together; one that dies is built again where there is room."""

    def __init__(self, actors: Sequence[Any], cpus_each: float) -> None:
        """Ask ``actors``, which hold so many cores each."""
        self._actors, self._cpus_each = list(actors), cpus_each

    def ask(self, item: Any, of: int | None = None) -> list[Any]:
        """What every worker, or the one with number ``of``, returns for ``item``, in order.

        Raises as it was raised, and ``TransientError`` for a worker that was lost and has no room in the cluster.
        """
        asked = self._actors if of is None else [self._actors[of]]
        answers = [actor.run.remote(item) for actor in asked]
        try:
            while ray.wait(answers, num_returns=len(answers), timeout=_LOOK_S)[1]:
                self._require_room()
            return list(ray.get(answers))
        except RayTaskError as error:
            raise (error.cause or error) from None
        except RayError as error:
            raise TransientError(
                f"a worker was lost and could not be built again ({one_line(error)}); ask again"
            ) from error

    def _require_room(self) -> None:
        held = capacity(self._cpus_each)
        if held < len(self._actors):
            raise TransientError(
                f"a machine was lost: {len(self._actors)} workers of {self._cpus_each:g} cores are placed, the cluster "
                f"has room for {held}; ask again once it is back"
            )


@contextmanager
def actor_group(
    factory: Callable[..., Worker[Any, Any]], settings: Sequence[tuple[Any, ...]], *, cpus_each: float = 1
) -> Iterator[ActorGroup]:
    """A worker ``factory(*one)`` for each of ``settings``, spread over the machines of the cluster, until the end.

    Raises ``StageError`` where the cluster has no room for all of them, and does not grow.
    """
    start()
    cpus_each = clamp_cpus(cpus_each)
    options = {"num_cpus": cpus_each, "max_restarts": -1, "scheduling_strategy": "SPREAD"}
    kind = _ACTOR.options(**options, max_task_retries=SHARD_TRIES)
    actors = [kind.remote(factory, one, uris.secrets()) for one in settings]
    try:
        begun = [actor.ready.remote() for actor in actors]
        running, waiting = ray.wait(begun, num_returns=len(actors), timeout=_START_S)
        try:
            ray.get(running)
        except RayError as error:
            raise StageError(f"no worker could be started ({one_line(error)}); see Ray's logs") from error
        if waiting:
            raise StageError(
                f"{len(waiting)} of {len(actors)} workers of {cpus_each:g} cores found no room in {_START_S:g} s; the "
                f"cluster has some for {capacity(cpus_each)}, others may hold a part: place fewer, or smaller ones"
            )
        yield ActorGroup(actors, cpus_each)
    finally:
        for actor in actors:
            ray.kill(actor)


def run(
    function: Callable[..., Any], *arguments: Any, cpus: float = 1, gpus: float = 0, watch: str | None = None
) -> Any:
    """``function(*arguments)`` on a worker; what it reports with :class:`Progress` to ``watch`` is drawn here.

    Raises as it was raised, and ``StageError`` when no machine has so many GPUs, or the worker died each time that it
    was tried.
    """
    start()
    cpus = clamp_cpus(cpus, gpus)
    capacity(cpus, gpus)  # raises where there is none
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
_of_local_cluster = contextlib.ExitStack()
_START_S = 180.0  # in which placed workers are to run
_ROUNDING = 1e-6  # Ray places five workers of 0.2 cores on one
_LOOK_S = 30.0  # after which a placed worker that does not answer may have no room any more


class _Actor:
    """A worker in a process of its own, built at its first item, so that what building raises comes back as it is."""

    def __init__(
        self, factory: Callable[..., Worker[Any, Any]], settings: tuple[Any, ...], secrets: Mapping[str, str]
    ) -> None:
        uris.learn(secrets)
        self._factory, self._settings = factory, settings
        self._worker: Worker[Any, Any] | None = None
        self._building = threading.Lock()

    def ready(self) -> None:
        """Answered once there is a process."""

    def run(self, item: Any, isolate: bool = False) -> Any:
        with self._building:
            self._worker = self._worker or self._factory(*self._settings)
        if isolate and isinstance(self._worker, IsolatingWorker):
            return self._worker.isolated(item)
        return self._worker(item)


_ACTOR: Any = ray.remote(_Actor)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], secrets: Mapping[str, str]) -> Any:
    uris.learn(secrets)
    return function(*arguments)


def start() -> None:
    """Start or join Ray, once.

    Raises ``StageError`` outside of :func:`cluster`, or when nothing answers, ``InputError`` for what is no address.
    """
    if ray.is_initialized():
        return
    if _depth == 0:
        raise StageError("no cluster: run stages inside compute.cluster()")
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
                    "NO_ALBUMENTATIONS_UPDATE": "1",
                    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads that spin starve each other when cores are shared
                }
            },
        }
    quiet = {"logging_level": logging.ERROR, "configure_logging": False, "log_to_driver": False}
    try:
        if _address is None:
            _of_local_cluster.enter_context(local_ray.private_token())
            with local_ray.loopback():
                ray.init(_temp_dir=local_ray.session_folder(), **quiet, **options)
        else:
            ray.init(**quiet, **options)
    except ValueError as error:
        if _address is None:
            raise
        raise InputError(
            f"{_address} is no address of a Ray cluster ({error}); write HOST:PORT, ray://HOST:PORT or auto"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise StageError(
            f"no Ray cluster at {_address or 'this machine'} ({error}); start one, or unset the address; where it "
            "demands a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from error


def _shipped_checkout() -> dict[str, Any]:
    """A checkout travels with the job; an installed distribution must be on the cluster's machines already."""
    if not _IS_CHECKOUT:
        return {}
    return {"working_dir": str(_CHECKOUT), "excludes": [".venv", "build", ".git", "tests", "knn-diffusion-data"]}
