"""A network in fewer operations draws and learns what diffusers' own layers make of the same weights."""

import copy
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from support import tiny_models
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune

from model.networks import fused_attention, vq_transformer
from model.networks.compilation import transformer_blocks
from model.networks.denoiser import as_denoiser
from model.networks.dit import TransformerConfig, build_transformer
from model.networks.fused_attention import (
    FoldedAttnProcessor,
    PatchProjection,
    TokenLinear,
    sum_by_image,
    use_fused_attention,
)
from model.networks.vq_transformer import VQTransformerConfig, build_vq_transformer
from model.training.throughput import flops_per_image

NOISY, SIGMA, TOKENS = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9]), torch.randn(2, 20, 9)
FEW, MANY = 4, 20
"""Condition tokens, of two heads 16 wide and 16 patches."""


def stirred() -> PixArtTransformer2DModel:
    size = TransformerConfig(image_size=16, layers=2, heads=2, head_width=16)
    return tiny_models.stirred(
        build_transformer(size, embedding_dimension=8, seed=0)
    ).double()  # so that rounding is small


def as_written(network: PixArtTransformer2DModel) -> PixArtTransformer2DModel:
    """A copy that computes as diffusers does."""
    plain = copy.deepcopy(network)
    plain.set_attn_processor(AttnProcessor2_0())
    plain.pos_embed.proj.__class__ = nn.Conv2d
    return plain


def velocity(network: nn.Module, tokens: int = FEW) -> Tensor:
    return as_denoiser(network, "velocity")(NOISY, SIGMA, TOKENS[:, :tokens])


def gradients(network: nn.Module, tokens: int = FEW) -> dict[str, Tensor]:
    velocity(network, tokens).square().sum().backward()
    return {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}


