"""Two workers are two processes. Run as a script, this file is both of them, so that they share what imports cost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fakes import FolderCheckpoints, MetricsLog
from torch import nn

from model.diffusion.conditioning import ConditioningConfig
from model.networks.dit import TransformerConfig, build_transformer
from model.training.data import Batch, step_generator
from model.training.loop import TrainingConfig, train

ROOT = Path(__file__).parents[3]
WIDTH = 8


class BlackAndGrey:
    """Black pictures for worker 0, mid-grey ones for worker 1: to a network that says zero, losses of 2 and of 1."""

    def batch(self, step: int, *, seed: int, size: int, rank: int = 0, world: int = 1) -> Batch:
        share = size // world
        draw = torch.randn(share, 3, WIDTH, generator=step_generator(seed, step, rank))
        rows = F.normalize(draw, dim=2)
        return Batch(images=torch.full((share, 3, 8, 8), float(rank - 1)), query=rows[:, 0], neighbours=rows[:, 1:])


def new_network() -> nn.Module:
    config = TransformerConfig(image_size=8, patch_size=4, layers=1, heads=1, head_width=16)
    return build_transformer(config, embedding_dimension=WIDTH, seed=0)


def work(rank: int, folder: Path) -> None:
    """Train as worker ``rank``, and leave what came of it in ``folder``."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    (folder / str(rank)).mkdir()
    network, metrics, checkpoints = new_network(), MetricsLog(), FolderCheckpoints(folder / str(rank))
    average = train(
        network,
        BlackAndGrey(),
        TrainingConfig(images=64, batch_size=16, warmup_images=16, checkpoint_images=32, log_images=16),
        ConditioningConfig(neighbours=2),
        prediction="velocity",
        checkpoints=checkpoints,
        metrics=metrics,
        rank=rank,
        world=2,
    )
    state = {"network": network.state_dict(), "average": average.state_dict()}
    torch.save({**state, "metrics": metrics.entries, "checkpoints": checkpoints.steps}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_two_workers_train_one_network_and_the_first_one_tells_of_it(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, timeout=120, check=True)

    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    initial = new_network().state_dict()
    for part in ("network", "average"):
        for name, weight in first[part].items():
            assert torch.equal(weight, second[part][name]), name
        assert not torch.equal(first[part]["proj_out.weight"], initial["proj_out.weight"])
    assert [images for images, _ in first["metrics"]] == [16, 32, 48, 64]
    assert first["metrics"][0][1]["loss"] == pytest.approx(1.5, abs=0.2), "the mean over both workers"
    assert first["checkpoints"] == [2, 4]
    assert (second["metrics"], second["checkpoints"]) == ([], [])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(work, args=(Path(sys.argv[1]),), nprocs=2, start_method="fork")
