"""Metrics of image embeddings: agreement with prompts, distance to a domain, copies and diversity.

Legend: ``N``, ``M`` images, ``D`` embedding width, ``P`` prompts, ``S`` seeds, ``K`` neighbours. All rows are unit
vectors of one encoder; the distances are valid for rows of any length. Sums are computed in float64.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from model.configs import NEAR_DUPLICATE
from model.errors import ModelError

Embeddings = NDArray[np.float32]
Values = NDArray[np.float64]

MMD_SIGMA = 10.0
"""Width of the Gaussian kernel (Jayasumana et al. 2401.09603, section 4)."""
MMD_SCALE = 1000.0
"""Factor of the published CMMD, for readability."""
_BLOCK_PAIRS = 1 << 22
_TIE = 1e-9  # squared distances of equal float64 rows differ by less


def clip_score(images: Embeddings, texts: Embeddings) -> float:
    """Return the mean cosine between image i and text i, both (N, D): in [−1, 1], higher is better."""
    return float(pair_cosines(images, texts).mean())


def pair_cosines(images: Embeddings, texts: Embeddings) -> Values:
    """Return the cosines (N,) between image i and text i, both (N, D)."""
    if images.shape != texts.shape:
        raise ModelError(
            f"images and texts have different shapes: {images.shape}, {texts.shape}; pass one text for each image"
        )
    cosines: Values = np.einsum("nd,nd->n", images, texts, dtype=np.float64)
    return cosines


def frechet_distance(first: Embeddings, second: Embeddings) -> float:
    """Return the Fréchet distance between Gaussians fitted to two sets (N, D), (M, D): at least 0, lower is closer.

    ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½)   (Heusel et al. 1706.08500, eq. 6, on CLIP instead of Inception features).
    The estimate is biased upwards for few rows, so only distances of equally large sets are comparable.
    """
    return weighted_frechet(first, np.ones(len(first)), second, np.ones(len(second)))


def weighted_frechet(first: Embeddings, first_counts: Values, second: Embeddings, second_counts: Values) -> float:
    """Return :func:`frechet_distance` with row i of each set repeated ``counts[i]`` times, for the bootstrap."""
    if min(len(first), len(second)) < 2:
        raise ModelError(
            f"too few images for a Fréchet distance: {len(first)} and {len(second)}; pass at least 2 in each set"
        )
    (mean_1, cov_1), (mean_2, cov_2) = _gaussian(first, first_counts), _gaussian(second, second_counts)
    # tr (Σ₁Σ₂)^½ = Σ √λ(Σ₁^½ Σ₂ Σ₁^½), a symmetric matrix: stable for singular covariances of few rows.
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_2 @ root).clip(min=0)).sum()
    distance = np.square(mean_1 - mean_2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * cross
    return float(max(distance, 0.0))


def mmd_distance(first: Embeddings, second: Embeddings) -> float:
    """Return the maximum mean discrepancy of two sets (N, D), (M, D): CMMD of Jayasumana et al. (2401.09603).

    1000 · (mean k(x, x′) + mean k(y, y′) − 2 mean k(x, y)),   k(a, b) = exp(−‖a − b‖² / 2σ²), σ = 10

    The estimator is the biased V-statistic (Gretton et al. 2012, eq. 5), as in the authors' code: an image is paired
    with itself too, so the value is at least 0, and 0 for identical sets. Its bias falls with 1/N and is about
    2 · 1000 · (1 − mean k)/N, so only distances of equally large sets are comparable. Published values use ViT-L/14 at
    336 px and are not comparable with those of another encoder.

    The metric assumes no Gaussian, but on unit rows the kernel is nearly linear in the squared distance: the value is
    about 10 · ‖μ₁ − μ₂‖². It barely detects a collapse to few images with the right mean.
    """
    if not len(first) or not len(second):
        raise ModelError(f"too few images for an MMD: {len(first)} and {len(second)}; pass at least 1 in each set")
    return float(weighted_mmd(first, np.ones((1, len(first))), second, np.ones((1, len(second))))[0])


def kernel_distance(first: Embeddings, second: Embeddings) -> float:
    """Return the kernel distance of two sets of unit rows (N, D), (M, D): KID of Bińkowski et al. (1801.01401).

    mean over i ≠ j of k(x_i, x_j) + mean over i ≠ j of k(y_i, y_j) − 2 mean k(x, y),   k(a, b) = (1 + a·b)³

    The estimator is unbiased for any number of rows, unlike the Fréchet distance and :func:`mmd_distance`, so it may be
    negative. The published kernel divides a·b by D for features whose components are about 1. On unit rows a·b is that
    already. Published values use Inception features and are not comparable.
    """
    if min(len(first), len(second)) < 2:
        raise ModelError(f"too few images for a KID: {len(first)} and {len(second)}; pass at least 2 in each set")
    x, y = first.astype(np.float64), second.astype(np.float64)

    def within(rows: Values) -> float:
        squares = (1 + np.square(rows).sum(axis=1)) ** 3
        return float((((1 + rows @ rows.T) ** 3).sum() - squares.sum()) / (len(rows) * (len(rows) - 1)))

    return within(x) + within(y) - 2 * float(((1 + x @ y.T) ** 3).mean())


def weighted_mmd(first: Embeddings, first_counts: Values, second: Embeddings, second_counts: Values) -> Values:
    """Return :func:`mmd_distance` (R,) of R resamples with row i repeated ``counts[r, i]`` times, (R, N), (R, M)."""
    one, other = (counts / counts.sum(axis=1, keepdims=True) for counts in (first_counts, second_counts))
    within = _mean_kernel(first, one, first, one) + _mean_kernel(second, other, second, other)
    distances: Values = (MMD_SCALE * (within - 2 * _mean_kernel(first, one, second, other))).clip(min=0)
    return distances


def precision_recall(samples: Embeddings, real: Embeddings, k: int = 3) -> tuple[float, float]:
    """Return precision and recall of samples (N, D) against real images (M, D), each in [0, 1].

    Precision is the share of samples on the manifold of the real images, recall the share of real images on that of the
    samples. A set's manifold is the union of balls around its rows with the distance to the row's ``k``-th nearest
    other row as radius (Kynkäänniemi et al. 1904.06991, eq. 1 and 2).
    """
    inside, covered = on_manifold(samples, real, k), on_manifold(real, samples, k)
    return float(inside.mean()), float(covered.mean())


def coverage(samples: Embeddings, real: Embeddings, k: int = 5) -> float:
    """Return the share of :func:`covered` real images (M, D): in [0, 1], higher is better."""
    return float(covered(samples, real, k).mean())


def covered(samples: Embeddings, real: Embeddings, k: int = 5) -> NDArray[np.bool_]:
    """Return a mask (M,) of the real images with a sample in their ball (Naeem et al. 2002.09797, eq. 4).

    The radius is the distance to the ``k``-th nearest other real image, or to the farthest one if there are fewer.
    The balls are those of real images, so odd samples do not raise the value as they raise recall.
    """
    radii = _radii(real, min(k, len(real) - 1))
    distances = _squared_distances(real, samples)
    return np.concatenate([block.min(axis=1) for block in distances]) <= radii + _TIE


def on_manifold(rows: Embeddings, manifold: Embeddings, k: int = 3) -> NDArray[np.bool_]:
    """Return a mask (N,) of the ``rows`` (N, D) on the manifold (:func:`precision_recall`) of ``manifold`` (M, D)."""
    if len(manifold) <= k:
        raise ModelError(
            f"too few images for precision and recall: {len(manifold)}; pass more than k = {k} in each set"
        )
    radii = _radii(manifold, k)
    return np.concatenate([(block <= radii + _TIE).any(axis=1) for block in _squared_distances(rows, manifold)])


def copy_threshold(
    real_nearest: NDArray[np.floating], percentile: float = 95.0, near_duplicate: float = NEAR_DUPLICATE
) -> float:
    """Return the cosine above which a sample counts as a copy of its nearest database image.

    Variants are excluded because they say nothing about the distance between different images. In a domain full of
    variants, the threshold would be so close to 1 that it missed a copy shifted by one pixel. A slightly changed copy
    is about as close to its source as variants are to each other, so it counts as a copy. So does a sample that is a
    variant of a stored image. Compare the copy rate of samples with that of real images, which counts such variants.

    Args:
        real_nearest: (N,) cosine of real images to their nearest *other* image of the database.
        percentile: Percentile in [0, 100] of the cosines below ``near_duplicate``; it is the threshold. Default: 95.
        near_duplicate: Minimum cosine of variants, and the upper limit of the threshold. Default: 0.95.
    """
    distinct = real_nearest[np.isfinite(real_nearest) & (real_nearest < near_duplicate)]
    if not len(distinct):
        return near_duplicate
    return float(np.percentile(distinct.astype(np.float64), percentile))


def distinct_nearest(
    neighbour_cosines: NDArray[np.floating], near_duplicate: float = NEAR_DUPLICATE
) -> NDArray[np.floating]:
    """Return the cosine (N,) of images to their nearest distinct image, from those to their nearest others (N, K).

    Near-duplicates are not distinct. If all K are, the smallest cosine is returned. Missing neighbours are −inf.
    """
    known = np.isfinite(neighbour_cosines)
    distinct = np.where(known & (neighbour_cosines < near_duplicate), neighbour_cosines, -np.inf).max(axis=1)
    smallest = np.where(known, neighbour_cosines, np.inf).min(axis=1)
    smallest = np.where(np.isfinite(smallest), smallest, -1.0)
    nearest: NDArray[np.floating] = np.where(np.isfinite(distinct), distinct, smallest)
    return nearest


def authentic(sample_nearest: NDArray[np.floating], spacing: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return a mask (N,) of the samples that are not copies, by the spacing of the images around them.

    A sample is a copy if it is closer to its nearest image than that image is to its nearest distinct one (Alaa et al.
    2102.08921, section 3.3). Unlike :func:`copy_threshold`, this needs no constant, and adapts to dense domains.

    Args:
        sample_nearest: (N,) cosine of each sample to its nearest image.
        spacing: (N,) cosine of that image to its :func:`distinct_nearest` one.
    """
    return sample_nearest <= spacing


