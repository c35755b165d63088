"""All embedding metrics of a set of samples, with confidence intervals.

Legend: ``N`` samples, ``M`` real images, ``D`` embedding width.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from model.metrics import embedding_metrics
from model.metrics.bootstrap import (
    ImageSet,
    Score,
    Statistic,
    bootstrap_interval,
    frechet_of,
    groups_of,
    mean_of,
    mmd_of,
)
from model.metrics.embedding_metrics import Embeddings

_SHARE = (0.0, 1.0)
_DISTANCE = (0.0, np.inf)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceSet:
    """Reference of the scores: embeddings of real images, copy threshold, and bootstrap settings.

    Attributes:
        real: (M, D) embeddings of real images.
        threshold: Cosine above which a sample counts as a copy of its nearest database image.
        resamples: Resamples of each interval; 0 for no intervals.
        seed: Seed of the bootstrap.
    """

    real: Embeddings
    threshold: float
    resamples: int = 200
    seed: int = 0


def score_samples(
    rows: Embeddings,
    queries: Embeddings,
    near: NDArray[np.floating],
    reference: ReferenceSet,
    *,
    spacing: NDArray[np.floating] | None = None,
    groups: NDArray[np.int64] | None = None,
) -> dict[str, Score]:
    """Return scores by name: clip_score, fd, mmd, precision, recall, coverage, nearest, copy_rate and authenticity.

    Distances, precision, recall and coverage depend on the sizes of both sets. If there are fewer real images than
    samples, they use the first M samples. Samples of one query are resampled together, so the intervals describe the
    variation over sets of this many queries. Manifolds, the copy threshold and the spacing are not resampled.

    Args:
        rows: (N, D) embeddings of the samples.
        queries: (N, D) embedding of each sample's prompt.
        near: (N,) cosine of each sample to its nearest database image.
        reference: Real images, copy threshold and bootstrap settings.
        spacing: (N,) cosine of that database image to its nearest distinct one. Default: None, no authenticity.
        groups: (N,) unit that each sample is resampled with, numbered from 0 by first occurrence. Default: its query.
    """
    real, groups = reference.real, groups_of(queries) if groups is None else groups
    compared, compared_groups = rows[: len(real)], groups[: len(real)]
    rng = np.random.default_rng(reference.seed)

    def interval(statistic: Statistic, *sets: ImageSet, bounds: tuple[float, float]) -> Score:
        return bootstrap_interval(statistic, *sets, resamples=reference.resamples, rng=rng, bounds=bounds)

    scores = {
        "clip_score": interval(mean_of(embedding_metrics.pair_cosines(rows, queries)), groups, bounds=(-1.0, 1.0)),
        "fd": interval(frechet_of(compared, real), compared_groups, len(real), bounds=_DISTANCE),
        "mmd": interval(mmd_of(compared, real), compared_groups, len(real), bounds=_DISTANCE),
        "precision": interval(mean_of(embedding_metrics.on_manifold(compared, real)), compared_groups, bounds=_SHARE),
        "recall": interval(mean_of(embedding_metrics.on_manifold(real, compared)), len(real), bounds=_SHARE),
        "nearest": interval(mean_of(near), groups, bounds=(-1.0, 1.0)),
        "copy_rate": interval(mean_of(near > reference.threshold), groups, bounds=_SHARE),
        # Computed last: all intervals share one generator, and the earlier ones must not change.
        "coverage": interval(mean_of(embedding_metrics.covered(compared, real)), len(real), bounds=_SHARE),
    }
    if spacing is not None:
        authentic = embedding_metrics.authentic(near, spacing)
        scores["authenticity"] = interval(mean_of(authentic), groups, bounds=_SHARE)
    return scores


def score_mean(
    values: NDArray[np.floating], queries: Embeddings, reference: ReferenceSet, *, bounds: tuple[float, float]
) -> Score:
    """Return the mean of ``values`` (N,) and its interval; values of equal queries (N, D) are resampled together."""
    rng = np.random.default_rng(reference.seed)
    groups = groups_of(queries)
    return bootstrap_interval(mean_of(values), groups, resamples=reference.resamples, rng=rng, bounds=bounds)


def flatten(scores: dict[str, Score], suffix: str = "") -> dict[str, float]:
    """Return scores as numbers: ``name_suffix``, plus ``name_suffix_low`` and ``…_high`` if there is an interval."""
    plain: dict[str, float] = {}
    for name, score in scores.items():
        key = f"{name}_{suffix}" if suffix else name
        plain[key] = score.value
        if score.low is not None and score.high is not None:
            plain |= {f"{key}_low": score.low, f"{key}_high": score.high}
    return plain
