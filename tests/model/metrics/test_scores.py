"""Scores of a set of samples and their confidence intervals."""

import numpy as np
import pytest
from support import tiny_models

from model.metrics.bootstrap import Score
from model.metrics.scores import ReferenceSet, score_mean, score_samples

REAL = tiny_models.unit_rows(150, seed=9).astype(np.float32)
REFERENCE = ReferenceSet(real=REAL, threshold=0.75)


def width(score: Score) -> float:
    assert score.low is not None
    assert score.high is not None
    return score.high - score.low


@pytest.mark.parametrize("metric", ["clip_score", "fd", "mmd", "precision", "nearest", "copy_rate"])
def test_score_samples_repeated_prompts_widen_intervals(metric: str) -> None:
    """20 prompts with 10 almost equal samples each: the intervals must be those of 20 prompts, not of 200."""
    prompts, own = (tiny_models.unit_rows(20, seed=seed).astype(np.float32) for seed in (1, 2))
    noise = 0.01 * np.random.default_rng(0).normal(size=(200, tiny_models.WIDTH))
    rows, queries = tiny_models.unit(np.tile(own, (10, 1)) + noise), np.tile(prompts, (10, 1))
    near = (rows @ REAL.T).max(axis=1)
    once, together, apart = (
        width(score_samples(rows[:count], sample_queries[:count], near[:count], REFERENCE)[metric])
        for count, sample_queries in ((20, queries), (200, queries), (200, queries + noise.astype(np.float32)))
    )
    assert together > 0.6 * once
    assert together > 1.8 * apart


def test_score_samples_given_groups_are_resampled_together() -> None:
    rows, queries = (tiny_models.unit_rows(200, seed=seed).astype(np.float32) for seed in (1, 2))
    near = np.repeat(np.linspace(0.5, 1, 20), 10)
    alone, together = (
        score_samples(rows, queries, near, REFERENCE, groups=groups)["copy_rate"]
        for groups in (None, np.repeat(np.arange(20), 10))
    )
    assert alone.value == together.value
    assert width(together) > 2 * width(alone)


def test_score_mean_distinct_queries_are_resampled_individually() -> None:
    values = np.random.default_rng(0).normal(size=12)
    rows = tiny_models.unit_rows(12).astype(np.float32)
    alone = score_mean(values, rows, REFERENCE, bounds=(-9.0, 9.0))
    assert alone == score_mean(values, rows[::-1], REFERENCE, bounds=(-9.0, 9.0))
    once = score_mean(values, rows[[0] * 12], REFERENCE, bounds=(-9.0, 9.0))
    assert (once.value, once.low, once.high) == (alone.value, None, None)


def test_score_samples_more_samples_than_real_uses_first_samples() -> None:
    """Distances and manifolds depend on the set size, so only the first M samples are used."""
    rows, queries = (tiny_models.unit_rows(200, seed=seed).astype(np.float32) for seed in (3, 4))
    near = (rows @ REAL.T).max(axis=1)
    whole, part = (score_samples(rows[:n], queries[:n], near[:n], REFERENCE) for n in (200, len(REAL)))
    for metric in ("fd", "mmd", "precision", "recall", "coverage"):
        assert whole[metric].value == part[metric].value
    assert whole["nearest"].value == pytest.approx(near.mean())
    assert "authenticity" not in whole
    spaced = score_samples(rows, queries, near, REFERENCE, spacing=np.full(200, np.median(near)))
    assert spaced["authenticity"].value == 0.5
