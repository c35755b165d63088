"""The scores of a set of samples, and what their intervals are of."""

import numpy as np
import pytest
from support import tiny_models

from model.metrics.bootstrap import Score
from model.metrics.scores import ReferenceSet, score_mean, score_samples

REAL = tiny_models.unit_rows(150, seed=9).astype(np.float32)
YARDSTICK = ReferenceSet(real=REAL, threshold=0.75)


def width(score: Score) -> float:
    assert score.low is not None
    assert score.high is not None
    return score.high - score.low


@pytest.mark.parametrize("metric", ["clip_score", "fd", "mmd", "precision", "nearest", "copy_rate"])
def test_samples_of_one_prompt_are_not_taken_for_as_many_prompts(metric: str) -> None:
    """20 prompts, 10 draws of each that are all but one: intervals are of 20, not of 200."""
    prompts, own = (tiny_models.unit_rows(20, seed=seed).astype(np.float32) for seed in (1, 2))
    noise = 0.01 * np.random.default_rng(0).normal(size=(200, tiny_models.WIDTH))
    rows, queries = tiny_models.unit(np.tile(own, (10, 1)) + noise), np.tile(prompts, (10, 1))
    near = (rows @ REAL.T).max(axis=1)
    once, together, apart = (
        width(score_samples(rows[:count], asked[:count], near[:count], YARDSTICK)[metric])
        for count, asked in ((20, queries), (200, queries), (200, queries + noise.astype(np.float32)))
    )
    assert together > 0.6 * once
    assert together > 1.8 * apart


def test_prompts_that_do_not_repeat_are_resampled_as_images() -> None:
    values = np.random.default_rng(0).normal(size=12)
    rows = tiny_models.unit_rows(12).astype(np.float32)
    alone = score_mean(values, rows, YARDSTICK, bounds=(-9.0, 9.0))
    assert alone == score_mean(values, rows[::-1], YARDSTICK, bounds=(-9.0, 9.0))
    once = score_mean(values, rows[[0] * 12], YARDSTICK, bounds=(-9.0, 9.0))
    assert (once.value, once.low, once.high) == (alone.value, None, None)


def test_sets_are_compared_at_one_size() -> None:
    """Of more samples than real pictures, the first so many: distances and manifolds depend on the number."""
    rows, queries = (tiny_models.unit_rows(200, seed=seed).astype(np.float32) for seed in (3, 4))
    near = (rows @ REAL.T).max(axis=1)
    whole, part = (score_samples(rows[:n], queries[:n], near[:n], YARDSTICK) for n in (200, len(REAL)))
    for metric in ("fd", "mmd", "precision", "recall"):
        assert whole[metric].value == part[metric].value
    assert whole["nearest"].value == pytest.approx(near.mean())