def copy_rate(sample_nearest: NDArray[np.floating], threshold: float) -> float:
    """Return the share of samples whose cosine (N,) to the nearest database image exceeds ``threshold``: in [0, 1]."""
    return float((sample_nearest > threshold).mean())


def diversity(rows: Embeddings) -> float:
    """Return the mean 1 − cosine over pairs of seeds of each prompt, from rows (P, S, D); higher is more diverse."""
    return float(prompt_diversity(rows).mean())


def prompt_diversity(rows: Embeddings) -> Values:
    """Return the mean 1 − cosine (P,) over pairs of different seeds of each prompt, from rows (P, S, D)."""
    seeds = rows.shape[1]
    if rows.ndim != 3 or seeds < 2:
        raise ModelError(f"wrong shape for diversity: {rows.shape}; pass (P, S, D) with at least 2 seeds")
    wide = rows.astype(np.float64)
    total = np.square(wide.sum(axis=1)).sum(axis=-1) - np.square(wide).sum(axis=(1, 2))  # Σ over i ≠ j
    spread: Values = 1 - total / (seeds * (seeds - 1))
    return spread


def _mean_kernel(first: Embeddings, first_weights: Values, second: Embeddings, second_weights: Values) -> Values:
    """Return the mean (R,) of the kernel minus 1 between two sets with weights (R, N), (R, M), computed in blocks.

    The 1 cancels in the distance; subtracting it preserves precision for values near 0.
    """
    total, start = np.zeros(len(first_weights)), 0
    for block in _squared_distances(first, second):
        weights = first_weights[:, start : start + len(block)]
        total += ((weights @ np.expm1(-block / (2 * MMD_SIGMA**2))) * second_weights).sum(axis=1)
        start += len(block)
    return total


def _squared_distances(first: Embeddings, second: Embeddings) -> Iterator[Values]:
    """Yield ‖a − b‖² of all pairs in blocks of rows of ``first``, about four million pairs each."""
    wide = second.astype(np.float64)
    lengths = np.square(wide).sum(axis=1)
    step = max(1, _BLOCK_PAIRS // len(second))
    for start in range(0, len(first), step):
        block = first[start : start + step].astype(np.float64)
        yield (np.square(block).sum(axis=1)[:, None] + lengths - 2 * block @ wide.T).clip(min=0)


def _radii(rows: Embeddings, k: int) -> Values:
    """Return the squared distance (N,) of each of ``rows`` to its ``k``-th nearest other row."""
    blocks = _squared_distances(rows, rows)
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for block in blocks])  # position 0 is the row itself


def _gaussian(rows: Embeddings, counts: Values) -> tuple[Values, Values]:
    total = counts.sum()
    mean = counts @ rows.astype(np.float64) / total
    centred = (rows - mean) * np.sqrt(counts / (total - 1))[:, None]
    return mean, centred.T @ centred
