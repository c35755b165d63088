"""Compilation in place keeps the output and the parameter names of a network."""

from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from support import tiny_models
from torch import Tensor, nn

from model.configs import TransformerConfig, UNetConfig, VQTransformerConfig
from model.networks.compilation import compile_in_place
from model.networks.denoiser import as_denoiser
from model.networks.dit import build_transformer
from model.networks.image_tokens import add_image_tokens
from model.networks.unet import build_unet
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder
from model.networks.vq_transformer import build_vq_transformer

NOISY, SIGMA, TOKENS = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9]), torch.randn(2, 4, 9)


def random_network(**changes: Any) -> PixArtTransformer2DModel:
    size = TransformerConfig(image_size=16, layers=2, heads=2, head_width=16, **changes)
    return tiny_models.stirred(
        build_transformer(size, embedding_dimension=8, seed=0)
    ).double()  # keeps rounding errors small


def velocity(network: nn.Module) -> Tensor:
    return as_denoiser(network, "velocity")(NOISY, SIGMA, TOKENS)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    velocity(network).square().sum().backward()
    return {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}


def compiled_parts(network: nn.Module, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    names, before = {id(part): name for name, part in network.named_modules()}, list(network.state_dict())
    compile_in_place(network, **options)
    assert list(network.state_dict()) == before
    return [names[id(part)] for part in compiled]


def test_compile_in_place_compiles_transformers_whole_and_others_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = build_vq_transformer(
        VQTransformerConfig(codes=8, tokens=4, timesteps=4, layers=2, heads=1, head_width=16),
        embedding_dimension=8,
        seed=0,
    )
    unet = build_unet(UNetConfig(image_size=8, widths=(32, 32), layers=1), embedding_dimension=8, seed=0)
    autoencoder = build_autoencoder(AutoencoderConfig(image_size=16, channels=(8, 8, 16)), seed=0)
    assert compiled_parts(random_network(), monkeypatch) == compiled_parts(codes, monkeypatch) == [""]
    with_images = add_image_tokens(random_network(), patch=8)
    assert compiled_parts(with_images, monkeypatch) == [""]
    blocks = ["transformer_blocks.0", "transformer_blocks.1"]
    assert compiled_parts(random_network(), monkeypatch, whole=False) == blocks
    assert compiled_parts(unet, monkeypatch) == ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"]
    assert compiled_parts(autoencoder, monkeypatch) == []


def compile_by(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace, but do not generate code: only CUDA code is used, and generating it for a CPU takes ten seconds."""
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_with(self, backend=backend))


@pytest.mark.parametrize("rotary", [False, True])
def test_compile_in_place_output_is_unchanged(rotary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by("aot_eager", monkeypatch)
    network = random_network(rotary=rotary)
    with torch.no_grad():
        expected = velocity(network)
        compile_in_place(network)
        torch.testing.assert_close(
            velocity(network), expected, atol=1e-3, rtol=1e-3
        )  # sinusoidal embeddings stay float32


def test_compile_in_place_unet_batches_of_many_sizes_stay_below_the_recompile_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_by("eager", monkeypatch)
    unet = build_unet(UNetConfig(image_size=8, widths=(32, 32), layers=1), embedding_dimension=8, seed=0).eval()

    def run(batch: int) -> None:
        unet(torch.zeros(batch, 3, 8, 8), torch.ones(batch), torch.zeros(batch, 4, 9))

    low_limit = torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)
    with torch.no_grad(), low_limit:  # the class of the four blocks needs more than two graphs
        compile_in_place(unet)
        for batch in (4, 2, 1, 5, 7):
            run(batch)
