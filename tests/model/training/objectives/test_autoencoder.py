"""The objective of the autoencoder, alone and with two workers. Run as a script, this file is both workers."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import VQModel
from torch import Tensor, nn

from model.configs import ConditioningConfig
from model.diffusion.vq_diffusion import Transitions
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder, decode_codes, encode_codes
from model.step_random import StepRandom
from model.training.batch import Batch
from model.training.objectives.autoencoder import AutoencoderObjective, reconstruction_loss
from model.training.objectives.vq_diffusion import MaskAndReplace

ROOT = Path(__file__).parents[4]


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


IMAGES = nn.functional.interpolate(uniform(16, 3, 4, 4), scale_factor=4)
"""Images of flat tiles (16, 3, 16, 16)."""


def build(codes: int = 32) -> VQModel:
    size = AutoencoderConfig(image_size=16, codes=codes, code_width=4, channels=(8, 8, 16))
    return build_autoencoder(size, seed=0)


def batch(images: Tensor = IMAGES) -> Batch:
    return Batch(images=images, query=torch.zeros(len(images), 4), neighbours=torch.zeros(len(images), 1, 4))


def test_reconstruction_loss_sums_pixels_and_edges_over_scales() -> None:
    zero = torch.zeros(1, 1, 4, 4)
    flat, stripes = zero + 0.5, zero + torch.tensor([0.5, -0.5, 0.5, -0.5])

    def loss(output: Tensor, edge_weight: float, scales: int) -> float:
        return float(reconstruction_loss(output, zero, edge_weight=edge_weight, scales=scales))

    assert loss(zero, 1, 2) == 0
    assert loss(flat, 1, 2) == pytest.approx(0.5)
    assert loss(stripes, 0, 1) == pytest.approx(0.5)
    assert loss(stripes, 2, 1) == pytest.approx(0.5 + 2 * 1)
    assert loss(stripes.mT, 2, 1) == pytest.approx(0.5 + 2 * 1)
    assert loss(stripes, 2, 2) == pytest.approx((0.5 + 2 * 1) / 2), "stripes vanish at half the size"


def trained(**options: Any) -> tuple[float, int]:
    """Train briefly; return the relative reconstruction error, and how many of 96 codes are in use."""
    network, objective = build(codes=96), AutoencoderObjective(96, **options)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for step in range(40):
        loss = objective(network, batch(), StepRandom(0, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codes = encode_codes(network, IMAGES)
    error = (decode_codes(network, codes) - IMAGES).abs().mean() / IMAGES.abs().mean()
    return float(error), len(codes.unique())


def test_autoencoder_objective_restarts_lower_the_error() -> None:
    error, used = trained(patience=5, restart_steps=30)
    error_without, _ = trained(restart_steps=0)
    _, used_without = trained(patience=1_000)
    assert error < 0.65 < 0.85 < error_without
    assert used > 70 > used_without


def test_autoencoder_objective_first_step_moves_every_code_onto_a_latent() -> None:
    network = build()
    with torch.no_grad():
        latents = network.encode(IMAGES).latents.permute(0, 2, 3, 1).flatten(0, 2)
    AutoencoderObjective(32)(network, batch(), StepRandom(0, 0))
    codebook = network.quantize.embedding.weight.detach()
    assert (codebook[:, None] - latents).abs().amax(2).amin(1).max() < 1e-6
    assert len(codebook.unique(dim=0)) == 32
    assert not network.quantize._forward_hooks
    assert not network.quantize._forward_pre_hooks


def test_restart_moves_only_dead_codes_before_restart_steps() -> None:
    objective = AutoencoderObjective(4, patience=2, restart_steps=3)
    codebook, latents = torch.zeros(4, 2), torch.arange(8.0).reshape(1, 2, 1, 4)
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3])

    def step(*used: int) -> list[bool]:
        before = codebook.clone()
        codebook.add_(0.3)
        objective.restart(codebook, latents, scores)
        objective.count(torch.tensor(used))
        return [bool(moved) for moved in (codebook != before + 0.3).any(1)]

    assert step(0, 1) == [True] * 4
    torch.testing.assert_close(codebook, latents[0, :, 0, [1, 3, 2, 0]].T)
    assert step(0, 1) == [False] * 4
    assert step(0) == [False, False, True, True]
    assert objective.idle.tolist() == [0, 1, 1, 1]
    assert step(0) == [False] * 4
    assert step(0) == [False] * 4, "no restarts after restart_steps"
    assert objective.idle.tolist() == [0, 3, 3, 3]


def test_restart_prefers_latents_far_from_live_codes() -> None:
    latents = torch.zeros(1, 2, 1, 8)
    latents[0, :, 0, :7] = 0.01 * uniform(2, 7)
    latents[0, :, 0, 7] = 3
    for seed in range(20):
        objective, codebook = AutoencoderObjective(2, patience=2), torch.zeros(2, 2)
        objective.idle.copy_(torch.tensor([0, 2]))
        objective.restart(codebook, latents, torch.rand(8, generator=torch.Generator().manual_seed(seed)))
        assert codebook.tolist() == [[0, 0], [3, 3]]


def test_autoencoder_objective_warm_steps_bypass_the_quantizer() -> None:
    network, objective = build(), AutoencoderObjective(32, warm_steps=2)
    before = network.quantize.embedding.weight.detach().clone()
    with torch.no_grad():
        unquantized = network.decode(network.encode(IMAGES).latents, force_not_quantize=True).sample
    expected = reconstruction_loss(unquantized, IMAGES, edge_weight=1.0, scales=3)
    for step in range(2):
        loss = objective(network, batch(), StepRandom(0, step))
        torch.testing.assert_close(loss, expected)
        assert torch.equal(network.quantize.embedding.weight, before)
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters()), (
        "DistributedDataParallel expects gradients for all"
    )
    objective(network, batch(), StepRandom(0, 2))
    assert not torch.equal(network.quantize.embedding.weight, before)
    assert objective.taken == 3


def test_autoencoder_objective_resumed_keeps_codes_in_use() -> None:
    network, objective = build(), AutoencoderObjective(32)
    objective(network, batch(), StepRandom(0, 0))
    before = network.quantize.embedding.weight.detach().clone()
    resumed = AutoencoderObjective(32)
    resumed.load_state_dict(objective.state_dict())
    resumed(network, batch(), StepRandom(0, 1))
    assert torch.equal(network.quantize.embedding.weight, before)


def test_autoencoder_objective_patience_zero_raises() -> None:
    with pytest.raises(ValueError, match="patience"):
        AutoencoderObjective(4, patience=0)


def work(rank: int, folder: Path) -> None:
    """Take one step of each objective as worker ``rank``; save the resulting state in ``folder``."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    objective, codebook = AutoencoderObjective(4, patience=1), torch.zeros(4, 2)
    objective.restart(codebook, uniform(2, 2, 2, 2, seed=rank), uniform(8, seed=rank))
    objective.count(torch.tensor([rank, rank]))
    shared = MaskAndReplace(Transitions(codes=4, timesteps=3), ConditioningConfig())
    shared.update_history(torch.tensor([1, 2 + rank]), torch.tensor([1.0 + 2 * rank, 2.0]))
    torch.save({"codebook": codebook, **objective.state_dict(), **shared.state_dict()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_objectives_on_two_workers_share_codebook_and_history(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, timeout=120, check=True)

    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first["codebook"].abs().min() > 0
    assert first["idle"].tolist() == [0, 0, 1, 1]
    assert first["seen"].tolist() == [2, 1, 1]
    assert first["history"].tolist() == [5, 4, 4]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(work, args=(Path(sys.argv[1]),), nprocs=2, start_method="fork")
