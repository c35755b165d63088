import pytest
import torch
from support import tiny_models

from model.configs import UNetConfig, VQTransformerConfig
from model.networks.build import build_network
from model.networks.editor import widen_input
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder, decode_codes
from model.training.batch import Batch
from model.training.preview import decode_targets, generate_preview

VQ = AutoencoderConfig(image_size=8, downscale=4, codes=8, code_width=4, channels=(8, 8, 8))


def batch(seed: int = 0) -> Batch:
    rows = torch.from_numpy(tiny_models.unit_rows(9, seed=seed)).float()
    return Batch(images=torch.zeros(3, 3, 8, 8), query=rows[:3], neighbours=rows[3:].reshape(3, 2, -1))


@pytest.mark.parametrize("network", ["transformer", "editor", "unet", "vq-transformer"])
def test_generate_preview_every_network_depends_on_its_batch(network: str) -> None:
    autoencoder = None
    match network:
        case "transformer":
            built = tiny_models.network()
        case "editor":
            built = widen_input(tiny_models.network())
        case "unet":
            size = UNetConfig(image_size=8, widths=(32, 64), layers=1)
            built = build_network(size, embedding_dimension=tiny_models.WIDTH, seed=0)
            torch.nn.init.normal_(built.conv_out.weight, generator=torch.Generator().manual_seed(0))
        case _:
            autoencoder = build_autoencoder(VQ, seed=0)
            codes = VQTransformerConfig(codes=8, tokens=4, timesteps=10, layers=1, heads=1, head_width=16)
            built = build_network(codes, embedding_dimension=tiny_models.WIDTH, seed=0)
            torch.nn.init.normal_(built.head.weight, std=2, generator=torch.Generator().manual_seed(0))
            torch.nn.init.normal_(built.time_out.weight, std=2, generator=torch.Generator().manual_seed(0))
    first, same, other = (
        generate_preview(built, batch(seed), prediction="velocity", autoencoder=autoencoder) for seed in (0, 0, 1)
    )
    assert first.shape == (3, 3, 8, 8)
    assert first.abs().max() <= 1
    assert torch.equal(first, same)
    assert not torch.equal(first, other) or network == "vq-transformer"


def test_generate_preview_short_process_uses_all_its_timesteps() -> None:
    codes = VQTransformerConfig(codes=8, tokens=4, timesteps=3, layers=1, heads=1, head_width=16)
    built = build_network(codes, embedding_dimension=tiny_models.WIDTH, seed=0)
    images = generate_preview(built, batch(), prediction="velocity", autoencoder=build_autoencoder(VQ, seed=0))
    assert images.shape == (3, 3, 8, 8)


def test_generate_preview_editor_equals_its_base() -> None:
    base = tiny_models.network()
    images = [
        generate_preview(network, batch(), prediction="velocity", autoencoder=None)
        for network in (base, widen_input(base))
    ]
    torch.testing.assert_close(images[0], images[1])


def test_decode_targets_decodes_codes_and_latents() -> None:
    autoencoder, codes = build_autoencoder(VQ, seed=0), torch.arange(8).reshape(2, 4)
    torch.testing.assert_close(decode_targets(codes, autoencoder), decode_codes(autoencoder, codes).clamp(-1, 1))
    assert decode_targets(torch.zeros(2, 4, 2, 2), autoencoder).shape == (2, 3, 8, 8)
    assert decode_targets(torch.full((1, 3, 2, 2), 2.0), None).unique().tolist() == [1]
