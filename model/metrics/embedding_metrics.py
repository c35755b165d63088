"""How well pictures fit their prompts and their domain, measured on embeddings.

Legend: ``N``, ``M`` pictures, ``D`` embedding width, ``P`` prompts, ``S`` seeds, ``K`` neighbours. All rows are unit
vectors of one encoder; the distances hold for rows of any length. Sums are taken in float64.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from model.errors import ModelError

Embeddings = NDArray[np.float32]
Values = NDArray[np.float64]

MMD_SIGMA = 10.0
"""Width of the Gaussian kernel (Jayasumana et al. 2401.09603, section 4)."""
MMD_SCALE = 1000.0
"""What the published CMMD is multiplied with, to be read without exponents."""
NEAR_DUPLICATE = 0.95
"""Cosine from which two pictures are variants of one. It is the encoder's: by ``sticker-clip`` a Twemoji and itself
shifted by 1, 2 or 4 of 64 px have 0.995, 0.990 and 0.983 in the median, an emoji and its nearest other skin tone 0.956;
of those without skin tones nine in ten have no other this near. There a copy is above 0.944, which 98%, 98% and 91% of
the shifted are."""
_BLOCK_PAIRS = 1 << 22
_TIE = 1e-9  # squared distances of equal float64 rows differ by less


def clip_score(images: Embeddings, texts: Embeddings) -> float:
    """Mean cosine between picture i and text i, both (N, D): in [−1, 1], higher is better."""
    return float(pair_cosines(images, texts).mean())


def pair_cosines(images: Embeddings, texts: Embeddings) -> Values:
    """(N,) cosine between picture i and text i, both (N, D)."""
    if images.shape != texts.shape:
        raise ModelError(f"{images.shape} pictures and {texts.shape} texts do not pair up")
    cosines: Values = np.einsum("nd,nd->n", images, texts, dtype=np.float64)
    return cosines


def frechet_distance(first: Embeddings, second: Embeddings) -> float:
    """Fréchet distance between Gaussians fitted to two sets (N, D) and (M, D): at least 0, lower is closer.

    ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½)   (Heusel et al. 1706.08500, eq. 6, on CLIP instead of Inception features).
    The estimate is biased upwards for few rows, so only distances of equally many rows compare.
    """
    return weighted_frechet(first, np.ones(len(first)), second, np.ones(len(second)))


def weighted_frechet(first: Embeddings, first_counts: Values, second: Embeddings, second_counts: Values) -> float:
    """:func:`frechet_distance` where row i of each set counts ``counts[i]`` times: what a bootstrap asks for."""
    if min(len(first), len(second)) < 2:
        raise ModelError("a Fréchet distance needs at least two pictures on each side")
    (mean_1, cov_1), (mean_2, cov_2) = _gaussian(first, first_counts), _gaussian(second, second_counts)
    # tr (Σ₁Σ₂)^½ = Σ √λ(Σ₁^½ Σ₂ Σ₁^½), a symmetric matrix: stable where few rows leave the covariances singular.
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_2 @ root).clip(min=0)).sum()
    distance = np.square(mean_1 - mean_2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * cross
    return float(max(distance, 0.0))


def mmd_distance(first: Embeddings, second: Embeddings) -> float:
    """Maximum mean discrepancy between two sets (N, D) and (M, D), the CMMD of Jayasumana et al. (2401.09603).

    1000 · (mean k(x, x′) + mean k(y, y′) − 2 mean k(x, y)),   k(a, b) = exp(−‖a − b‖² / 2σ²), σ = 10

    The estimator is the biased one (a V-statistic, Gretton et al. 2012, eq. 5), as in the authors' code: a picture
    counts as its own pair, so the value is at least 0, and 0 for identical sets. Its bias falls with 1/N and is about
    2 · 1000 · (1 − mean k)/N, so only distances of equally many rows compare. It assumes no Gaussian. The
    published figures are of ViT-L/14 at 336 px; those of another encoder do not compare with them.
    """
    if not len(first) or not len(second):
        raise ModelError("an MMD needs at least one picture on each side")
    return float(weighted_mmd(first, np.ones((1, len(first))), second, np.ones((1, len(second))))[0])


def weighted_mmd(first: Embeddings, first_counts: Values, second: Embeddings, second_counts: Values) -> Values:
    """(R,) :func:`mmd_distance` of R resamples, where row i counts ``counts[r, i]`` times, (R, N) and (R, M)."""
    one, other = (counts / counts.sum(axis=1, keepdims=True) for counts in (first_counts, second_counts))
    within = _mean_kernel(first, one, first, one) + _mean_kernel(second, other, second, other)
    distances: Values = (MMD_SCALE * (within - 2 * _mean_kernel(first, one, second, other))).clip(min=0)
    return distances


def precision_recall(samples: Embeddings, real: Embeddings, k: int = 3) -> tuple[float, float]:
    """Share of samples (N, D) that could be real, and of real pictures (M, D) that could be samples; each in [0, 1].

    A set's manifold is the union of balls around its rows, each as wide as the distance to the row's ``k``-th nearest
    other row (Kynkäänniemi et al. 1904.06991, eq. 1 and 2). Precision falls with odd samples, recall with missing ones.
    """
    inside, covered = on_manifold(samples, real, k), on_manifold(real, samples, k)
    return float(inside.mean()), float(covered.mean())


def on_manifold(rows: Embeddings, manifold: Embeddings, k: int = 3) -> NDArray[np.bool_]:
    """(N,) whether each of ``rows`` (N, D) lies in a ball of :func:`precision_recall` around a row of ``manifold``."""
    if len(manifold) <= k:
        raise ModelError(f"precision and recall need more than k = {k} pictures on each side, here are {len(manifold)}")
    radii = np.concatenate(  # place 0 is the row itself
        [np.partition(block, k, axis=1)[:, k] for block in _squared_distances(manifold, manifold)]
    )
    return np.concatenate([(block <= radii + _TIE).any(axis=1) for block in _squared_distances(rows, manifold)])


def copy_threshold(
    real_nearest: NDArray[np.floating], percentile: float = 95.0, near_duplicate: float = NEAR_DUPLICATE
) -> float:
    """The cosine above which a sample counts as a copy of its nearest database picture; at most ``near_duplicate``.

    Args:
        real_nearest: (N,) cosine of real pictures to their nearest *other* picture of the database.
        percentile: of those that have no near-duplicate: so many in 100 are no copies of another by this measure.
        near_duplicate: cosine from which two real pictures are variants of one, or one stored twice.

    Variants say nothing about how near two different pictures are, and leave the distribution: in a domain full of
    them they would push the threshold so close to 1 that a copy which is shifted by a pixel stays below it. A slightly
    changed copy is about as near to its source as variants are to each other, so it counts. So does a sample that is a
    variant of a stored picture; how many real ones are is the copy rate of real pictures, to be read beside it.
    """
    apart = real_nearest[np.isfinite(real_nearest) & (real_nearest < near_duplicate)]
    if not len(apart):
        return near_duplicate
    return float(np.percentile(apart.astype(np.float64), percentile))


def copy_rate(sample_nearest: NDArray[np.floating], threshold: float) -> float:
    """Share of samples whose cosine (N,) to their nearest database picture is above ``threshold``: in [0, 1]."""
    return float((sample_nearest > threshold).mean())


def diversity(rows: Embeddings) -> float:
    """How different pictures of one prompt are: mean 1 − cosine over pairs of seeds, of (P, S, D); higher is wider."""
    return float(prompt_diversity(rows).mean())


def prompt_diversity(rows: Embeddings) -> Values:
    """(P,) mean 1 − cosine over the pairs of different seeds of each prompt, of (P, S, D)."""
    seeds = rows.shape[1]
    if rows.ndim != 3 or seeds < 2:
        raise ModelError(f"diversity needs (P, S, D) with at least two seeds, not {rows.shape}")
    wide = rows.astype(np.float64)
    total = np.square(wide.sum(axis=1)).sum(axis=-1) - np.square(wide).sum(axis=(1, 2))  # Σ over i ≠ j
    spread: Values = 1 - total / (seeds * (seeds - 1))
    return spread


def _mean_kernel(first: Embeddings, first_weights: Values, second: Embeddings, second_weights: Values) -> Values:
    """(R,) mean of the kernel less 1 between two sets, by weights (R, N) and (R, M), a block of pairs at a time.

    The 1 cancels in the distance; without it the values near 0 keep their digits.
    """
    total, start = np.zeros(len(first_weights)), 0
    for block in _squared_distances(first, second):
        weights = first_weights[:, start : start + len(block)]
        total += ((weights @ np.expm1(-block / (2 * MMD_SIGMA**2))) * second_weights).sum(axis=1)
        start += len(block)
    return total


def _squared_distances(first: Embeddings, second: Embeddings) -> Iterator[Values]:
    """‖a − b‖² of all pairs, as many rows of ``first`` at a time as make some four million."""
    wide = second.astype(np.float64)
    lengths = np.square(wide).sum(axis=1)
    step = max(1, _BLOCK_PAIRS // len(second))
    for start in range(0, len(first), step):
        block = first[start : start + step].astype(np.float64)
        yield (np.square(block).sum(axis=1)[:, None] + lengths - 2 * block @ wide.T).clip(min=0)


def _gaussian(rows: Embeddings, counts: Values) -> tuple[Values, Values]:
    total = counts.sum()
    mean = counts @ rows.astype(np.float64) / total
    centred = (rows - mean) * np.sqrt(counts / (total - 1))[:, None]
    return mean, centred.T @ centred
