from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from torch import Tensor, nn

from model.configs import VQTransformerConfig
from model.diffusion.conditioning import condition_tokens
from model.networks.vq_transformer import VQTransformer, build_vq_transformer

SIZE: dict[str, Any] = {"codes": 12, "tokens": 9, "timesteps": 20, "layers": 2, "heads": 2, "head_width": 8}
CODES = torch.randint(13, (3, 9), generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([1, 8, 20])
ROWS = torch.from_numpy(tiny_models.unit_rows(12)).float()
QUERY, NEIGHBOURS = ROWS[:3], ROWS[3:].reshape(3, 3, -1)


def tokens(query: Tensor = QUERY, neighbours: Tensor = NEIGHBOURS) -> Tensor:
    return condition_tokens(query, neighbours, dimension=tiny_models.WIDTH, batch=len(query))


def build(seed: int = 0, **changes: Any) -> VQTransformer:
    return build_vq_transformer(VQTransformerConfig(**SIZE | changes), embedding_dimension=tiny_models.WIDTH, seed=seed)


@pytest.fixture(scope="module")
def network() -> VQTransformer:
    """Return a network with random noise in all parameters, like a trained one: no branch has zero weights."""
    network = build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


@torch.no_grad()
def predict(
    network: nn.Module, codes: Tensor = CODES, times: Tensor = TIMES, condition: Tensor | None = None
) -> Tensor:
    logits: Tensor = network(codes, times, tokens() if condition is None else condition)
    return logits


def test_vq_transformer_initial_logits_are_zero_without_one_for_the_mask() -> None:
    assert torch.equal(predict(build()), torch.zeros(3, 9, 12))


def test_build_vq_transformer_depends_only_on_the_seed() -> None:
    before = torch.random.get_rng_state()
    first, same, other = (nn.utils.parameters_to_vector(build(seed).parameters()) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert (first != other).float().mean() > 0.5
    assert torch.equal(torch.random.get_rng_state(), before)


def test_vq_transformer_saved_and_loaded_is_equal(network: VQTransformer, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    again = VQTransformer.from_pretrained(tmp_path, local_files_only=True)
    assert {name: again.config[name] for name in SIZE} == SIZE
    assert again.config.condition_channels == tiny_models.WIDTH + 1
    assert torch.equal(predict(again), predict(network))


def test_vq_transformer_default_size_is_about_20_million() -> None:
    with torch.device("meta"):
        network = VQTransformer(condition_channels=257)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert 20e6 < count < 23e6
    assert network.blocks[0].own.query.weight.shape == (384, 384)


def test_vq_transformer_every_parameter_gets_a_gradient(network: VQTransformer) -> None:
    network(CODES, TIMES, tokens()).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    network.zero_grad()


def test_vq_transformer_matrices_for_muon_are_those_of_the_blocks(network: VQTransformer) -> None:
    matrices = {name for name, p in network.named_parameters() if "blocks." in name and p.ndim == 2}
    assert len(matrices) == 2 * (4 + 4 + 2)
    assert all(name.endswith("weight") for name in matrices)


def test_vq_transformer_samples_of_a_batch_are_independent(network: VQTransformer) -> None:
    together = predict(network)
    for position in range(3):
        own = slice(position, position + 1)
        alone = predict(network, CODES[own], TIMES[own], tokens()[own])
        torch.testing.assert_close(alone, together[own], atol=1e-4, rtol=1e-4)


def test_vq_transformer_logits_depend_on_every_input(network: VQTransformer) -> None:
    base = predict(network)
    for name, other in {
        "query": predict(network, condition=tokens(query=QUERY.roll(1, 0))),
        "neighbours": predict(network, condition=tokens(neighbours=NEIGHBOURS.roll(1, 0))),
        "time": predict(network, times=TIMES.roll(1)),
        "codes": predict(network, codes=(CODES + 1) % 13),
    }.items():
        assert (other - base).abs().amax((1, 2)).min() > 1e-2, name


def test_vq_transformer_tokens_attend_to_each_other_and_encode_row_and_column(network: VQTransformer) -> None:
    base = predict(network)
    changed = CODES.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 13
    assert (predict(network, changed) - base)[:, 0].abs().max() > 1e-4
    masked = predict(network, torch.full((3, 9), 12))[0].unflatten(0, (3, 3))
    assert masked.diff(dim=0).abs().amax(2).min() > 1e-3
    assert masked.diff(dim=1).abs().amax(2).min() > 1e-3


def test_vq_transformer_ignores_the_order_of_neighbours_but_distinguishes_the_query(network: VQTransformer) -> None:
    base = predict(network)
    shuffled = predict(network, condition=tokens(neighbours=NEIGHBOURS[:, [2, 0, 1]]))
    torch.testing.assert_close(shuffled, base, atol=1e-4, rtol=1e-4)
    swapped = torch.cat([QUERY[:, None], NEIGHBOURS], dim=1)[:, [1, 0, 2, 3]]
    assert (predict(network, condition=tokens(swapped[:, 0], swapped[:, 1:])) - base).abs().max() > 1e-2


def test_vq_transformer_output_has_the_dtype_of_the_weights(network: VQTransformer) -> None:
    """Tested in double precision; half precision takes the same path on accelerators."""
    double = VQTransformer.from_config(network.config)
    double.load_state_dict(network.state_dict())
    logits = predict(double.double())
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), predict(network), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "wrong", [{"tokens": 8}, {"tokens": 0}, {"tokens": -4}, {"codes": 1}, {"timesteps": 1}, {"layers": 0}, {"heads": 0}]
)
def test_vq_transformer_config_invalid_field_raises(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VQTransformerConfig(**wrong)
