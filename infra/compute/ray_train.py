"""Training on Ray Train: a loop on several workers, restarted when one dies."""

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

    If a worker dies, the workers are restarted and the loop resumes from its own checkpoints. Ray's state below
    ``folder_uri`` is deleted at the end. A progress bar shows what the loop reports with :class:`Progress`.

    Args:
        loop: Training function of each worker.
        config: Its argument.
        workers: Number of workers.
        cpus_per_worker: CPU cores of each worker.
        use_gpu: Whether each worker gets a GPU.
        folder_uri: Output folder of the stage.
        final: Types of errors for which a retry is pointless.

    Raises:
        StageError: The cluster has no room for the workers, or training failed on every attempt.
        Exception: An error of a type in ``final``, as a worker raised it.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    compute.start()
    gpus = int(use_gpu)
    cpus = compute.clamp_cpus(cpus_per_worker, gpus)
    if (room := compute.capacity(cpus, gpus)) < workers:
        raise StageError(
            f"{workers} workers of {cpus:g} cores and {gpus} GPUs requested, but the cluster has room for {room}; set "
            "workers or cpus_per_worker to at most that"
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
            callbacks=[_stop_at(final)],
        ),
    )
    try:
        with progress_bar(folder_uri, "train"):
            trainer.fit()
    except TrainingFailedError as error:
        if isinstance(failure := getattr(error, "controller_failure", None), final):
            raise failure from None
        causes = getattr(error, "worker_failures", None) or {}
        cause = " ".join(str(next(iter(causes.values()), error)).split())
        raise StageError(f"training stopped: {cause}; run again to resume from the last checkpoint") from error
    finally:
        storage.discard(state)


def _with_secrets(loop: Callable[[dict[str, Any]], None], secrets: dict[str, str]) -> Callable[[dict[str, Any]], None]:
    """Wrap ``loop`` so that workers can open the same URIs as this process."""

    def run(config: dict[str, Any]) -> None:
        uris.learn(secrets)
        loop(config)

    return run


def _stop_at(final: tuple[type[Exception], ...]) -> Any:
    """Return a callback that fails the run at an error in ``final``, for which Ray Train would restart the workers."""
    from ray.train import UserCallback

    class StopAtFinal(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, final):
                    raise error  # becomes an error of the controller, which Ray Train does not retry

    return StopAtFinal()


def worker_rank() -> tuple[int, int]:
    """Return (rank, world size) of the calling Ray Train worker."""
    from ray.train import get_context

    context = get_context()
    return context.get_world_rank(), context.get_world_size()
