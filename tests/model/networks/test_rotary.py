from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention
from support import tiny_models

from model.networks.denoiser import as_denoiser
from model.networks.editor import is_editor, widen_input
from model.networks.image_tokens import NeighbourImageTransformer, ShownImages, add_image_tokens
from model.networks.rotary import RotaryAttnProcessor, RotaryTransformer
from model.pipeline import KNNDiffusionPipeline, new_pipeline

GENERATOR = torch.Generator().manual_seed(0)
NOISY = torch.randn(3, 3, 8, 8, generator=GENERATOR)
SIGMA = torch.tensor([0.2, 0.5, 0.9])
TOKENS = torch.randn(3, 4, tiny_models.WIDTH + 1, generator=GENERATOR)
IMAGES = ShownImages(torch.rand(3, 1, 3, 8, 8, generator=GENERATOR), torch.ones(3, 1, dtype=torch.bool))


def velocity(
    network: PixArtTransformer2DModel, noisy: torch.Tensor = NOISY, images: ShownImages | None = None
) -> torch.Tensor:
    inputs = torch.cat([noisy, -noisy], dim=1) if is_editor(network) else noisy
    with torch.no_grad():
        return as_denoiser(network, "velocity", images)(inputs, SIGMA, TOKENS)


def test_rotary_attention_equals_complex_rotations_by_row_and_column() -> None:
    patches, heads, width = 3, 2, 8
    attn = Attention(heads * width, heads=heads, dim_head=width, processor=None)
    tokens = torch.randn(2, patches**2, heads * width)
    frequencies = 10_000.0 ** -(torch.arange(2) / 2)  # width / 4 for each axis
    column, row = (torch.arange(patches**2) % patches, torch.arange(patches**2) // patches)
    angles = torch.cat([axis[:, None] * frequencies for axis in (column, row)], dim=1)

    def rotated(projection: torch.nn.Module) -> torch.Tensor:
        parts = projection(tokens).view(2, -1, heads, width // 2, 2).transpose(1, 2).contiguous()
        return torch.view_as_complex(parts) * torch.polar(torch.ones_like(angles), angles)

    scores = (rotated(attn.to_q) @ rotated(attn.to_k).mH).real / width**0.5
    values = attn.to_v(tokens).unflatten(2, (heads, width)).transpose(1, 2)
    expected = attn.to_out[0]((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
    attn.set_processor(RotaryAttnProcessor(head_width=width, patches=patches))
    torch.testing.assert_close(attn(tokens), expected, atol=1e-5, rtol=1e-5)


def test_rotary_network_distinguishes_positions_without_absolute_ones() -> None:
    plain, rotary = tiny_models.network(), tiny_models.network(rotary=True)
    assert (type(plain), type(rotary)) == (PixArtTransformer2DModel, RotaryTransformer)
    assert {name: weight.shape for name, weight in rotary.state_dict().items()} == (
        {name: weight.shape for name, weight in plain.state_dict().items()}
    )
    moved = NOISY.roll(4, dims=3)  # by one of two patches
    for network in (plain, rotary):
        network.pos_embed.pos_embed.zero_()
    torch.testing.assert_close(velocity(plain, moved), velocity(plain).roll(4, dims=3))
    assert (velocity(rotary, moved) - velocity(rotary).roll(4, dims=3)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["generator", "editor", "images", "editor with images"])
def test_rotary_pipeline_saved_and_opened_is_equal(kind: str, tmp_path: Path) -> None:
    network = tiny_models.network(rotary=True)
    if "images" in kind:
        network = tiny_models.stirred(add_image_tokens(network, patch=4))
    if "editor" in kind:
        network = tiny_models.stirred(widen_input(network))
    new_pipeline(network, tiny_models.identity(), neighbours=3).save_pretrained(tmp_path)
    opened = KNNDiffusionPipeline.open(tmp_path).transformer
    assert type(opened) is (NeighbourImageTransformer if "images" in kind else RotaryTransformer)
    assert opened.config.rotary
    images = IMAGES if "images" in kind else None
    torch.testing.assert_close(velocity(opened, images=images), velocity(network, images=images))


def test_add_image_tokens_to_a_rotary_network_keeps_its_output() -> None:
    base = tiny_models.network(rotary=True)
    extended = add_image_tokens(base, patch=4)
    assert torch.equal(velocity(extended, images=IMAGES), velocity(base))
    assert not add_image_tokens(tiny_models.network(), patch=4).config.rotary


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotary_network_in_half_precision_is_close(dtype: torch.dtype) -> None:
    network = tiny_models.network(rotary=True)
    expected = velocity(network)
    torch.testing.assert_close(velocity(network.to(dtype)), expected, atol=0.1, rtol=0.1)
