"""The autoencoder, and two workers that keep one codebook. Run as a script, this file is both workers."""

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

from model.diffusion.conditioning import ConditioningConfig
from model.diffusion.vq_diffusion import MaskAndReplace, Transitions
from model.networks.vq_autoencoder import (
    AutoencoderConfig,
    AutoencoderObjective,
    build_autoencoder,
    decode_codes,
    encode_codes,
    reconstruction_loss,
)
from model.step_random import Draw
from model.training.data import Batch

ROOT = Path(__file__).parents[3]
SIZE: dict[str, Any] = {"image_size": 16, "codes": 32, "code_width": 4, "channels": (8, 8, 16)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


PICTURES = nn.functional.interpolate(drawn(16, 3, 4, 4), scale_factor=4)
"""Pictures of flat tiles (16, 3, 16, 16)."""


def build(seed: int = 0, **changes: Any) -> VQModel:
    return build_autoencoder(AutoencoderConfig(**SIZE | changes), seed=seed)


def batch(pictures: Tensor = PICTURES) -> Batch:
    return Batch(images=pictures, query=torch.zeros(len(pictures), 4), neighbours=torch.zeros(len(pictures), 1, 4))


def test_codes_are_as_many_as_the_configuration_says_and_all_below_k() -> None:
    codes = encode_codes(build(), PICTURES)
    assert codes.shape == (16, AutoencoderConfig(**SIZE).tokens) == (16, 16)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < 32
    assert AutoencoderConfig().tokens == 256


def test_codes_are_the_nearest_and_decode_as_the_network_itself_does() -> None:
    network = build()
    nn.init.normal_(network.quantize.embedding.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = network.encode(PICTURES).latents
        expected = network(PICTURES).sample
    codes = encode_codes(network, PICTURES)
    distances = (latents.flatten(2).mT[:, :, None] - network.quantize.embedding.weight).square().sum(3)
    assert len(codes.unique()) > 4
    assert torch.equal(codes, distances.argmin(2))
    torch.testing.assert_close(decode_codes(network, codes), expected.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_pictures_stay_in_range() -> None:
    network = build()
    with torch.no_grad():
        network.decoder.conv_out.weight.mul_(50)
    pictures = decode_codes(network, encode_codes(network, PICTURES))
    assert (pictures.min(), pictures.max()) == (-1, 1)


def test_its_weights_follow_from_the_seed_and_the_global_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    first, same, other = (nn.utils.parameters_to_vector(build(seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert (first != other).float().mean() > 0.5
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    network = build()
    network.save_pretrained(tmp_path)
    again = VQModel.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(encode_codes(again, PICTURES), encode_codes(network, PICTURES))


def test_the_default_size_is_under_five_million() -> None:
    assert sum(parameter.numel() for parameter in build_autoencoder(AutoencoderConfig(), seed=0).parameters()) < 5e6


def test_the_reconstruction_loss_is_of_pixels_and_of_edges_at_every_scale() -> None:
    zero = torch.zeros(1, 1, 4, 4)
    flat, stripes = zero + 0.5, zero + torch.tensor([0.5, -0.5, 0.5, -0.5])

    def loss(output: Tensor, edge_weight: float, scales: int) -> float:
        return float(reconstruction_loss(output, zero, edge_weight=edge_weight, scales=scales))

    assert loss(zero, 1, 2) == 0
    assert loss(flat, 1, 2) == pytest.approx(0.5)
    assert loss(stripes, 0, 1) == pytest.approx(0.5)
    assert loss(stripes, 2, 1) == pytest.approx(0.5 + 2 * 1)
    assert loss(stripes.mT, 2, 1) == pytest.approx(0.5 + 2 * 1)
    assert loss(stripes, 2, 2) == pytest.approx((0.5 + 2 * 1) / 2), "half the size has no stripes left"


def trained(**options: Any) -> tuple[float, int]:
    """Train briefly: the share of the pictures that is still missing, and how many of 96 codes are in use."""
    network, objective = build(codes=96), AutoencoderObjective(96, **options)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for step in range(40):
        loss = objective(network, batch(), Draw(0, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codes = encode_codes(network, PICTURES)
    error = (decode_codes(network, codes) - PICTURES).abs().mean() / PICTURES.abs().mean()
    return float(error), len(codes.unique())


def test_training_learns_the_pictures_if_the_codebook_is_kept_in_use() -> None:
    error, used = trained(patience=5, restart_steps=30)
    error_of_none, _ = trained(restart_steps=0)
    _, used_of_one = trained(patience=1_000)
    assert error < 0.65 < 0.85 < error_of_none
    assert used > 70 > used_of_one


def test_at_the_start_every_code_is_put_onto_a_latent_of_the_batch() -> None:
    network = build()
    with torch.no_grad():
        latents = network.encode(PICTURES).latents.permute(0, 2, 3, 1).flatten(0, 2)
    AutoencoderObjective(32)(network, batch(), Draw(0, 0))
    codebook = network.quantize.embedding.weight.detach()
    assert (codebook[:, None] - latents).abs().amax(2).amin(1).max() < 1e-6
    assert len(codebook.unique(dim=0)) == 32
    assert not network.quantize._forward_hooks
    assert not network.quantize._forward_pre_hooks


def test_only_the_dead_are_restarted_and_only_for_a_while() -> None:
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
    assert step(0) == [False] * 4, "after restart_steps the dead stay where they are"
    assert objective.idle.tolist() == [0, 3, 3, 3]


def test_a_dead_code_goes_where_latents_are_far_from_any_that_lives() -> None:
    latents = torch.zeros(1, 2, 1, 8)
    latents[0, :, 0, :7] = 0.01 * drawn(2, 7)
    latents[0, :, 0, 7] = 3
    for seed in range(20):
        objective, codebook = AutoencoderObjective(2, patience=2), torch.zeros(2, 2)
        objective.idle.copy_(torch.tensor([0, 2]))
        objective.restart(codebook, latents, torch.rand(8, generator=torch.Generator().manual_seed(seed)))
        assert codebook.tolist() == [[0, 0], [3, 3]]


def test_the_decoder_sees_the_latents_themselves_at_first() -> None:
    network, objective = build(), AutoencoderObjective(32, warm_steps=2)
    before = network.quantize.embedding.weight.detach().clone()
    with torch.no_grad():
        unquantized = network.decode(network.encode(PICTURES).latents, force_not_quantize=True).sample
    expected = reconstruction_loss(unquantized, PICTURES, edge_weight=1.0, scales=3)
    for step in range(2):
        loss = objective(network, batch(), Draw(0, step))
        torch.testing.assert_close(loss, expected)
        assert torch.equal(network.quantize.embedding.weight, before)
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters()), "as workers that share them expect"
    objective(network, batch(), Draw(0, 2))
    assert not torch.equal(network.quantize.embedding.weight, before)
    assert objective.taken == 3


def test_a_resumed_objective_restarts_nothing_that_is_in_use() -> None:
    network, objective = build(), AutoencoderObjective(32)
    objective(network, batch(), Draw(0, 0))
    before = network.quantize.embedding.weight.detach().clone()
    resumed = AutoencoderObjective(32)
    resumed.load_state_dict(objective.state_dict())
    resumed(network, batch(), Draw(0, 1))
    assert torch.equal(network.quantize.embedding.weight, before)


@pytest.mark.parametrize(
    "wrong", [{"downscale": 8}, {"image_size": 30}, {"codes": 1}, {"code_width": 0}, {"layers": 0}]
)
def test_a_size_that_cannot_be_built_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AutoencoderConfig(**wrong)


def test_no_patience_is_refused() -> None:
    with pytest.raises(ValueError, match="patience"):
        AutoencoderObjective(4, patience=0)


def work(rank: int, folder: Path) -> None:
    """One step of each objective as worker ``rank``; what came of it goes to ``folder``."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    kept, codebook = AutoencoderObjective(4, patience=1), torch.zeros(4, 2)
    kept.restart(codebook, drawn(2, 2, 2, 2, seed=rank), drawn(8, seed=rank))
    kept.count(torch.tensor([rank, rank]))
    shared = MaskAndReplace(Transitions(codes=4, timesteps=3), ConditioningConfig())
    shared.remember(torch.tensor([1, 2 + rank]), torch.tensor([1.0 + 2 * rank, 2.0]))
    torch.save({"codebook": codebook, **kept.state_dict(), **shared.state_dict()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_two_workers_keep_one_codebook_and_one_history(tmp_path: Path) -> None:
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
