"""Ray: shards mapped over actors, bounded in flight; one function on a worker; Ray Train.

Workers get names and URIs, never data. What they raise comes back as it was raised.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from tqdm.auto import tqdm

from infra.errors import StageError

Item = TypeVar("Item", contravariant=True)
Result = TypeVar("Result", covariant=True)

SHARD_TRIES = 3
"""How often a shard is tried when its worker dies under it; errors that a worker raises are not tried again here."""


class Worker(Protocol[Item, Result]):
    """What runs on an actor: built once there, then called for shard after shard."""

    def __call__(self, item: Item) -> Result:
        """Process one shard and return what the manifest needs to know of it."""
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


def cpus() -> int:
    """Cores of the cluster."""
    _start()
    return int(ray.cluster_resources().get("CPU", 1))


class Lost(Generic[Item]):
    """A shard that could not be processed, and why."""

    def __init__(self, item: Item, error: BaseException) -> None:
        """Keep the item and the error that ended it."""
        self.item, self.error = item, error


def map_shards(
    factory: Callable[..., Worker[Any, Any]],
    settings: tuple[Any, ...],
    items: Iterable[Any],
    *,
    actors: int,
    cpus_per_actor: float = 1,
    gpus_per_actor: float = 0,
    description: str,
) -> Iterator[Any]:
    """Results in order of completion; a :class:`Lost` stands for a shard that failed.

    Each actor builds ``factory(*settings)`` once and holds at most two shards, so a dead one costs little. Ray starts
    another in its place and hands it the same shards again.
    """
    queue = list(items)
    if not queue:
        return
    _start()
    options = {"num_cpus": cpus_per_actor, "num_gpus": gpus_per_actor, "max_restarts": -1}
    pool = [
        _Actor.options(**options, max_task_retries=SHARD_TRIES).remote(factory, settings)
        for _ in range(max(1, min(actors, len(queue))))
    ]
    pending: dict[Any, tuple[Any, Any]] = {}
    waiting = iter(queue)

    def feed(actor: Any) -> None:
        item = next(waiting, _END)
        if item is not _END:
            pending[actor.run.remote(item)] = (actor, item)

    for actor in pool * 2:
        feed(actor)
    try:
        with tqdm(total=len(queue), desc=description, unit="shard", leave=False) as progress:
            while pending:
                (done,), _ = ray.wait(list(pending), num_returns=1)
                actor, item = pending.pop(done)
                try:
                    result = ray.get(done)
                except RayTaskError as error:
                    result = Lost(item, error.cause or error)
                except (RayActorError, WorkerCrashedError) as error:
                    result = Lost(item, error)
                feed(actor)
                progress.update()
                yield result
    finally:
        for actor in pool:
            ray.kill(actor)


def run(function: Callable[..., Any], *arguments: Any, cpus: float = 1, gpus: float = 0) -> Any:
    """``function(*arguments)`` on a worker."""
    _start()
    remote = ray.remote(_call).options(num_cpus=cpus, num_gpus=gpus, max_retries=SHARD_TRIES)
    try:
        return ray.get(remote.remote(function, arguments))
    except RayTaskError as error:
        raise (error.cause or error) from None


def train(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    workers: int,
    cpus_per_worker: int,
    use_gpu: bool,
    storage_uri: str,
    name: str,
) -> None:
    """Run ``loop(config)`` on ``workers`` Ray Train workers with a process group between them.

    A worker that dies is started again and finds the loop's own checkpoints. Raises ``StageError`` with the cause.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    _start()
    trainer = TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus_per_worker, "GPU": int(use_gpu)}
        ),
        run_config=RunConfig(name=name, storage_path=storage_uri, failure_config=FailureConfig(max_failures=2)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        causes = getattr(error, "worker_failures", None) or {}
        cause = next(iter(causes.values()), error)
        raise StageError(
            f"training stopped: {cause}; the last checkpoint is kept, run again to go on from it"
        ) from error


def worker_rank() -> tuple[int, int]:
    """(rank, world size) of the calling Ray Train worker."""
    from ray.train import get_context

    context = get_context()
    return context.get_world_rank(), context.get_world_size()


def worker_progress(total: int, *, description: str, unit: str) -> Any:
    """A tqdm bar on a worker that is drawn where the flow runs."""
    from ray.experimental import tqdm_ray

    return tqdm_ray.tqdm(total=total, desc=description, unit=unit)


_END = object()
_CHECKOUT = Path(__file__).parent.parent
_address: str | None = None
_cores: int | None = None
_depth = 0


@ray.remote
class _Actor:
    def __init__(self, factory: Callable[..., Worker[Any, Any]], settings: tuple[Any, ...]) -> None:
        self._worker = factory(*settings)

    def run(self, item: Any) -> Any:
        return self._worker(item)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)


def _start() -> None:
    """Start or join Ray, once. Raises ``StageError`` outside of :func:`cluster`, or when nothing answers."""
    if ray.is_initialized():
        return
    if _depth == 0:
        raise StageError("no cluster: run stages inside compute.cluster()")
    options: dict[str, Any] = {"address": _address, "runtime_env": _shipped_checkout()}
    if _address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a local cluster listens on loopback alone
        options = {
            "address": "local",
            "num_cpus": _cores or len(os.sched_getaffinity(0)),
            "include_dashboard": False,
            "object_store_memory": 256 << 20,
            "_node_ip_address": "127.0.0.1",
            "runtime_env": {"env_vars": {"PYTHONPATH": str(_CHECKOUT), "NO_ALBUMENTATIONS_UPDATE": "1"}},
        }
    try:
        ray.init(logging_level=logging.ERROR, configure_logging=False, **options)
    except (ConnectionError, RuntimeError) as error:
        raise StageError(
            f"no Ray cluster at {_address or 'this machine'} ({error}); start one, or unset the address"
        ) from error


def _shipped_checkout() -> dict[str, Any]:
    """On a cluster the four packages travel with the job."""
    return {"working_dir": str(_CHECKOUT), "excludes": [".venv", "build", ".git", "tests"]}
