"""Ray Train: a training loop on several workers, started again when one dies."""

from collections.abc import Callable
from typing import Any

from infra import compute, stopping, storage
from infra.errors import StageError
from infra.progress import drawn

TRIES = 3
"""How often the workers are started when one of them dies, or fails in a way that may pass."""


def train(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    workers: int,
    cpus_per_worker: int,
    use_gpu: bool,
    folder_uri: str,
    final: tuple[type[Exception], ...] = (),
) -> None:
    """Run ``loop(config)`` on ``workers`` Ray Train workers with a process group between them.

    When one dies, all are started again and find the loop's own checkpoints; Ray's state below ``folder_uri`` is gone
    afterwards. What the loop reports with :class:`Progress` is drawn here.

    Raises:
        StageError: the cluster has no room for the workers, or they failed each time that they were tried; the cause.
        Exception: an error of the kinds in ``final``, which no second try mends, as a worker raised it.
    """
    compute.start()
    gpus = int(use_gpu)
    cpus = compute.fitting(cpus_per_worker, gpus)
    if (room := compute.room(cpus, gpus)) < workers:
        raise StageError(
            f"{workers} workers of {cpus:g} cores and {gpus} GPUs are asked for, the cluster has room for {room}; set "
            "workers, or cpus_per_worker, to what it has"
        )
    with drawn(folder_uri, "train"):
        for _ in range(TRIES):
            failures = _fit(loop, config, workers, {"CPU": cpus, "GPU": gpus}, storage.join(folder_uri, "ray"))
            if not failures:
                return
            for failure in failures:
                if isinstance(failure, final):
                    raise failure
    told = " ".join(str(failures[0]).split())
    raise StageError(
        f"training stopped: {told}; the last checkpoint is kept, run again to go on from it"
    ) from failures[0]


def _fit(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    workers: int,
    each: dict[str, float],
    state_uri: str,
) -> list[Exception]:
    """What the workers failed with, once; nothing when they came to the end."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    storage.discard(state_uri)
    trainer = TorchTrainer(
        loop,
        train_loop_config=config,
        torch_config=stopping.listening_torch_config(),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=each["GPU"] > 0, resources_per_worker=each),
        run_config=RunConfig(name="train", storage_path=state_uri, failure_config=FailureConfig(max_failures=0)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return list((getattr(error, "worker_failures", None) or {}).values()) or [error]
    finally:
        storage.discard(state_uri)
    return []


def worker_rank() -> tuple[int, int]:
    """(rank, world size) of the calling Ray Train worker."""
    from ray.train import get_context

    context = get_context()
    return context.get_world_rank(), context.get_world_size()
