from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from support import tiny_models
from torch import Tensor, nn

from infra.key_fields import key_settings
from model.configs import TransformerConfig
from model.diffusion.conditioning import condition_tokens
from model.networks.denoiser import as_denoiser
from model.networks.dit import build_transformer
from model.networks.image_tokens import takes_images

NOISY = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.2, 0.5, 0.9])
ROWS = torch.from_numpy(tiny_models.unit_rows(12)).float()
QUERY, NEIGHBOURS = ROWS[:3], ROWS[3:].reshape(3, 3, -1)


def tokens(query: Tensor = QUERY, neighbours: Tensor = NEIGHBOURS) -> Tensor:
    return condition_tokens(query, neighbours, dimension=tiny_models.WIDTH, batch=len(query))


@pytest.fixture(scope="module")
def network() -> PixArtTransformer2DModel:
    return tiny_models.network()


@torch.no_grad()
def velocity(
    network: nn.Module, noisy: Tensor = NOISY, sigma: Tensor = SIGMA, condition: Tensor | None = None
) -> Tensor:
    return as_denoiser(network, "velocity")(noisy, sigma, tokens() if condition is None else condition)


def test_transformer_initial_output_is_zero() -> None:
    network = build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=0)
    assert torch.equal(velocity(network), torch.zeros_like(NOISY))


def test_build_transformer_depends_only_on_the_seed() -> None:
    def weights(seed: int) -> Tensor:
        network = build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=seed)
        return nn.utils.parameters_to_vector(network.parameters())

    before = torch.random.get_rng_state()
    assert torch.equal(weights(1), weights(1))
    assert (weights(1) != weights(2)).float().mean() > 0.5
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("image_size", "patch_size", "heads"), [(8, 4, 1), (16, 2, 2), (32, 8, 1)])
def test_build_transformer_size_matches_the_config(image_size: int, patch_size: int, heads: int) -> None:
    config = tiny_models.size(image_size=image_size, patch_size=patch_size, heads=heads, layers=2)
    network = build_transformer(config, embedding_dimension=12, seed=0)
    assert len(network.transformer_blocks) == 2
    assert network.pos_embed.pos_embed.shape == (1, (image_size // patch_size) ** 2, heads * 16)
    condition = torch.zeros(2, 4, 13)
    assert velocity(network, torch.zeros(2, 3, image_size, image_size), SIGMA[:2], condition).shape == (
        (2, 3, image_size, image_size)
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch_size": 3},
        {"patch_size": 0},
        {"image_size": 0},
        {"layers": 0},
        {"heads": 0},
        {"head_width": 0},
        {"channels": 0},
        {"neighbour_images": 5},
        {"neighbour_images": 1, "channels": 4},
        {"neighbour_patch": 5, "neighbour_images": 1},
        {"head_width": 12, "neighbour_images": 1},
        {"rotary": True, "head_width": 6},
    ],
)
def test_transformer_config_invalid_field_raises(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TransformerConfig(**wrong)


def test_build_transformer_with_neighbour_images_has_the_same_other_weights() -> None:
    plain, extended = (
        build_transformer(tiny_models.size(neighbour_images=images, neighbour_patch=4), embedding_dimension=8, seed=3)
        for images in (0, 2)
    )
    assert (takes_images(plain), takes_images(extended)) == (False, True)
    weights = extended.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.state_dict().items())


def test_transformer_config_without_later_fields_has_the_key_of_earlier_versions() -> None:
    assert not {"neighbour_images", "neighbour_patch", "rotary"} & key_settings(TransformerConfig()).keys()
    changed = key_settings(TransformerConfig(neighbour_images=2, rotary=True))
    assert (changed["neighbour_images"], changed["rotary"]) == (2, True)


def test_as_denoiser_passes_1000_sigma_and_the_tokens_to_the_network() -> None:
    calls: list[dict[str, Any]] = []

    class Spy(nn.Module):
        dtype = torch.float32

        def forward(self, noisy: Tensor, **options: Any) -> tuple[Tensor]:
            calls.append({"noisy": noisy, **options})
            return (noisy * 0.5,)

    condition = tokens()
    output = as_denoiser(Spy(), "sample")(NOISY, SIGMA, condition)
    assert calls[0]["timestep"].tolist() == pytest.approx([200, 500, 900])
    assert torch.equal(calls[0]["noisy"], NOISY)
    assert torch.equal(calls[0]["encoder_hidden_states"], condition)
    torch.testing.assert_close(output, 0.5 * NOISY / SIGMA[:, None, None, None])


def test_as_denoiser_both_predictions_interpret_the_same_output(network: PixArtTransformer2DModel) -> None:
    with torch.no_grad():
        clean = as_denoiser(network, "sample")(NOISY, SIGMA, tokens())
    torch.testing.assert_close(clean, (NOISY - velocity(network)) / SIGMA[:, None, None, None])


def test_transformer_samples_of_a_batch_are_independent(network: PixArtTransformer2DModel) -> None:
    together = velocity(network)
    for position in range(3):
        own = slice(position, position + 1)
        alone = velocity(network, NOISY[own], SIGMA[own], tokens()[own])
        torch.testing.assert_close(alone, together[own], atol=1e-4, rtol=1e-4)


def test_transformer_output_depends_on_every_input(network: PixArtTransformer2DModel) -> None:
    base = velocity(network)
    for name, other in {
        "query": velocity(network, condition=tokens(query=QUERY.flip(0))),
        "neighbours": velocity(network, condition=tokens(neighbours=NEIGHBOURS.flip(0))),
        "sigma": velocity(network, sigma=SIGMA.flip(0)),
        "image": velocity(network, noisy=NOISY.flip(3)),
    }.items():
        assert (other - base).abs().max() > 1e-2, name


def test_transformer_ignores_the_order_of_neighbours_but_distinguishes_the_query(
    network: PixArtTransformer2DModel,
) -> None:
    base = velocity(network)
    shuffled = velocity(network, condition=tokens(neighbours=NEIGHBOURS[:, [2, 0, 1]]))
    torch.testing.assert_close(shuffled, base, atol=1e-4, rtol=1e-4)
    swapped = torch.cat([QUERY[:, None], NEIGHBOURS], dim=1)[:, [1, 0, 2, 3]]
    assert (velocity(network, condition=tokens(swapped[:, 0], swapped[:, 1:])) - base).abs().max() > 1e-2


def test_transformer_attention_has_biases_only_at_the_output(network: PixArtTransformer2DModel) -> None:
    biased = [name for name, _ in network.named_parameters() if ".to_" in name and name.endswith(".bias")]
    assert all(".to_out." in name for name in biased)
