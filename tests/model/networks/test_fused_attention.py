"""The cheaper layers have the outputs and gradients of diffusers' own layers for the same weights."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from support import tiny_models
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune

from model.configs import TransformerConfig, VQTransformerConfig
from model.networks import fused_attention, vq_transformer
from model.networks.compilation import transformer_blocks
from model.networks.denoiser import as_denoiser
from model.networks.dit import build_transformer
from model.networks.fused_attention import (
    FoldedAttnProcessor,
    PatchProjection,
    TokenLinear,
    layer_sharing_state,
    sum_by_image,
    use_fused_attention,
)
from model.networks.vq_transformer import build_vq_transformer
from model.training.sharding import gather_state, shard
from model.training.throughput import flops_per_image

NOISY, SIGMA, TOKENS = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9]), torch.randn(2, 20, 9)
FEW, MANY = 4, 20
"""Numbers of condition tokens, for two heads of width 16 and 16 patches."""


def random_network() -> PixArtTransformer2DModel:
    size = TransformerConfig(image_size=16, layers=2, heads=2, head_width=16)
    return tiny_models.stirred(
        build_transformer(size, embedding_dimension=8, seed=0)
    ).double()  # keeps rounding errors small


def with_diffusers_layers(network: PixArtTransformer2DModel) -> PixArtTransformer2DModel:
    """Return a copy with diffusers' own attention and patch layers."""
    plain = copy.deepcopy(network)
    plain.set_attn_processor(AttnProcessor2_0())
    plain.pos_embed.proj = layer_sharing_state(nn.Conv2d, plain.pos_embed.proj)
    return plain


def velocity(network: nn.Module, tokens: int = FEW) -> Tensor:
    return as_denoiser(network, "velocity")(NOISY, SIGMA, TOKENS[:, :tokens])


def gradients(network: nn.Module, tokens: int = FEW) -> dict[str, Tensor]:
    velocity(network, tokens).square().sum().backward()
    return {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}


