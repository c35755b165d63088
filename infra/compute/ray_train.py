"""Ray Train: a training loop on several workers, started again when one dies."""

from collections.abc import Callable
from typing import Any

from infra import compute, storage, uris
from infra.compute import preemption
from infra.compute.progress import progress_bar
from infra.errors import StageError


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

    A worker that dies is started again and finds the loop's own checkpoints; Ray's state below ``folder_uri`` is gone
    afterwards. What the loop reports with :class:`Progress` is drawn here.

    Raises:
        StageError: the cluster has no room for the workers, or they failed each time that they were tried: the cause.
        Exception: an error of the kinds in ``final``, which no second try mends, as a worker raised it.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    compute.start()
    gpus = int(use_gpu)
    cpus = compute.clamp_cpus(cpus_per_worker, gpus)
    if (room := compute.capacity(cpus, gpus)) < workers:
        raise StageError(
            f"{workers} workers of {cpus:g} cores and {gpus} GPUs are asked for, the cluster has room for {room}; set "
            "workers, or cpus_per_worker, to what it has"
        )
    state = storage.join(folder_uri, "ray")
    storage.discard(state)
    trainer = TorchTrainer(
        _with_secrets(loop, uris.secrets()),
        train_loop_config=config,
        torch_config=preemption.listening_torch_config(),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus, "GPU": gpus}
        ),
        run_config=RunConfig(
            name="train",
            storage_path=state,
            failure_config=FailureConfig(max_failures=2),
            callbacks=[_ending_with(final)],
        ),
    )
    try:
        with progress_bar(folder_uri, "train"):
            trainer.fit()
    except TrainingFailedError as error:
        if isinstance(ended_with := getattr(error, "controller_failure", None), final):
            raise ended_with from None
        causes = getattr(error, "worker_failures", None) or {}
        told = " ".join(str(next(iter(causes.values()), error)).split())
        raise StageError(
            f"training stopped: {told}; the last checkpoint is kept, run again to go on from it"
        ) from error
    finally:
        storage.discard(state)


def _with_secrets(loop: Callable[[dict[str, Any]], None], secrets: dict[str, str]) -> Callable[[dict[str, Any]], None]:
    """``loop``, which opens on its worker what this process can."""

    def run(config: dict[str, Any]) -> None:
        uris.learn(secrets)
        loop(config)

    return run


def _ending_with(final: tuple[type[Exception], ...]) -> Any:
    """What ends a run at the first such error of a worker: Ray Train starts workers again whatever they raised."""
    from ray.train import UserCallback

    class Ending(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, final):
                    raise error  # from here it is the controller's, which is not tried again

    return Ending()


def worker_rank() -> tuple[int, int]:
    """(rank, world size) of the calling Ray Train worker."""
    from ray.train import get_context

    context = get_context()
    return context.get_world_rank(), context.get_world_size()
