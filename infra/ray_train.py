"""Ray Train: a training loop on several workers, started again when one dies."""

from collections.abc import Callable
from typing import Any

from infra import compute, stopping, storage
from infra.errors import StageError
from infra.progress import drawn


def train(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    workers: int,
    cpus_per_worker: int,
    use_gpu: bool,
    folder_uri: str,
) -> None:
    """Run ``loop(config)`` on ``workers`` Ray Train workers with a process group between them.

    A worker that dies is started again and finds the loop's own checkpoints; Ray's state below ``folder_uri`` is gone
    afterwards. What the loop reports with :class:`Progress` is drawn here. Raises ``StageError`` with the cause.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    compute.start()
    state = storage.join(folder_uri, "ray")
    storage.discard(state)
    trainer = TorchTrainer(
        loop,
        train_loop_config=config,
        torch_config=stopping.listening_torch_config(),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": compute.fitting(cpus_per_worker), "GPU": int(use_gpu)},
        ),
        run_config=RunConfig(name="train", storage_path=state, failure_config=FailureConfig(max_failures=2)),
    )
    try:
        with drawn(folder_uri, "train"):
            trainer.fit()
    except TrainingFailedError as error:
        causes = getattr(error, "worker_failures", None) or {}
        cause = next(iter(causes.values()), error)
        raise StageError(
            f"training stopped: {cause}; the last checkpoint is kept, run again to go on from it"
        ) from error
    finally:
        storage.discard(state)


def worker_rank() -> tuple[int, int]:
    """(rank, world size) of the calling Ray Train worker."""
    from ray.train import get_context

    context = get_context()
    return context.get_world_rank(), context.get_world_size()
