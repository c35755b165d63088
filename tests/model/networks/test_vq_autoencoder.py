from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from torch import Tensor, nn

from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder, decode_codes, encode_codes

SIZE: dict[str, Any] = {"image_size": 16, "codes": 32, "code_width": 4, "channels": (8, 8, 16)}


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


IMAGES = nn.functional.interpolate(uniform(16, 3, 4, 4), scale_factor=4)
"""Images of flat tiles (16, 3, 16, 16)."""


def build(seed: int = 0, **changes: Any) -> VQModel:
    return build_autoencoder(AutoencoderConfig(**SIZE | changes), seed=seed)


def test_encode_codes_shape_and_range_match_the_config() -> None:
    codes = encode_codes(build(), IMAGES)
    assert codes.shape == (16, AutoencoderConfig(**SIZE).tokens) == (16, 16)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < 32
    assert AutoencoderConfig().tokens == 256


def test_encode_codes_are_nearest_and_decode_like_the_network() -> None:
    network = build()
    nn.init.normal_(network.quantize.embedding.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = network.encode(IMAGES).latents
        expected = network(IMAGES).sample
    codes = encode_codes(network, IMAGES)
    distances = (latents.flatten(2).mT[:, :, None] - network.quantize.embedding.weight).square().sum(3)
    assert len(codes.unique()) > 4
    assert torch.equal(codes, distances.argmin(2))
    torch.testing.assert_close(decode_codes(network, codes), expected.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_decode_codes_stays_in_range() -> None:
    network = build()
    with torch.no_grad():
        network.decoder.conv_out.weight.mul_(50)
    images = decode_codes(network, encode_codes(network, IMAGES))
    assert (images.min(), images.max()) == (-1, 1)


def test_build_autoencoder_depends_only_on_the_seed() -> None:
    before = torch.random.get_rng_state()
    first, same, other = (nn.utils.parameters_to_vector(build(seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert (first != other).float().mean() > 0.5
    assert torch.equal(torch.random.get_rng_state(), before)


def test_autoencoder_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    network = build()
    network.save_pretrained(tmp_path)
    again = VQModel.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(encode_codes(again, IMAGES), encode_codes(network, IMAGES))


def test_autoencoder_default_size_is_below_5_million() -> None:
    assert sum(parameter.numel() for parameter in build_autoencoder(AutoencoderConfig(), seed=0).parameters()) < 5e6


@pytest.mark.parametrize(
    "wrong", [{"downscale": 8}, {"image_size": 30}, {"codes": 1}, {"code_width": 0}, {"layers": 0}]
)
def test_autoencoder_config_invalid_field_raises(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AutoencoderConfig(**wrong)
