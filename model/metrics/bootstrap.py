"""How far a score can be trusted: percentile intervals by resampling pictures, or groups of them.

Legend: ``R`` resamples, ``N``, ``M`` pictures, ``D`` embedding width.

Pictures of one prompt are alike, so another set of prompts would differ by more than another set of such pictures:
where prompts repeat, prompts are drawn, each with all its pictures (Davison and Hinkley, Bootstrap Methods, 3.8).

A resample is held as how often each picture was drawn, (R, N), so that a statistic of all resamples is a few matrix
products wherever it is linear or quadratic in these counts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.metrics.embedding_metrics import Embeddings, Values, weighted_frechet, weighted_mmd

Statistic = Callable[..., Values]
"""(R, N), or (R, N) and (R, M), counts to (R,) values."""
Set = int | NDArray[np.int64]
"""How many pictures a set has, or the group of each, (N,) from 0 on: those of a group are drawn together."""
LEVEL = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A value, and the interval that holds it in ``LEVEL`` of all repetitions; None where none can be drawn."""

    value: float
    low: float | None = None
    high: float | None = None


def bootstrap_interval(
    statistic: Statistic,
    *sets: Set,
    resamples: int,
    rng: np.random.Generator,
    level: float = LEVEL,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Score:
    """The statistic of all pictures, and its percentile interval over ``resamples`` draws with replacement.

    Args:
        statistic: of counts.
        sets: pictures of each set; the sets are drawn independently. A set of one group knows no interval.
        resamples: 0 for the value alone.
        rng: source of the draws.
        level: share of the resamples inside.
        bounds: that no value can pass but by rounding.

    A distance between sets is larger for a resample than for the set, since pictures drawn twice leave it fewer to
    know its spread by. What the resamples lie above the value on average is therefore taken off: the interval is of
    the value expected *at this number of pictures*, which is what runs of one size are compared by. For a mean this
    changes nothing. (Efron and Tibshirani, An Introduction to the Bootstrap, 10.2 and 13.3.)
    """
    grouped = [_grouped(each) for each in sets]
    value = float(np.clip(statistic(*(np.ones((1, len(groups))) for groups in grouped))[0], *bounds))
    if not resamples or any(groups.max() == 0 for groups in grouped):
        return Score(value=value)
    drawn = statistic(*(resampled(groups, resamples, rng) for groups in grouped))
    tail = 50 * (1 - level)
    low, high = np.percentile(drawn, [tail, 100 - tail]) - (drawn.mean() - value)
    low, high = np.clip([low, high], *bounds)
    return Score(value=value, low=float(low), high=float(high))


def resampled(pictures: Set, resamples: int, rng: np.random.Generator) -> Values:
    """(resamples, N) how often each picture is drawn when as many groups as there are are drawn with replacement."""
    groups = _grouped(pictures)
    count = int(groups.max()) + 1
    drawn: Values = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)[:, groups]
    return drawn


def groups_of(rows: NDArray[Any]) -> NDArray[np.int64]:
    """(N,) the group of each of ``rows`` (N, …), numbered as they first come; equal rows are of one group."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], dtype=np.int64)


def mean_of(values: NDArray[np.floating] | NDArray[np.bool_]) -> Statistic:
    """The mean of values (N,), or of truths."""
    wide = values.astype(np.float64)
    return lambda counts: counts @ wide / counts.sum(axis=1)


def frechet_of(first: Embeddings, second: Embeddings) -> Statistic:
    """Fréchet distance of each resample in turn, since each needs its own eigenvalues."""

    def distances(first_counts: Values, second_counts: Values) -> Values:
        pairs = zip(first_counts, second_counts, strict=True)
        return np.array([weighted_frechet(first, one, second, other) for one, other in pairs])

    return distances


def mmd_of(first: Embeddings, second: Embeddings) -> Statistic:
    """:func:`model.metrics.embedding_metrics.mmd_distance`, all resamples at once."""
    return lambda first_counts, second_counts: weighted_mmd(first, first_counts, second, second_counts)


def _grouped(pictures: Set) -> NDArray[np.int64]:
    return np.arange(pictures) if isinstance(pictures, int) else pictures
