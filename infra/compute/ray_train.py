"""Training on Ray Train: a loop on several workers, which are restarted if one dies."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from infra import compute, storage, uris
from infra.compute import interruptible, preemption
from infra.compute.preemption import StopRequest
from infra.compute.progress import progress_bar
from infra.errors import KNNDiffusionError, StageError

STOP_S = 20.0
"""Seconds that workers get to finish their step and save a checkpoint when this process is interrupted."""


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

    If a worker dies, the workers are restarted and the loop resumes from its own checkpoints. If this process is
    interrupted, by Ctrl-C or a cancelled flow, the workers first save a checkpoint. Ray's state below ``folder_uri`` is
    deleted at the end. A progress bar shows the :class:`Progress` of the loop.

    Args:
        loop: Training function of each worker.
        config: Argument of ``loop``.
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
            f"{workers} workers of {cpus:g} cores and {gpus} GPUs requested, but the cluster has room for "
            f"{room}; reduce workers or cpus_per_worker"
        )
    ray_folder = storage.join(folder_uri, "ray")
    storage.discard(ray_folder)
    stop = StopRequest(ray_folder)
    trainer = TorchTrainer(
        _as_worker(loop, uris.secrets(), stop),
        train_loop_config=config,
        torch_config=preemption.graceful_torch_config(),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus, "GPU": gpus}
        ),
        run_config=RunConfig(
            name="train",
            storage_path=ray_folder,
            failure_config=FailureConfig(max_failures=2),
            callbacks=[_stop_at(final, stop)],
        ),
    )
    try:
        with progress_bar(folder_uri, "train"):
            _fit(trainer, stop)
    except TrainingFailedError as error:
        if isinstance(failure := getattr(error, "controller_failure", None), final):
            raise failure from None
        causes = getattr(error, "worker_failures", None) or {}
        cause = " ".join(str(next(iter(causes.values()), error)).split())
        raise StageError(f"training stopped: {cause}; run again to resume from the last checkpoint") from error
    finally:
        with contextlib.suppress(KNNDiffusionError):  # the next run deletes it; the result of this one matters more
            storage.discard(ray_folder)


def _fit(trainer: Any, stop: StopRequest) -> None:
    """Train in another thread, so that this one handles signals. If this one is interrupted, stop the workers.

    In the main thread Ray Train would replace the handler of Ctrl-C, and end the process without a checkpoint.
    """

    def interrupted(thread: threading.Thread) -> None:
        with contextlib.suppress(KNNDiffusionError):  # the interruption matters more
            if stop.send():
                thread.join(STOP_S)

    interruptible.call(trainer.fit, interrupted=interrupted)


def _as_worker(
    loop: Callable[[dict[str, Any]], None], secrets: dict[str, str], stop: StopRequest
) -> Callable[[dict[str, Any]], None]:
    """Wrap ``loop`` so that workers can open the same URIs as this process, and stop on request."""

    def run(config: dict[str, Any]) -> None:
        uris.learn(secrets)
        with stop.watched():
            loop(config)

    return run


def _stop_at(final: tuple[type[Exception], ...], stop: StopRequest) -> Any:
    """Return a callback that ends the run where restarting the workers would be pointless.

    This is the case for an error of a type in ``final``, and after a stop request.
    """
    from ray.train import UserCallback

    class StopAtFinal(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            stopped = False
            with contextlib.suppress(KNNDiffusionError):  # unknown in an outage: restart
                stopped = stop.is_sent()
            for error in worker_exceptions.values():
                if stopped or isinstance(error, final):
                    raise error  # becomes an error of the controller, which Ray Train does not retry

    return StopAtFinal()


def worker_rank() -> tuple[int, int]:
    """Return (rank, world size) of the calling Ray Train worker."""
    from ray.train import get_context

    context = get_context()
    return context.get_world_rank(), context.get_world_size()
