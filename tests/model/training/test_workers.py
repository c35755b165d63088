"""Two workers are two processes. Run as a script, this file is all of them, so that they share what imports cost."""

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

from model.diffusion.conditioning import ConditioningConfig
from model.networks.dit import build_transformer
from model.training.batch import Batch
from model.training.data import TrainingRows, TrainingSet
from model.training.interfaces import TrainingConfig
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
    """A shard of five of ten pictures."""

    rows = 5

    def __init__(self, first: int) -> None:
        self._own = np.arange(first, first + self.rows)

    def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
        own = self._own if chosen is None else self._own[chosen]
        pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
        return TrainingRows(
            pictures=pixels[own], embeddings=tiny_models.unit_rows(10)[own], neighbours=(own[:, None] + (1, 2)) % 10
        )


def training_set(rank: int, world: int) -> TrainingSet:
    """One that streams, so that a worker holds its own rows alone."""
    return TrainingSet([Half(0), Half(5)], tiny_models.unit_rows(10), window_rows=5, rank=rank, world=world)


def new_network(seed: int = 0) -> nn.Module:
    return build_transformer(tiny_models.size(layers=2), embedding_dimension=tiny_models.WIDTH, seed=seed)


def trained(folder: Path, *, rank: int = 0, world: int = 1, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Train in ``folder``; the average, what was told, and what was kept."""
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


STEEP = torch.tensor([1, 2**-9, 2, 2**-9])
"""Four pictures, each of one value: the gradient of its weight. In bfloat16 the small ones vanish beside the large."""


class Steep(nn.Module):
    def batch(self, *_: int, part: int = 0, parts: int = 1, **__: int) -> Batch:
        mine = STEEP.chunk(parts)[part]
        return Batch(images=mine, query=torch.empty(0), neighbours=torch.empty(0))

    def forward(self, network: nn.Module, batch: Batch, _: object) -> torch.Tensor:
        return network(torch.ones(1, 1, dtype=torch.bfloat16)).float().sum() * batch.images.mean()


def copied_gradient(*, rank: int = 0, world: int = 1, pieces: int) -> float:
    """The gradient of a weight whose copy computes in bfloat16, as it is on CUDA."""
    network, steep = nn.Linear(1, 1, bias=False), Steep()
    config = TrainingConfig(images=4, batch_size=4, pieces=pieces, gradient_clip=math.inf)
    step = Step(network, steep, steep, config, torch.device("cpu"), rank, world)
    step._copied = True
    step.prepare(0)
    step.take(0)
    return float(network.weight.grad)


def work(rank: int, folder: Path) -> None:
    """Everything that worker ``rank`` does, left in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    told = {name: trained(folder / name, rank=rank, world=2, **options) for name, options in RUNS.items()}
    # The checkpoint of one way is the other's: half of the way each, from other initial weights.
    for name, first, second in (("to fsdp", "ddp", "fsdp"), ("to ddp", "fsdp", "ddp")):
        half = {"images": 32, "learning_rate": 1e-3, "schedule": "constant"}
        trained(folder / name, rank=rank, world=2, sharding=first, **half)
        dist.barrier()
        told[name] = trained(folder / name, rank=rank, world=2, seed=9, sharding=second, **half | {"images": 64})
    told["a copy in pieces"] = copied_gradient(rank=rank, world=2, pieces=2)
    told["one is stopped"] = trained(folder / "stop", rank=rank, world=2, images=16 * 20, stop=lambda: rank == 1)
    torch.save(told, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two workers told of its runs."""
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
def test_two_workers_train_what_one_does_and_the_first_one_tells_of_it(
    told: list[dict[str, Any]], name: str, tmp_path: Path
) -> None:
    first, second = (worker[name] for worker in told)
    for key, weight in first["average"].items():
        assert torch.equal(weight, second["average"][key]), key
    assert not torch.equal(first["average"]["proj_out.weight"], new_network().state_dict()["proj_out.weight"])
    assert [images for images, _ in first["metrics"]] == [16, 32, 48, 64]
    assert (first["checkpoints"], first["grids"]) == ([2, 4], [48])
    assert (second["metrics"], second["grids"]) == ([], [])
    require_close(first, trained(tmp_path))


@pytest.mark.parametrize("name", ["to fsdp", "to ddp"])
def test_a_checkpoint_is_whole_and_loads_however_the_weights_are_split(
    told: list[dict[str, Any]], name: str, tmp_path: Path
) -> None:
    expected = trained(tmp_path, schedule="constant")
    expected["metrics"] = expected["metrics"][2:]
    require_close(told[0][name], expected)


def test_when_one_worker_is_told_to_stop_both_do(told: list[dict[str, Any]]) -> None:
    runs = [worker["one is stopped"] for worker in told]
    assert [run["stopped"] for run in runs] == ["stopped after 128 images; run again to go on from there"] * 2
    assert runs[0]["checkpoints"] == [2, 4, 6, 8]


def test_pieces_of_a_copy_are_added_up_in_float32(told: list[dict[str, Any]]) -> None:
    assert [copied_gradient(pieces=pieces) for pieces in (1, 4)] == [0.75, float(STEEP.mean())]
    assert [worker["a copy in pieces"] for worker in told] == [float(STEEP.mean())] * 2


class Fickle(Steep):
    """Both weights learn in the call that counts operations and in the second piece of the first step."""

    calls = iter([True, False, True, False, False])

    def forward(self, network: nn.Module, batch: Batch, _: object) -> torch.Tensor:
        return network.first.float().sum() + (network.second.float().sum() if next(Fickle.calls) else 0)


class TwoWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))


def test_a_weight_that_a_piece_does_not_reach_gets_nothing_of_it() -> None:
    network, fickle = TwoWeights(), Fickle()
    config = TrainingConfig(images=8, batch_size=4, pieces=2, gradient_clip=math.inf)
    step = Step(network, fickle, fickle, config, torch.device("cpu"), 0, 1)
    step._copied = True
    step.prepare(0)
    for number, expected in enumerate([(1, 0.5), (1, 0)]):
        step.take(number)
        assert (float(network.first.grad), float(network.second.grad)) == expected


if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, args=(Path(sys.argv[1]),), nprocs=2, start_method="fork")