def assert_same(network: PixArtTransformer2DModel, reference: PixArtTransformer2DModel, tokens: int = FEW) -> None:
    assert list(network.state_dict()) == list(reference.state_dict())
    torch.testing.assert_close(velocity(network, tokens), velocity(reference, tokens))
    expected, actual = gradients(reference, tokens), gradients(network, tokens)
    assert expected.keys() == actual.keys() == dict(reference.named_parameters()).keys() - {"pos_embed.pos_embed"}
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=lambda message, name=name: f"{name}: {message}")


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of condition tokens of every call with folded projections."""
    counts: list[int] = []
    compute = fused_attention.folded_attention

    def counting(tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        counts.append(keys.shape[2])
        return compute(tokens, keys, values)

    for module in (fused_attention, vq_transformer):
        monkeypatch.setattr(module, "folded_attention", counting)
    return counts


@pytest.mark.parametrize("tokens", [1, FEW, 10, 11, MANY])
def test_fused_attention_any_number_of_tokens_equals_diffusers(tokens: int, folded: list[int]) -> None:
    network = random_network()
    assert {type(processor) for processor in network.attn_processors.values()} == {FoldedAttnProcessor}
    assert_same(network, with_diffusers_layers(network), tokens)
    assert set(folded) == ({tokens} if tokens <= 10 else set())


@pytest.mark.parametrize(("side", "heads", "border"), [(64, 2, 85), (64, 8, 56), (16, 4, 13)])
def test_folding_is_cheaper_is_true_exactly_where_it_saves_operations(
    side: int, heads: int, border: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = TransformerConfig(image_size=side, layers=1, heads=heads, head_width=64)
    network = build_transformer(size, embedding_dimension=8, seed=0)
    reference = with_diffusers_layers(network)

    def operations(module: nn.Module, tokens: int) -> int:
        noisy, condition = torch.zeros(1, 3, side, side), torch.zeros(1, tokens, 9)
        with sdpa_kernel(SDPBackend.MATH):  # on a CPU the counter does not see the other backends
            return flops_per_image(lambda: as_denoiser(module, "velocity")(noisy, SIGMA[:1], condition).sum())

    assert operations(network, border) < operations(reference, border)
    assert operations(network, border + 1) == operations(reference, border + 1)
    monkeypatch.setattr(fused_attention, "folding_is_cheaper", lambda *_, **__: True)
    assert operations(network, border + 1) > operations(reference, border + 1)


@pytest.mark.parametrize("change", ["biases", "adapter", "subclass", "dropout", "pruning", "hook", "mask"])
def test_fused_attention_modified_layer_falls_back_to_diffusers(change: str, folded: list[int]) -> None:
    network = random_network()
    outputs = []
    for each in (with_diffusers_layers(network), network):
        torch.manual_seed(0)
        for attn in (each.transformer_blocks[0].attn1, each.transformer_blocks[0].attn2):
            modify(attn, change)
        mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]) if change == "mask" else None
        sizes = {"resolution": None, "aspect_ratio": None}
        options = {"timestep": SIGMA, "added_cond_kwargs": sizes, "encoder_attention_mask": mask}
        outputs.append(each(NOISY.double(), TOKENS[:, :FEW].double(), **options).sample)
    torch.testing.assert_close(outputs[1], outputs[0])
    assert len(folded) == (0 if change == "mask" else 1), "without a mask, the other block is unmodified"


def modify(attn: Any, change: str) -> None:
    match change:
        case "biases":
            attn.to_q.bias = nn.Parameter(torch.randn(32, dtype=torch.float64))
        case "adapter":
            attn.to_v = nn.Sequential(attn.to_v, nn.Linear(32, 32, bias=False).double())
        case "subclass":
            attn.to_out[0] = layer_sharing_state(Doubling, attn.to_out[0])
        case "hook":
            attn.to_out[1].register_forward_hook(lambda *arguments: 2 * arguments[-1])
        case "dropout":
            attn.to_out[1].p = 0.5
            attn.train()
        case "pruning":
            prune.l1_unstructured(attn.to_k, "weight", 0.5)
            with torch.no_grad():
                attn.to_k.weight_orig *= 2  # a hook recomputes the weight from this parameter


class Doubling(nn.Linear):
    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * super().forward(tokens)


def test_fused_attention_layerwise_casting_takes_effect() -> None:
    network = random_network().float()
    expected = velocity(network)
    network.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    torch.testing.assert_close(velocity(network), expected, atol=0.5, rtol=0.05)


def test_use_fused_attention_keeps_a_custom_processor() -> None:
    class Custom(AttnProcessor2_0):
        pass

    network = random_network()
    network.set_attn_processor(Custom())
    use_fused_attention(network)
    assert {type(processor) for processor in network.attn_processors.values()} == {Custom}


def test_fused_attention_output_without_bias_equals_diffusers() -> None:
    network = random_network()
    for block in network.transformer_blocks:
        block.attn2.to_out[0].bias = None
    torch.testing.assert_close(velocity(network), velocity(with_diffusers_layers(network)))


def test_patch_projection_any_memory_layout_equals_convolution() -> None:
    convolution = nn.Conv2d(6, 10, kernel_size=(2, 4), stride=(2, 4)).double()
    product = layer_sharing_state(PatchProjection, convolution)
    images = torch.randn(3, 6, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(product(images[..., :7, :11]), convolution(images[..., :7, :11]))
    for layout in (images, images.to(memory_format=torch.channels_last), images.transpose(2, 3)[:, :, :8, :8]):
        torch.testing.assert_close(product(layout), convolution(layout))


def test_sum_by_image_output_and_gradients_are_unchanged() -> None:
    network = random_network()
    summed = copy.deepcopy(network)
    for block in transformer_blocks(summed):
        sum_by_image(block)
    layers = [part for part in summed.transformer_blocks[0].modules() if isinstance(part, TokenLinear)]
    assert len(layers) == 4, "the output projections of both attentions, and the two layers of the MLP"
    assert not any(isinstance(part, TokenLinear) for part in summed.adaln_single.modules()), (
        "these layers do not process tokens"
    )
    assert_same(summed, with_diffusers_layers(network))


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_sum_by_image_after_fully_shard_gives_every_weight_a_gradient() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = random_network()
        reference = with_diffusers_layers(network)
        shard(network, torch.device("cpu"))
        for block in transformer_blocks(network):
            sum_by_image(block)
        torch.testing.assert_close(gather_state(gradients(network)), gradients(reference))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(3,), (4, 3), (4, 5, 3), (4, 5, 6, 3)])
def test_token_linear_any_shape_equals_linear(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(3, 5)
    inputs = torch.randn(shape)
    expected = layer(inputs)
    torch.testing.assert_close(layer_sharing_state(TokenLinear, layer)(inputs), expected)


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_fused_attention_under_autocast_has_the_dtype_of_diffusers(kind: torch.dtype) -> None:
    network = random_network().float()
    with torch.autocast("cpu", torch.float16, enabled=kind == torch.float16):
        block, tokens, context = network.transformer_blocks[0], torch.randn(2, 16, 32), torch.randn(2, FEW, 32)
        reference = with_diffusers_layers(network).transformer_blocks[0]
        sum_by_image(block)
        for name in ("attn1", "attn2"):
            inputs = (tokens,) if name == "attn1" else (tokens, context)
            output, expected = getattr(block, name)(*inputs), getattr(reference, name)(*inputs)
            assert output.dtype == expected.dtype == kind
            torch.testing.assert_close(output, expected, atol=0.02 if kind == torch.float16 else 1e-5, rtol=0.01)


def test_use_fused_attention_ignores_other_networks_and_is_idempotent() -> None:
    codes = build_vq_transformer(VQTransformerConfig(codes=8, tokens=4, layers=1), embedding_dimension=8, seed=0)
    before = [type(part) for part in codes.modules()]
    use_fused_attention(codes)
    assert [type(part) for part in codes.modules()] == before
    network = random_network()
    expected = velocity(network)
    use_fused_attention(network)
    assert torch.equal(velocity(network), expected)


@pytest.mark.parametrize("tokens", [FEW, 9])
def test_vq_transformer_folded_attention_equals_unfolded(
    tokens: int, folded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = VQTransformerConfig(codes=12, tokens=9, timesteps=20, layers=2, heads=2, head_width=16)
    network = tiny_models.stirred(build_vq_transformer(size, embedding_dimension=8, seed=0)).double()
    reference = copy.deepcopy(network)
    codes, times = torch.randint(13, (2, 9)), torch.tensor([3, 20])

    def outputs_and_gradients(module: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        output = module(codes, times, TOKENS[:, :tokens])
        output.square().sum().backward()
        return output, {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}

    output, gradient = outputs_and_gradients(network)
    assert folded == ([tokens] * 2 if tokens == FEW else [])
    monkeypatch.setattr(vq_transformer, "folding_is_cheaper", lambda *_, **__: False)
    expected, expected_gradient = outputs_and_gradients(reference)
    torch.testing.assert_close(output, expected)
    assert gradient.keys() == expected_gradient.keys() == dict(network.named_parameters()).keys()
    for name, each in expected_gradient.items():
        torch.testing.assert_close(gradient[name], each, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize("change", ["adapter", "subclass", "hook"])
def test_vq_transformer_modified_output_layer_takes_effect(change: str) -> None:
    size = VQTransformerConfig(codes=12, tokens=9, timesteps=20, layers=1, heads=2, head_width=16)
    network = tiny_models.stirred(build_vq_transformer(size, embedding_dimension=8, seed=0))
    codes, times = torch.randint(13, (2, 9)), torch.tensor([3, 20])
    expected = network(codes, times, TOKENS[:, :FEW])
    cross = network.blocks[0].cross
    if change == "adapter":
        cross.out = nn.Sequential(cross.out, nn.Tanh())
    if change == "subclass":
        cross.out = layer_sharing_state(Doubling, cross.out)
    if change == "hook":
        cross.out.register_forward_hook(lambda *arguments: 2 * arguments[-1])
    assert (network(codes, times, TOKENS[:, :FEW]) - expected).abs().max() > 0.01
