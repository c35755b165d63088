"""Training stage on two worker processes. Run as a script, this file starts both."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support import tiny_models, tiny_training

from infra import artifacts
from infra.compute import preemption, ray_train
from infra.errors import IntegrityError
from model.configs import ConditioningConfig, TrainingConfig
from model.training.loop import InterruptedTrainingError
from tasks.references.domain_folder import DomainFolder
from tasks.train.config import TrainConfig
from tasks.train.task import train

ROOT = Path(__file__).parents[3]
CONFIG = TrainConfig(
    network=tiny_models.size(image_size=16),
    conditioning=ConditioningConfig(neighbours=2, pool=tiny_training.POOL),
    training=TrainingConfig(
        images=24, batch_size=4, learning_rate=1e-3, warmup_images=8, checkpoint_images=8, log_images=4, grid_images=24,
        ema_decay=0.5,
    ),
    cpus_per_worker=1,
)  # fmt: skip


class FileRun:
    """Tracked run that appends the image count of every log call to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, *, step: int, values: dict[str, float]) -> None:
        with self._path.open("a") as stream:
            stream.write(f"{step}\n")

    def file(self, path: Path, folder: str | None = None) -> None:
        pass


def run_worker(rank: int, loop: Callable[[dict[str, Any]], None], config: dict[str, Any], base: Path) -> None:
    """Run worker ``rank``. If the folder is named "damaged", rank 1 cannot read the newest checkpoint."""
    fetch = artifacts.fetch_file

    def damaged(uri: str, file: artifacts.File, cache: Path) -> Path:
        if file.name == "000000003.pt":
            raise IntegrityError("the digest differs")
        return fetch(uri, file, cache)

    if rank == 1 and base.name == "damaged":
        artifacts.fetch_file = damaged
    torch.set_num_threads(1)
    ray_train.worker_rank = lambda: (rank, 2)
    dist.init_process_group("gloo", init_method=f"file://{base}/rendezvous", rank=rank, world_size=2)
    loop(config)
    dist.destroy_process_group()


def resume(folder: Path) -> None:
    """Resume the runs in ``folder``, each on two workers."""
    inputs = pickle.loads((folder / "inputs").read_bytes())  # noqa: S301 - written by this test
    for name in ("whole", "damaged"):
        base = folder / name

        def fork(loop: Callable[[dict[str, Any]], None], config: dict[str, Any], base: Path = base, **_: Any) -> None:
            torch.multiprocessing.start_processes(run_worker, args=(loop, config, base), nprocs=2, start_method="fork")

        ray_train.train = fork
        run: Any = FileRun(base / "logged")
        train(
            inputs, DomainFolder(uri=str(base), cache=base / "cache"), dataclasses.replace(CONFIG, workers=2), run=run
        )


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_train_resumes_on_two_workers_from_newest_checkpoint_readable_by_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny_training.stored_inputs(tmp_path / "stored")
    (tmp_path / "inputs").write_bytes(pickle.dumps(inputs))
    monkeypatch.setattr(ray_train, "train", lambda loop, config, **_: loop(config))
    monkeypatch.setattr(ray_train, "worker_rank", lambda: (0, 1))
    train(inputs, DomainFolder(uri=str(tmp_path / "reference"), cache=tmp_path / "cache"), CONFIG)
    for name in ("whole", "damaged"):
        stops = iter([False, False, True])
        monkeypatch.setattr(preemption, "stop_requested", lambda stops=stops: next(stops))
        with pytest.raises(InterruptedTrainingError, match="stopped after 12 images"):
            train(inputs, DomainFolder(uri=str(tmp_path / name), cache=tmp_path / name / "cache"), CONFIG)

    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, timeout=300, check=True)

    expected = weights(tmp_path / "reference")
    for name, logged in (("whole", [16, 20, 24]), ("damaged", [12, 16, 20, 24])):
        assert [int(line) for line in (tmp_path / name / "logged").read_text().split()] == logged
        (manifest,) = (tmp_path / name).glob("generator/*/manifest.json")
        assert json.loads(manifest.read_text())["info"]["asked"]["workers"] == 2
        for key, weight in weights(tmp_path / name).items():
            torch.testing.assert_close(weight, expected[key], atol=2e-3, rtol=1e-2, msg=f"{name}: {key}")


def weights(base: Path) -> dict[str, torch.Tensor]:
    """Load the network weights of the only generator below ``base``."""
    (path,) = base.glob("generator/*/pipeline/transformer/*.safetensors")
    return load_file(path)


if __name__ == "__main__":
    resume(Path(sys.argv[1]))
