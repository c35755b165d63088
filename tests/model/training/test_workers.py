"""Training with two workers, which are processes. Run as a script, this file is both, so they import once."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from support import tiny_models
from support.fakes import FolderCheckpoints, MetricsLog
from torch import nn

from model.configs import ConditioningConfig, TrainingConfig
from model.networks.dit import build_transformer
from model.training.batch import Batch
from model.training.data import TrainingRows, TrainingSet
from model.training.loop import InterruptedTrainingError, train
from model.training.objectives.flow_matching import FlowMatching
from model.training.step import Step

ROOT = Path(__file__).parents[3]
SHORT = TrainingConfig(
    images=64, batch_size=16, learning_rate=1e-3, warmup_images=16, checkpoint_images=32, log_images=16, grid_images=48
)
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"sharding": "fsdp"},
    "ddp in pieces": {"pieces": 2},
    "fsdp in pieces": {"sharding": "fsdp", "pieces": 2},
}


class Half:
    """A shard with five of ten images."""

    rows = 5

    def __init__(self, first: int) -> None:
        self._own = np.arange(first, first + self.rows)

    def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
        own = self._own if chosen is None else self._own[chosen]
        pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
        return TrainingRows(
            images=pixels[own], embeddings=tiny_models.unit_rows(10)[own], neighbours=(own[:, None] + (1, 2)) % 10
        )


def training_set(rank: int, world: int) -> TrainingSet:
    """Return a streamed set, of which a worker loads only its own rows."""
    return TrainingSet([Half(0), Half(5)], tiny_models.unit_rows(10), window_rows=5, rank=rank, world=world)


def new_network(seed: int = 0) -> nn.Module:
    return build_transformer(tiny_models.size(layers=2), embedding_dimension=tiny_models.WIDTH, seed=seed)


def run_training(folder: Path, *, rank: int = 0, world: int = 1, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Train in ``folder``. Return the averaged weights, the metrics, the checkpoints and the stop message."""
    stop = options.pop("stop", lambda: False)
    (folder / str(rank)).mkdir(parents=True, exist_ok=True)
    metrics, checkpoints = MetricsLog(), FolderCheckpoints(folder / "0")
    average, stopped = None, ""
    try:
        average = train(
            new_network(seed),
            FlowMatching(ConditioningConfig(neighbours=2, pool=2)),
            training_set(rank, world),
            dataclasses.replace(SHORT, **options),
            checkpoints=checkpoints,
            metrics=metrics,
            rank=rank,
            world=world,
            stop=stop,
        )
    except InterruptedTrainingError as error:
        stopped = str(error)
    return {
        "average": average.state_dict() if average else {},
        "metrics": metrics.entries,
        "grids": metrics.grids,
        "checkpoints": checkpoints.steps,
        "stopped": stopped,
    }


GRADIENTS = torch.tensor([1, 2**-9, 2, 2**-9])
"""Four images of one value each, which is the gradient of the weight. bfloat16 sums lose the small ones."""


class GivenGradients(nn.Module):
    def batch(self, *_: int, part: int = 0, parts: int = 1, **__: int) -> Batch:
        share = GRADIENTS.chunk(parts)[part]
        return Batch(images=share, query=torch.empty(0), neighbours=torch.empty(0))

    def forward(self, network: nn.Module, batch: Batch, _: object) -> torch.Tensor:
        return network(torch.ones(1, 1, dtype=torch.bfloat16)).float().sum() * batch.images.mean()


def copied_gradient(*, rank: int = 0, world: int = 1, pieces: int) -> float:
    """Return the gradient of a weight whose copy computes in bfloat16, as on CUDA."""
    network, given = nn.Linear(1, 1, bias=False), GivenGradients()
    config = TrainingConfig(images=4, batch_size=4, pieces=pieces, gradient_clip=math.inf)
    step = Step(network, given, given, config, torch.device("cpu"), rank, world)
    step._copied = True
    step.prepare(0)
    step.run(0)
    return float(network.weight.grad)