def assert_same(network: PixArtTransformer2DModel, written: PixArtTransformer2DModel, tokens: int = FEW) -> None:
    assert list(network.state_dict()) == list(written.state_dict())
    torch.testing.assert_close(velocity(network, tokens), velocity(written, tokens))
    expected, found = gradients(written, tokens), gradients(network, tokens)
    assert expected.keys() == found.keys() == dict(written.named_parameters()).keys() - {"pos_embed.pos_embed"}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda told, name=name: f"{name}: {told}")


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The condition tokens of every layer that took them for few."""
    seen: list[int] = []
    compute = fused_attention.folded_attention

    def counting(tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        seen.append(keys.shape[2])
        return compute(tokens, keys, values)

    for module in (fused_attention, vq_transformer):
        monkeypatch.setattr(module, "weighted_values", counting)
    return seen


@pytest.mark.parametrize("tokens", [1, FEW, 10, 11, MANY])
def test_of_few_tokens_and_many_it_draws_and_learns_what_is_written(tokens: int, folded: list[int]) -> None:
    network = stirred()
    assert {type(processor) for processor in network.attn_processors.values()} == {FoldedAttnProcessor}
    assert_same(network, as_written(network), tokens)
    assert set(folded) == ({tokens} if tokens <= 10 else set())


@pytest.mark.parametrize(("side", "heads", "border"), [(64, 2, 85), (64, 8, 56), (16, 4, 13)])
def test_tokens_are_few_where_they_take_fewer_operations_so(
    side: int, heads: int, border: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = TransformerConfig(image_size=side, layers=1, heads=heads, head_width=64)
    network = build_transformer(size, embedding_dimension=8, seed=0)
    written = as_written(network)

    def operations(of: nn.Module, tokens: int) -> int:
        noisy, told = torch.zeros(1, 3, side, side), torch.zeros(1, tokens, 9)
        with sdpa_kernel(SDPBackend.MATH):  # of the others the counter counts none on a CPU
            return flops_per_image(lambda: as_denoiser(of, "velocity")(noisy, SIGMA[:1], told).sum())

    assert operations(network, border) < operations(written, border)
    assert operations(network, border + 1) == operations(written, border + 1)
    monkeypatch.setattr(fused_attention, "folding_is_cheaper", lambda *_, **__: True)
    assert operations(network, border + 1) > operations(written, border + 1)


@pytest.mark.parametrize("change", ["biases", "adapter", "subclass", "dropout", "pruning", "hook", "mask"])
def test_attention_that_is_more_than_its_matrices_is_as_diffusers_computes_it(change: str, folded: list[int]) -> None:
    network = stirred()
    answers = []
    for each in (as_written(network), network):
        torch.manual_seed(0)
        for attn in (each.transformer_blocks[0].attn1, each.transformer_blocks[0].attn2):
            make_more_of(attn, change)
        mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]) if change == "mask" else None
        sizes = {"resolution": None, "aspect_ratio": None}
        given = {"timestep": SIGMA, "added_cond_kwargs": sizes, "encoder_attention_mask": mask}
        answers.append(each(NOISY.double(), TOKENS[:, :FEW].double(), **given).sample)
    torch.testing.assert_close(answers[1], answers[0])
    assert len(folded) == (0 if change == "mask" else 1), "the other block is plain, where no mask comes"


def make_more_of(attn: Any, change: str) -> None:
    match change:
        case "biases":
            attn.to_q.bias = nn.Parameter(torch.randn(32, dtype=torch.float64))
        case "adapter":
            attn.to_v = nn.Sequential(attn.to_v, nn.Linear(32, 32, bias=False).double())
        case "subclass":
            attn.to_out[0].__class__ = Doubling
        case "hook":
            attn.to_out[1].register_forward_hook(lambda *told: 2 * told[-1])
        case "dropout":
            attn.to_out[1].p = 0.5
            attn.train()
        case "pruning":
            prune.l1_unstructured(attn.to_k, "weight", 0.5)
            with torch.no_grad():
                attn.to_k.weight_orig *= 2  # a hook makes the weight anew


class Doubling(nn.Linear):
    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * super().forward(tokens)


def test_what_casts_layer_by_layer_is_heard() -> None:
    network = stirred().float()
    expected = velocity(network)
    network.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    torch.testing.assert_close(velocity(network), expected, atol=0.5, rtol=0.05)


def test_an_attention_of_ones_own_stays() -> None:
    class Own(AttnProcessor2_0):
        pass

    network = stirred()
    network.set_attn_processor(Own())
    use_fused_attention(network)
    assert {type(processor) for processor in network.attn_processors.values()} == {Own}


def test_an_answer_without_a_bias_is_as_diffusers_computes_it() -> None:
    network = stirred()
    for block in network.transformer_blocks:
        block.attn2.to_out[0].bias = None
    torch.testing.assert_close(velocity(network), velocity(as_written(network)))


def test_patches_of_any_layout_are_projected_as_a_convolution_does() -> None:
    convolution = nn.Conv2d(6, 10, kernel_size=(2, 4), stride=(2, 4)).double()
    product = copy.deepcopy(convolution)
    product.__class__ = PatchProjection
    pictures = torch.randn(3, 6, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(product(pictures[..., :7, :11]), convolution(pictures[..., :7, :11]))
    for layout in (pictures, pictures.to(memory_format=torch.channels_last), pictures.transpose(2, 3)[:, :, :8, :8]):
        torch.testing.assert_close(product(layout), convolution(layout))


def test_sums_by_image_change_no_answer_and_no_gradient() -> None:
    network = stirred()
    summed = copy.deepcopy(network)
    for block in transformer_blocks(summed):
        sum_by_image(block)
    layers = [part for part in summed.transformer_blocks[0].modules() if isinstance(part, TokenLinear)]
    assert len(layers) == 4, "both attentions' answers, and the two layers after them"
    assert not any(isinstance(part, TokenLinear) for part in summed.adaln_single.modules()), "of no tokens"
    assert_same(summed, as_written(network))


@pytest.mark.parametrize("shape", [(3,), (4, 3), (4, 5, 3), (4, 5, 6, 3)])
def test_sums_by_image_take_any_shape(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(3, 5)
    given = torch.randn(shape)
    expected = layer(given)
    layer.__class__ = TokenLinear
    torch.testing.assert_close(layer(given), expected)


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_under_autocast_it_answers_in_the_type_that_diffusers_does(kind: torch.dtype) -> None:
    network = stirred().float()
    with torch.autocast("cpu", torch.float16, enabled=kind == torch.float16):
        block, tokens, context = network.transformer_blocks[0], torch.randn(2, 16, 32), torch.randn(2, FEW, 32)
        written = as_written(network).transformer_blocks[0]
        sum_by_image(block)
        for name in ("attn1", "attn2"):
            given = (tokens,) if name == "attn1" else (tokens, context)
            found, expected = getattr(block, name)(*given), getattr(written, name)(*given)
            assert found.dtype == expected.dtype == kind
            torch.testing.assert_close(found, expected, atol=0.02 if kind == torch.float16 else 1e-5, rtol=0.01)


def test_a_network_that_is_no_pixart_stays_as_it_is_and_one_is_streamlined_once() -> None:
    codes = build_vq_transformer(VQTransformerConfig(codes=8, tokens=4, layers=1), embedding_dimension=8, seed=0)
    before = [type(part) for part in codes.modules()]
    use_fused_attention(codes)
    assert [type(part) for part in codes.modules()] == before
    network = stirred()
    expected = velocity(network)
    use_fused_attention(network)
    assert torch.equal(velocity(network), expected)


@pytest.mark.parametrize("tokens", [FEW, 9])
def test_the_network_over_codes_answers_what_is_written(
    tokens: int, folded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = VQTransformerConfig(codes=12, tokens=9, timesteps=20, layers=2, heads=2, head_width=16)
    network = tiny_models.stirred(build_vq_transformer(size, embedding_dimension=8, seed=0)).double()
    written = copy.deepcopy(network)
    codes, times = torch.randint(13, (2, 9)), torch.tensor([3, 20])

    def learned(of: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        answer = of(codes, times, TOKENS[:, :tokens])
        answer.square().sum().backward()
        return answer, {name: weight.grad for name, weight in of.named_parameters() if weight.grad is not None}

    answer, gradient = learned(network)
    assert folded == ([tokens] * 2 if tokens == FEW else [])
    monkeypatch.setattr(vq_transformer, "few", lambda *_, **__: False)
    expected, expected_gradient = learned(written)
    torch.testing.assert_close(answer, expected)
    assert gradient.keys() == expected_gradient.keys() == dict(network.named_parameters()).keys()
    for name, each in expected_gradient.items():
        torch.testing.assert_close(gradient[name], each, msg=lambda told, name=name: f"{name}: {told}")


@pytest.mark.parametrize("change", ["adapter", "subclass", "hook"])
def test_an_answer_over_codes_that_is_more_than_its_matrix_is_heard(change: str) -> None:
    size = VQTransformerConfig(codes=12, tokens=9, timesteps=20, layers=1, heads=2, head_width=16)
    network = tiny_models.stirred(build_vq_transformer(size, embedding_dimension=8, seed=0))
    codes, times = torch.randint(13, (2, 9)), torch.tensor([3, 20])
    expected = network(codes, times, TOKENS[:, :FEW])
    cross = network.blocks[0].cross
    if change == "adapter":
        cross.out = nn.Sequential(cross.out, nn.Tanh())
    if change == "subclass":
        cross.out.__class__ = Doubling
    if change == "hook":
        cross.out.register_forward_hook(lambda *told: 2 * told[-1])
    assert (network(codes, times, TOKENS[:, :FEW]) - expected).abs().max() > 0.01
