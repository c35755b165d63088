"""Bootstrap percentile intervals of scores, from resampled images or groups of images.

Legend: ``R`` resamples, ``N``, ``M`` images, ``D`` embedding width.

Images of one prompt are alike, so scores vary more between sets of prompts than between images of the same prompts.
Where prompts repeat, prompts are resampled, each with all its images (Davison and Hinkley, Bootstrap Methods, 3.8).

A resample is represented by the number of times that each image occurs, (R, N). Statistics that are linear or
quadratic in these counts need only a few matrix products for all resamples.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.metrics.embedding_metrics import Embeddings, Values, weighted_frechet, weighted_mmd

Statistic = Callable[..., Values]
"""A function of counts (R, N), or (R, N) and (R, M), that returns values (R,)."""
ImageSet = int | NDArray[np.int64]
"""The number of images of a set, or the group of each image, (N,) from 0; groups are resampled as a whole."""
LEVEL = 0.95
"""Default confidence level of the intervals."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A value and its ``LEVEL`` confidence interval; ``low`` and ``high`` are None if there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None


def bootstrap_interval(
    statistic: Statistic,
    *sets: ImageSet,
    resamples: int,
    rng: np.random.Generator,
    level: float = LEVEL,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Score:
    """Return the statistic of all images and its percentile interval over ``resamples`` samples with replacement.

    A distance between sets is larger for a resample than for the set itself, since repeated images reduce the
    resample's spread. The mean excess of the resamples over the value is therefore subtracted. The interval is that of
    the value expected *at this number of images*, so runs of equal size are comparable. For a mean the correction
    is 0. (Efron and Tibshirani, An Introduction to the Bootstrap, 10.2 and 13.3.)

    Args:
        statistic: Function of the counts of each set.
        sets: Images of each set; the sets are resampled independently. There is no interval if a set has one group.
        resamples: R; 0 for the value alone.
        rng: Source of randomness.
        level: Share of the resamples inside the interval, in (0, 1). Default: 0.95.
        bounds: Range of the statistic, to clip values that exceed it by rounding. Default: unbounded.
    """
    grouped = [_grouped(each) for each in sets]
    value = float(np.clip(statistic(*(np.ones((1, len(groups))) for groups in grouped))[0], *bounds))
    if not resamples or any(groups.max() == 0 for groups in grouped):
        return Score(value=value)
    values = statistic(*(resampled(groups, resamples, rng) for groups in grouped))
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail]) - (values.mean() - value)
    low, high = np.clip([low, high], *bounds)
    return Score(value=value, low=float(low), high=float(high))


def resampled(images: ImageSet, resamples: int, rng: np.random.Generator) -> Values:
    """Sample the set's groups with replacement, as many as it has. Return the count of each image, (resamples, N)."""
    groups = _grouped(images)
    count = int(groups.max()) + 1
    counts: Values = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)[:, groups]
    return counts


def groups_of(rows: NDArray[Any]) -> NDArray[np.int64]:
    """Return the group (N,) of each of ``rows`` (N, …): equal rows share a group, numbered by first occurrence."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], dtype=np.int64)


def mean_of(values: NDArray[np.floating] | NDArray[np.bool_]) -> Statistic:
    """Return the statistic that is the mean of ``values`` (N,), numbers or booleans."""
    wide = values.astype(np.float64)
    return lambda counts: counts @ wide / counts.sum(axis=1)


def frechet_of(first: Embeddings, second: Embeddings) -> Statistic:
    """Return the Fréchet distance as a statistic. Each resample needs its own eigenvalues."""

    def distances(first_counts: Values, second_counts: Values) -> Values:
        pairs = zip(first_counts, second_counts, strict=True)
        return np.array([weighted_frechet(first, one, second, other) for one, other in pairs])

    return distances


def mmd_of(first: Embeddings, second: Embeddings) -> Statistic:
    """Return :func:`model.metrics.embedding_metrics.mmd_distance` as a statistic of all resamples at once."""
    return lambda first_counts, second_counts: weighted_mmd(first, first_counts, second, second_counts)


def _grouped(images: ImageSet) -> NDArray[np.int64]:
    """Return the group (N,) of each image; without groups each image is one."""
    return np.arange(images) if isinstance(images, int) else images