def work(rank: int, folder: Path) -> None:
    """Run everything of worker ``rank`` and save the results in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {name: run_training(folder / name, rank=rank, world=2, **options) for name, options in RUNS.items()}
    # Train the first half one way, and resume the other way from other initial weights.
    for name, first, second in (("to fsdp", "ddp", "fsdp"), ("to ddp", "fsdp", "ddp")):
        half = {"images": 32, "learning_rate": 1e-3, "schedule": "constant"}
        run_training(folder / name, rank=rank, world=2, sharding=first, **half)
        dist.barrier()
        results[name] = run_training(
            folder / name, rank=rank, world=2, seed=9, sharding=second, **half | {"images": 64}
        )
    results["a copy in pieces"] = copied_gradient(rank=rank, world=2, pieces=2)
    results["one is stopped"] = run_training(
        folder / "stop", rank=rank, world=2, images=16 * 20, stop=lambda: rank == 1
    )
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the results of each of two workers."""
    if not dist.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    folder = tmp_path_factory.mktemp("workers")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(folder)], env=environment, timeout=180, check=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def require_close(one: dict[str, Any], other: dict[str, Any], tolerance: float = 2e-3) -> None:
    assert one["average"].keys() == other["average"].keys()
    for name, weight in one["average"].items():
        torch.testing.assert_close(weight, other["average"][name], atol=tolerance, rtol=1e-2, msg=name)
    losses, expected = ([values["loss"] for _, values in run["metrics"]] for run in (one, other))
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_train_two_workers_equal_one_and_only_the_first_logs(
    results: list[dict[str, Any]], name: str, tmp_path: Path
) -> None:
    first, second = (worker[name] for worker in results)
    for key, weight in first["average"].items():
        assert torch.equal(weight, second["average"][key]), key
    assert not torch.equal(first["average"]["proj_out.weight"], new_network().state_dict()["proj_out.weight"])
    assert [images for images, _ in first["metrics"]] == [16, 32, 48, 64]
    assert (first["checkpoints"], first["grids"]) == ([2, 4], [48])
    assert (second["metrics"], second["grids"]) == ([], [])
    require_close(first, run_training(tmp_path))


@pytest.mark.parametrize("name", ["to fsdp", "to ddp"])
def test_train_resumes_with_another_sharding(results: list[dict[str, Any]], name: str, tmp_path: Path) -> None:
    expected = run_training(tmp_path, schedule="constant")
    expected["metrics"] = expected["metrics"][2:]
    require_close(results[0][name], expected)


def test_train_stop_of_one_worker_stops_both(results: list[dict[str, Any]]) -> None:
    runs = [worker["one is stopped"] for worker in results]
    assert [run["stopped"] for run in runs] == ["stopped after 128 images; run again to resume"] * 2
    assert runs[0]["checkpoints"] == [2, 4, 6, 8]


def test_step_sums_pieces_of_a_bfloat16_copy_in_float32(results: list[dict[str, Any]]) -> None:
    assert [copied_gradient(pieces=pieces) for pieces in (1, 4)] == [0.75, float(GRADIENTS.mean())]
    assert [worker["a copy in pieces"] for worker in results] == [float(GRADIENTS.mean())] * 2


class SometimesBoth(GivenGradients):
    """Uses the second weight only in the call that counts FLOPs and in the second piece of the first step."""

    calls = iter([True, False, True, False, False])

    def forward(self, network: nn.Module, batch: Batch, _: object) -> torch.Tensor:
        return network.first.float().sum() + (network.second.float().sum() if next(SometimesBoth.calls) else 0)


class TwoWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))


def test_step_weight_unused_by_a_piece_gets_no_gradient_from_it() -> None:
    network, given = TwoWeights(), SometimesBoth()
    config = TrainingConfig(images=8, batch_size=4, pieces=2, gradient_clip=math.inf)
    step = Step(network, given, given, config, torch.device("cpu"), 0, 1)
    step._copied = True
    step.prepare(0)
    for number, expected in enumerate([(1, 0.5), (1, 0)]):
        step.run(number)
        assert (float(network.first.grad), float(network.second.grad)) == expected


if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, args=(Path(sys.argv[1]),), nprocs=2, start_method="fork")
