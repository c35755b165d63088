"""All that embeddings say about one set of samples, each score with its interval.

Legend: ``N`` samples, ``M`` real pictures, ``D`` embedding width.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from model.metrics import embedding_metrics
from model.metrics.bootstrap import Score, Set, Statistic, bootstrap_interval, frechet_of, groups_of, mean_of, mmd_of
from model.metrics.embedding_metrics import Embeddings

_SHARE = (0.0, 1.0)
_DISTANCE = (0.0, np.inf)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceSet:
    """What samples are held against: real pictures (M, D), and the cosine above which a sample is a copy."""

    real: Embeddings
    threshold: float
    resamples: int = 200
    seed: int = 0


def score_samples(
    rows: Embeddings, queries: Embeddings, near: NDArray[np.floating], yardstick: ReferenceSet
) -> dict[str, Score]:
    """The scores of samples (N, D) by name: clip_score, fd, mmd, precision, recall, nearest, copy_rate.

    Args:
        rows: of the samples.
        queries: (N, D) what each was drawn from.
        near: (N,) cosine of each to its nearest database picture.
        yardstick: the real pictures.

    Distances, precision and recall depend on how many there are on each side: where there are fewer real pictures than
    samples, they are of the first M samples. Samples of one query are resampled together: intervals are of other
    queries, as many and drawn from as often. For precision, recall and copy rate the manifolds and the threshold stay
    as they are from resample to resample.
    """
    real, asked = yardstick.real, groups_of(queries)
    held, held_asked = rows[: len(real)], asked[: len(real)]
    rng = np.random.default_rng(yardstick.seed)

    def interval(statistic: Statistic, *sets: Set, bounds: tuple[float, float]) -> Score:
        return bootstrap_interval(statistic, *sets, resamples=yardstick.resamples, rng=rng, bounds=bounds)

    return {
        "clip_score": interval(mean_of(embedding_metrics.pair_cosines(rows, queries)), asked, bounds=(-1.0, 1.0)),
        "fd": interval(frechet_of(held, real), held_asked, len(real), bounds=_DISTANCE),
        "mmd": interval(mmd_of(held, real), held_asked, len(real), bounds=_DISTANCE),
        "precision": interval(mean_of(embedding_metrics.on_manifold(held, real)), held_asked, bounds=_SHARE),
        "recall": interval(mean_of(embedding_metrics.on_manifold(real, held)), len(real), bounds=_SHARE),
        "nearest": interval(mean_of(near), asked, bounds=(-1.0, 1.0)),
        "copy_rate": interval(mean_of(near > yardstick.threshold), asked, bounds=_SHARE),
    }


def score_mean(
    values: NDArray[np.floating], queries: Embeddings, yardstick: ReferenceSet, *, bounds: tuple[float, float]
) -> Score:
    """The mean of values (N,) with its interval; those of equal queries (N, D) are resampled together."""
    rng = np.random.default_rng(yardstick.seed)
    asked = groups_of(queries)
    return bootstrap_interval(mean_of(values), asked, resamples=yardstick.resamples, rng=rng, bounds=bounds)


def flatten(scores: dict[str, Score], suffix: str = "") -> dict[str, float]:
    """Scores as plain numbers: ``name_suffix``, and ``name_suffix_low`` and ``…_high`` where there is an interval."""
    plain: dict[str, float] = {}
    for name, score in scores.items():
        key = f"{name}_{suffix}" if suffix else name
        plain[key] = score.value
        if score.low is not None and score.high is not None:
            plain |= {f"{key}_low": score.low, f"{key}_high": score.high}
    return plain
