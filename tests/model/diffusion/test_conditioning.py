import math
from typing import Any

import pytest
import torch
from support import tiny_models
from torch import Tensor

from model.configs import ConditioningConfig
from model.diffusion.conditioning import (
    append_image_tokens,
    choose_neighbours,
    condition_tokens,
    interpolate_tokens,
    null_condition,
    perturb_query,
    sample_condition,
    slerp,
    split_image_tokens,
    training_condition,
)
from model.errors import ModelError
from model.step_random import StepRandom

HIDE_NOTHING: dict[str, Any] = {
    "drop_all": 0.0,
    "drop_query": 0.0,
    "drop_neighbours": 0.0,
    "gap_probability": 0.0,
    "fewer_neighbours": 0.0,
}


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Unit rows of any shape before D."""
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def seeded(seed: int = 0) -> StepRandom:
    return StepRandom(seed, 0)


def test_condition_tokens_have_unit_variance_and_a_query_marker() -> None:
    query, neighbours = rows(2, 16), rows(2, 3, 16, seed=1)
    tokens = condition_tokens(query, neighbours, dimension=16, batch=2)
    assert tokens.shape == (2, 4, 17)
    torch.testing.assert_close(tokens[:, 0, :16], query * 4)
    torch.testing.assert_close(tokens[:, 1:, :16], neighbours * 4)
    assert tokens[..., :16].square().mean().item() == pytest.approx(1)
    assert tokens[..., 16].tolist() == [[1, 0, 0, 0]] * 2


def test_condition_tokens_hidden_parts_keep_position_and_marker() -> None:
    query, neighbours = rows(2, 8), rows(2, 3, 8, seed=1)
    without_query = condition_tokens(None, neighbours, dimension=8, batch=2)
    torch.testing.assert_close(without_query[:, 1:], condition_tokens(query, neighbours, dimension=8, batch=2)[:, 1:])
    without_neighbours = condition_tokens(query, None, dimension=8, batch=2)
    torch.testing.assert_close(
        without_neighbours[:, :1], condition_tokens(query, neighbours, dimension=8, batch=2)[:, :1]
    )
    assert without_query[:, 0].tolist() == [[0.0] * 8 + [1.0]] * 2
    assert (without_neighbours[:, 1:] == 0).all()
    assert without_neighbours.shape[1] > 1


@pytest.mark.parametrize(("query", "neighbours"), [((2, 9), (2, 3, 8)), ((2, 8), (2, 3, 9)), ((3, 8), (2, 3, 8))])
def test_condition_tokens_wrong_shape_raises(query: tuple[int, ...], neighbours: tuple[int, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        condition_tokens(rows(*query), rows(*neighbours), dimension=8, batch=2)
    for part in (str(query), str(neighbours), "embed with the encoder"):
        assert part in str(caught.value)


def test_null_condition_hides_embeddings_and_keeps_markers() -> None:
    tokens = condition_tokens(rows(2, 8), rows(2, 3, 8), dimension=8, batch=2)
    before = tokens.clone()
    hidden = null_condition(tokens)
    assert (hidden[..., :8] == 0).all()
    assert hidden[..., 8].tolist() == [[1, 0, 0, 0]] * 2
    assert torch.equal(tokens, before)


def test_training_condition_hides_parts_at_the_configured_rates() -> None:
    config = ConditioningConfig(
        drop_all=0.1, drop_query=0.25, drop_neighbours=0.4, gap_probability=0, fewer_neighbours=0
    )
    query, neighbours = rows(20_000, 4), rows(20_000, 2, 4, seed=1)

    tokens = training_condition(query, neighbours, config, seeded())

    no_query = (tokens[:, 0, :4] == 0).all(1)
    no_neighbours = (tokens[:, 1:, :4] == 0).all(2)
    assert torch.equal(no_neighbours[:, 0], no_neighbours[:, 1]), "neighbours are hidden together"
    no_neighbours = no_neighbours[:, 0]
    shares = {
        "all": no_query & no_neighbours,
        "query": no_query & ~no_neighbours,
        "neighbours": no_neighbours & ~no_query,
        "nothing": ~no_query & ~no_neighbours,
    }
    # 0.014 is four standard deviations of a share of 20,000; hiding independently would make "all" 0.23.
    assert {name: share.float().mean().item() for name, share in shares.items()} == pytest.approx(
        {"all": 0.1, "query": 0.25, "neighbours": 0.4, "nothing": 0.25}, abs=0.014
    )
    whole = condition_tokens(query, neighbours, dimension=4, batch=20_000)
    torch.testing.assert_close(tokens[shares["nothing"]], whole[shares["nothing"]])
    torch.testing.assert_close(tokens[shares["query"]][:, 1:], whole[shares["query"]][:, 1:])
    torch.testing.assert_close(tokens[shares["neighbours"]][:, 0], whole[shares["neighbours"]][:, 0])
    assert torch.equal(tokens[shares["all"]], null_condition(whole)[shares["all"]]), "the null condition of guidance"


def test_training_condition_mean_query_puts_the_mean_of_the_shown_neighbours_into_the_slot() -> None:
    config = ConditioningConfig(**HIDE_NOTHING | {"mean_query": 0.3, "fewer_neighbours": 0.5, "neighbours": 4})
    query, neighbours = rows(8_000, 8), rows(8_000, 4, 8, seed=1)

    tokens = training_condition(query, neighbours, config, seeded())

    shown = tokens[:, 1:, :8].sum(1)
    is_mean = torch.cosine_similarity(tokens[:, 0, :8], shown) > 0.9999
    assert is_mean.float().mean().item() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(tokens[~is_mean][:, 0, :8], query[~is_mean] * 8**0.5)
    assert tokens[:, 0, :8].norm(dim=1).allclose(torch.tensor(8**0.5)), "a mean is a unit row too"
    without = training_condition(query, neighbours, ConditioningConfig(**HIDE_NOTHING), seeded())
    assert not torch.equal(without[:, 0], tokens[:, 0])


@pytest.mark.parametrize("part", ["drop_all", "drop_query", "drop_neighbours"])
def test_training_condition_drop_probability_1_hides_every_sample(part: str) -> None:
    config = ConditioningConfig(**HIDE_NOTHING | {part: 1.0})
    tokens = training_condition(rows(500, 4), rows(500, 2, 4), config, seeded())
    hidden = (tokens[..., :4] == 0).all(2).all(0)
    assert (
        hidden.tolist()
        == {
            "drop_all": [True, True, True],
            "drop_query": [True, False, False],
            "drop_neighbours": [False, True, True],
        }[part]
    )


def test_perturb_query_changes_the_configured_share_of_samples() -> None:
    query = rows(20_000, 16)
    perturbed = perturb_query(query, ConditioningConfig(gap_probability=0.3, gap_weight=0.5), seeded())
    torch.testing.assert_close(perturbed.norm(dim=1), torch.ones(20_000))
    touched = (perturbed - query).abs().amax(1) > 1e-6
    assert touched.float().mean().item() == pytest.approx(0.3, abs=0.014)
    cosine = (perturbed * query).sum(1)
    assert cosine.min() >= 0, "at most half of the mixture is random"
    assert cosine[touched].mean() < 0.97


def test_perturb_query_larger_weight_moves_further() -> None:
    query = rows(2_000, 16)

    def nearness(weight: float) -> float:
        config = ConditioningConfig(gap_probability=1, gap_weight=weight)
        return float((perturb_query(query, config, seeded()) * query).sum(1).mean())

    assert nearness(0) == pytest.approx(1)
    assert nearness(0.3) > nearness(0.6) > nearness(0.9) > 0.3


def test_training_condition_perturbs_only_the_query() -> None:
    query, neighbours = rows(50, 8), rows(50, 3, 8, seed=1)
    config = ConditioningConfig(**HIDE_NOTHING | {"gap_probability": 1.0})
    tokens = training_condition(query, neighbours, config, seeded())
    whole = condition_tokens(query, neighbours, dimension=8, batch=50)
    torch.testing.assert_close(tokens[:, 1:], whole[:, 1:])
    assert (tokens[:, 0] - whole[:, 0]).abs().amax(1).min() > 1e-3


def test_training_condition_is_a_function_of_the_seed() -> None:
    query, neighbours = rows(50, 8), rows(50, 3, 8, seed=1)
    first, same, other = (
        training_condition(query, neighbours, ConditioningConfig(), seeded(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_training_condition_float16_rows_give_float32_tokens() -> None:
    query, neighbours = (
        torch.from_numpy(tiny_models.unit_rows(4)),
        torch.from_numpy(tiny_models.unit_rows(8)).reshape(4, 2, -1),
    )
    tokens = training_condition(query, neighbours, ConditioningConfig(**HIDE_NOTHING), seeded())
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens[:, 1:, : tiny_models.WIDTH], neighbours.float() * tiny_models.WIDTH**0.5)


def numbered(batch: int, pool: int) -> Tensor:
    """Return neighbours (B, P, 2) whose first channel is their rank, from 1."""
    ranks = torch.arange(1.0, pool + 1).expand(batch, pool)
    return torch.stack([ranks, -ranks], dim=2)


def neighbours_shown(neighbours: Tensor, config: ConditioningConfig) -> Tensor:
    """Return the chosen neighbours (B, K, D) of pools (B, P, D), hidden ones as zeros."""
    batch, pool, dimension = neighbours.shape
    chosen, visible = choose_neighbours(batch, pool, config, seeded(), neighbours.device)
    return neighbours.gather(1, chosen[..., None].expand(-1, -1, dimension)) * visible[..., None]


def ranks_shown(batch: int, pool: int, **settings: Any) -> Tensor:
    """Return the ranks (1 …) of the neighbours that each sample sees, 0 for a hidden one."""
    config = ConditioningConfig(pool=pool, **settings)
    shown = neighbours_shown(numbered(batch, pool), config)
    assert torch.equal(shown[..., 1], -shown[..., 0]), "whole rows are chosen"
    return shown[..., 0].long()


def test_choose_neighbours_small_pool_is_unchanged() -> None:
    assert ranks_shown(50, 3, neighbours=3, fewer_neighbours=0).tolist() == [[1, 2, 3]] * 50
    short = neighbours_shown(numbered(5, 2), ConditioningConfig(neighbours=3, fewer_neighbours=0))
    assert short.shape == (5, 2, 2), "a database may have fewer"


def test_choose_neighbours_half_nearest_half_random_in_order() -> None:
    ranks = ranks_shown(20_000, 6, neighbours=3, fewer_neighbours=0)
    assert (ranks.diff(dim=1) > 0).all(), "nearest first, none twice"
    nearest = (ranks == torch.tensor([1, 2, 3])).all(1)
    # A random choice of 3 out of 6 is the nearest three at times, one time in twenty.
    assert nearest.float().mean().item() == pytest.approx(0.5 + 0.5 / 20, abs=0.014)
    scattered = ranks[~nearest]
    shares = torch.stack([(scattered == rank).any(1).float().mean() for rank in range(1, 7)])
    assert shares[:3].tolist() == pytest.approx([9 / 19] * 3, abs=0.03)
    assert shares[3:].tolist() == pytest.approx([10 / 19] * 3, abs=0.03)


def test_choose_neighbours_fewer_neighbours_are_the_nearest() -> None:
    ranks = ranks_shown(20_000, 4, neighbours=4, fewer_neighbours=0.5)
    counts = (ranks > 0).sum(1)
    assert torch.equal(ranks, torch.arange(1, 5) * (torch.arange(4) < counts[:, None]))
    shares = [(counts == count).float().mean().item() for count in range(5)]
    assert shares == pytest.approx([0, 0.125, 0.125, 0.125, 0.625], abs=0.014)


def test_sample_condition_names_the_shown_neighbours() -> None:
    query, neighbours = rows(500, 8), rows(500, 6, 8)
    sampled = sample_condition(query, neighbours, ConditioningConfig(neighbours=3, pool=6), seeded())
    shown = sampled.tokens[:, 1:, :-1] / 8**0.5
    assert torch.equal(shown.any(2), sampled.visible)
    expected = neighbours.gather(1, sampled.chosen[..., None].expand(-1, -1, 8)) * sampled.visible[..., None]
    torch.testing.assert_close(shown, expected.float())


def test_append_image_tokens_is_undone_by_split() -> None:
    tokens, images = rows(2, 4, 9), rows(2, 6, 8)
    condition = append_image_tokens(tokens, images)
    assert condition.shape == (2, 10, 10)
    vectors, appended = split_image_tokens(condition, channels=9, count=6)
    assert appended is not None
    assert torch.equal(vectors, tokens)
    assert torch.equal(appended, images)
    hidden, none = split_image_tokens(null_condition(condition), channels=9, count=6)
    assert torch.equal(hidden, null_condition(tokens))
    assert none is not None
    assert not none.any()
    assert split_image_tokens(tokens, channels=9, count=6)[1] is None


def test_training_condition_has_the_configured_number_of_neighbours() -> None:
    config = ConditioningConfig(neighbours=3, pool=6)
    assert training_condition(rows(5, 8), rows(5, 6, 8), config, seeded()).shape == (5, 4, 9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"neighbours": 0},
        {"drop_all": 0.5, "drop_query": 0.4, "drop_neighbours": 0.2},
        {"gap_probability": 1.1},
        {"fewer_neighbours": 1.1},
        {"drop_images": -0.1},
        {"neighbours": 4, "pool": 3},
        {"gap_weight": 1.0},
        {"mean_query": 1.1},
    ],
)
def test_conditioning_config_invalid_field_raises(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        ConditioningConfig(**wrong)


def test_slerp_gives_unit_rows_at_even_angles() -> None:
    first, second = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    points = slerp(first, second, 4)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(4))
    angles = torch.arccos((points[:-1] * points[1:]).sum(1))
    torch.testing.assert_close(angles, torch.full((3,), math.pi / 6))
    torch.testing.assert_close(slerp(first, first, 3), first.expand(3, 3))
    torch.testing.assert_close(slerp(torch.zeros(3), torch.zeros(3), 2), torch.zeros(2, 3))


def test_interpolate_tokens_rotates_tokens_and_keeps_hidden_ones() -> None:
    rows = torch.nn.functional.normalize(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    rows[:, 3] = 0
    ends = condition_tokens(rows[:, 0], rows[:, 1:], dimension=8, batch=2)
    points = interpolate_tokens(ends, 5)
    assert points.shape == (5, 4, 9)
    torch.testing.assert_close(points[[0, -1]], ends)
    torch.testing.assert_close(points[:, :3, :8].norm(dim=2), torch.full((5, 3), 8**0.5))
    assert (points[:, 3] == ends[0, 3]).all()
    turns = (points[:-1, :3, :8] * points[1:, :3, :8]).sum(2) / 8
    torch.testing.assert_close(turns, turns[:1].expand(4, 3))
    assert (turns < 1).all()
