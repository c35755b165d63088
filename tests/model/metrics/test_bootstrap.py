import numpy as np
import pytest
from support import tiny_models

from model.metrics.bootstrap import bootstrap_interval, frechet_of, groups_of, mean_of, mmd_of, resampled
from model.metrics.embedding_metrics import frechet_distance, mmd_distance


def test_resampled_counts_sum_to_set_size() -> None:
    counts = resampled(30, 400, np.random.default_rng(0))
    assert counts.shape == (400, 30)
    assert (counts.sum(axis=1) == 30).all()
    assert (counts == 0).mean() == pytest.approx(
        np.exp(-1), abs=0.02
    )  # expected share of images missing from a resample


def test_resampled_groups_are_drawn_as_a_whole() -> None:
    groups = np.array([0, 1, 0, 2, 1, 0])
    counts = resampled(groups, 50, np.random.default_rng(0))
    assert (counts == counts[:, [0, 1, 0, 3, 1, 0]]).all()
    assert (counts[:, [0, 1, 3]].sum(axis=1) == 3).all()
    alone = resampled(np.arange(30), 400, np.random.default_rng(0))
    assert (alone == resampled(30, 400, np.random.default_rng(0))).all()


def test_groups_of_equal_rows_share_a_group() -> None:
    rows = tiny_models.unit_rows(4)
    assert groups_of(rows[[2, 0, 2, 1, 0]]).tolist() == [0, 1, 0, 2, 1]
    assert groups_of(rows).tolist() == [0, 1, 2, 3]


def test_bootstrap_interval_same_seed_is_equal() -> None:
    values = np.random.default_rng(0).normal(size=50)
    first, again, other = (
        bootstrap_interval(mean_of(values), 50, resamples=100, rng=np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.value == pytest.approx(values.mean())


def test_bootstrap_interval_of_mean_matches_normal_interval() -> None:
    values = np.random.default_rng(0).normal(size=400)
    score = bootstrap_interval(mean_of(values), 400, resamples=4_000, rng=np.random.default_rng(1))
    reach = 1.96 * values.std() / np.sqrt(400)
    assert score.low == pytest.approx(values.mean() - reach, abs=0.1 * reach)
    assert score.high == pytest.approx(values.mean() + reach, abs=0.1 * reach)


def test_bootstrap_interval_without_resamples_has_no_bounds() -> None:
    score = bootstrap_interval(mean_of(np.array([True, False])), 2, resamples=0, rng=np.random.default_rng(0))
    assert (score.value, score.low, score.high) == (0.5, None, None)


def test_bootstrap_interval_of_one_group_has_no_bounds() -> None:
    groups = np.zeros(9, np.int64)
    score = bootstrap_interval(mean_of(np.arange(9)), groups, resamples=50, rng=np.random.default_rng(0))
    assert (score.value, score.low, score.high) == (4.0, None, None)


def test_bootstrap_interval_is_clipped_to_bounds() -> None:
    near = np.concatenate([np.ones(30, bool), np.zeros(1, bool)])
    score = bootstrap_interval(mean_of(near), 31, resamples=500, rng=np.random.default_rng(0), bounds=(0.0, 1.0))
    assert score.low is not None
    assert score.low < 30 / 31 < (score.high or 0) <= 1.0


@pytest.mark.parametrize(("statistic_of", "distance"), [(frechet_of, frechet_distance), (mmd_of, mmd_distance)])
def test_statistic_of_counts_equals_repeated_rows(statistic_of, distance) -> None:  # type: ignore[no-untyped-def]
    first, second = tiny_models.unit_rows(12).astype(np.float32), tiny_models.unit_rows(9, seed=1).astype(np.float32)
    rng = np.random.default_rng(0)
    one, other = resampled(12, 5, rng), resampled(9, 5, rng)
    drawn = statistic_of(first, second)(one, other)
    for value, a, b in zip(drawn, one.astype(int), other.astype(int), strict=True):
        expected = distance(np.repeat(first, a, axis=0), np.repeat(second, b, axis=0))
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("statistic_of", "repetitions", "least"), [(mean_of, 300, 0.90), (mmd_of, 150, 0.88), (frechet_of, 150, 0.85)]
)
def test_bootstrap_interval_covers_expected_value(statistic_of, repetitions, least) -> None:  # type: ignore[no-untyped-def]
    """About 95% of the intervals contain the mean of all repetitions; a higher share means too wide intervals."""
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(repetitions):
        if statistic_of is mean_of:
            statistic, sizes = mean_of(rng.exponential(size=60)), (60,)
        else:
            rows = rng.normal(size=(60, 4)).astype(np.float32), (rng.normal(size=(60, 4)) + 0.4).astype(np.float32)
            statistic, sizes = statistic_of(*rows), (60, 60)
        scores.append(bootstrap_interval(statistic, *sizes, resamples=200, rng=rng))
    expected = np.mean([score.value for score in scores])
    covered = np.mean([score.low <= expected <= score.high for score in scores])
    assert least <= covered <= 0.99


def test_bootstrap_interval_of_grouped_values_covers_mean() -> None:
    """20 prompts × 25 draws; as with images, values vary more between prompts than within them."""
    rng = np.random.default_rng(0)
    groups, covered = np.tile(np.arange(20), 25), []
    for _ in range(300):
        values = rng.normal(size=20)[groups] + 0.3 * rng.normal(size=500)
        score = bootstrap_interval(mean_of(values), groups, resamples=200, rng=rng)
        assert score.low is not None
        covered.append(score.low <= 0 <= (score.high or 0))
    assert 0.87 <= np.mean(covered) <= 0.99  # 20 prompts are few for a percentile interval: about 92%
