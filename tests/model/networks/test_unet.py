import dataclasses
from typing import Any

import pytest
import torch
from support import tiny_models

from model.configs import UNetConfig
from model.networks.denoiser import as_denoiser
from model.networks.unet import build_unet

SMALL = UNetConfig(image_size=8, widths=(32, 64), layers=1, head_width=32)


def build(seed: int = 0, **changes: Any) -> Any:
    return build_unet(dataclasses.replace(SMALL, **changes), embedding_dimension=tiny_models.WIDTH, seed=seed)


def inputs(batch: int = 2, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, channels, 8, 8, generator=generator),
        torch.rand(batch, generator=generator),
        torch.randn(batch, 3, tiny_models.WIDTH + 1, generator=generator),
    )


@pytest.mark.parametrize("channels", [3, 4])
def test_unet_initial_output_is_zero_with_the_shape_of_the_input(channels: int) -> None:
    output = as_denoiser(build(channels=channels), "velocity")(*inputs(channels=channels))
    assert output.shape == (2, channels, 8, 8)
    assert not output.any()


def test_unet_output_depends_on_image_sigma_and_condition() -> None:
    network = build()
    torch.nn.init.normal_(network.conv_out.weight, generator=torch.Generator().manual_seed(1))
    denoise, (noisy, sigma, tokens) = as_denoiser(network.eval(), "velocity"), inputs()
    first = denoise(noisy, sigma, tokens)
    for changed in ((noisy + 1, sigma, tokens), (noisy, sigma / 2, tokens), (noisy, sigma, tokens.flip(0))):
        assert (denoise(*changed) - first).abs().max() > 1e-4
    torch.testing.assert_close(denoise(*(part[:1] for part in inputs())), first[:1], atol=1e-3, rtol=1e-3)


def test_unet_has_attention_at_all_levels_but_the_first() -> None:
    network = build(widths=(32, 64, 96))
    attended = [hasattr(block, "attentions") for block in network.down_blocks]
    assert attended == [False, True, True]
    heads = [block.attentions[0].transformer_blocks[0].attn2.heads for block in network.down_blocks[1:]]
    assert heads == [2, 3], "width / head_width"


def test_build_unet_depends_only_on_the_seed() -> None:
    before = torch.random.get_rng_state()
    first, same, other = (build(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(weight, same[name]) for name, weight in first.items())
    assert any(not torch.equal(weight, other[name]) for name, weight in first.items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 9}, "cannot be halved at each level: 9"),
        ({"image_size": 4, "widths": (32, 32, 32, 32)}, "cannot be halved at each level: 4"),
        ({"image_size": 0}, "image_size is below 1: 0; give at least 1"),
        ({"head_width": 0}, "head_width is below 1: 0; give at least 1"),
        ({"widths": (0, 64)}, "multiples of 32"),
        ({"widths": (32,)}, "1 widths; give at least 2 widths"),
        ({"widths": (32, 48)}, "multiples of 32"),
        ({"widths": (32, 64), "head_width": 64}, "of head_width 64"),
    ],
)
def test_unet_config_invalid_field_raises(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**wrong)
