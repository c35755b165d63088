from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from support import tiny_models

from model.diffusion.conditioning import append_image_tokens, null_condition
from model.errors import ModelError
from model.networks.denoiser import as_denoiser
from model.networks.editor import is_editor, widen_input, with_reference
from model.networks.fused_attention import use_fused_attention
from model.networks.image_tokens import (
    NeighbourImageTransformer,
    ShownImages,
    add_image_tokens,
    takes_images,
)

GENERATOR = torch.Generator().manual_seed(0)
NOISY = torch.randn(3, 3, 8, 8, generator=GENERATOR)
SIGMA = torch.tensor([0.2, 0.5, 0.9])
TOKENS = torch.randn(3, 4, tiny_models.WIDTH + 1, generator=GENERATOR)
IMAGES = ShownImages(
    torch.rand(3, 2, 3, 8, 8, generator=GENERATOR) * 2 - 1,
    torch.tensor([[True, True], [True, False], [False, False]]),
)


def with_tokens(seed: int = 0) -> NeighbourImageTransformer:
    """Return a network whose outputs depend on its image tokens."""
    extended: NeighbourImageTransformer = tiny_models.stirred(
        add_image_tokens(tiny_models.network(), images=2, patch=4, seed=seed)
    )
    return extended


def velocity(
    network: PixArtTransformer2DModel, tokens: torch.Tensor = TOKENS, images: ShownImages | None = None
) -> torch.Tensor:
    with torch.no_grad():
        return as_denoiser(network, "velocity", images)(NOISY, SIGMA, tokens)


def encoded(network: NeighbourImageTransformer, images: ShownImages = IMAGES) -> torch.Tensor:
    with torch.no_grad():
        return network.encode_images(*images)


@pytest.mark.parametrize("kind", ["generator", "editor"])
def test_add_image_tokens_output_is_unchanged_for_any_images(kind: str) -> None:
    base = tiny_models.network() if kind == "generator" else widen_input(tiny_models.network())
    extended = add_image_tokens(base, images=2, patch=4)
    assert (takes_images(extended), takes_images(base)) == (True, False)
    assert is_editor(extended) == is_editor(base) == (kind == "editor")
    with torch.no_grad():
        expected, shown, hidden = (
            with_reference(as_denoiser(network, "velocity", images), -NOISY)(NOISY, SIGMA, TOKENS)
            if kind == "editor"
            else velocity(network, images=images)
            for network, images in ((base, None), (extended, IMAGES), (extended, None))
        )
    assert expected.abs().min() > 0
    assert torch.equal(shown, expected)
    assert torch.equal(hidden, expected)


def test_add_image_tokens_new_weights_train_and_the_base_stays_unchanged() -> None:
    base = tiny_models.network()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    extended = add_image_tokens(base, images=2, patch=4)
    optimizer = torch.optim.SGD(extended.parameters(), lr=1.0)
    for _ in range(2):  # at first only the output projections have a gradient
        extended.zero_grad()
        as_denoiser(extended, "velocity", IMAGES)(NOISY, SIGMA, TOKENS).square().mean().backward()
        optimizer.step()
    new = [parameter for name, parameter in extended.named_parameters() if name not in before]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in new)
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())


def test_forward_encoded_once_equals_encoding_at_every_call() -> None:
    network = with_tokens()
    again = velocity(network, images=IMAGES)
    once = velocity(network, append_image_tokens(TOKENS, encoded(network)))
    torch.testing.assert_close(once, again)
    changed = (again - velocity(network)).abs().amax((1, 2, 3))
    assert (changed > 1e-3).tolist() == [True, True, False], "hidden images have no effect at all"


def test_forward_null_condition_hides_vectors_and_images() -> None:
    network = with_tokens()
    condition = append_image_tokens(TOKENS, encoded(network))
    torch.testing.assert_close(
        velocity(network, null_condition(condition)), velocity(network, null_condition(TOKENS)), rtol=0, atol=0
    )


def test_encode_images_fewer_images_equal_hidden_ones() -> None:
    network = with_tokens()
    first = ShownImages(IMAGES.pixels[:, :1], IMAGES.shown[:, :1])
    hidden = ShownImages(IMAGES.pixels, IMAGES.shown & torch.tensor([True, False]))
    assert encoded(network).shape == (3, network.image_tokens, tiny_models.WIDTH) == (3, 8, tiny_models.WIDTH)
    torch.testing.assert_close(encoded(network, first), encoded(network, hidden))
    swapped = ShownImages(IMAGES.pixels.flip(1), IMAGES.shown.flip(1))
    assert not torch.allclose(encoded(network, swapped)[0].sum(0), encoded(network)[0].sum(0)), "the order counts"


@pytest.mark.parametrize("shape", [(1, 3, 3, 8, 8), (1, 1, 3, 16, 16)])
def test_encode_images_wrong_shape_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="images have the wrong shape"):
        with_tokens().encode_images(torch.zeros(shape), torch.ones(shape[:2], dtype=torch.bool))


def test_network_with_image_tokens_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    network = widen_input(with_tokens())
    network.save_pretrained(tmp_path)
    loaded = NeighbourImageTransformer.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    use_fused_attention(loaded)
    assert loaded.config.neighbour_images == 2
    assert loaded.state_dict().keys() == network.state_dict().keys()
    outputs = [
        with_reference(as_denoiser(one, "velocity", IMAGES), NOISY)(NOISY, SIGMA, TOKENS) for one in (loaded, network)
    ]
    torch.testing.assert_close(*outputs)


def test_add_image_tokens_is_a_function_of_the_seed() -> None:
    first, same, other = (add_image_tokens(tiny_models.network(), patch=4, seed=seed) for seed in (0, 0, 1))
    weights = [network.image_encoder.out.weight for network in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_add_image_tokens_twice_or_to_latents_or_adapters_raises() -> None:
    with pytest.raises(ModelError, match="already has image tokens"):
        add_image_tokens(with_tokens())
    with pytest.raises(ModelError, match="need a network over pixels: 4 channels"):
        add_image_tokens(tiny_models.network(channels=4))
    adapted = tiny_models.network()
    adapted.transformer_blocks[0].attn1.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"weights of no known layer: .*adapter"):
        add_image_tokens(adapted)
