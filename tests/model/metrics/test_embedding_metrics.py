import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from support import tiny_models

from model.configs import NEAR_DUPLICATE
from model.errors import ModelError
from model.metrics.embedding_metrics import (
    authentic,
    clip_score,
    copy_rate,
    copy_threshold,
    coverage,
    covered,
    distinct_nearest,
    diversity,
    frechet_distance,
    kernel_distance,
    mmd_distance,
    on_manifold,
    precision_recall,
    weighted_frechet,
)


def gaussian(
    mean: list[float], covariance: NDArray[np.float64], *, seed: int = 0, count: int = 500
) -> NDArray[np.float32]:
    """Return rows (count, D) with exactly this mean and covariance."""
    rows = np.random.default_rng(seed).normal(size=(count, len(mean)))
    rows -= rows.mean(axis=0)
    whitened = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return (whitened @ np.linalg.cholesky(covariance).T + mean).astype(np.float32)


def test_frechet_distance_identical_sets_is_zero() -> None:
    rows = tiny_models.unit_rows(50).astype(np.float32)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(rows, rows[::-1]) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_shift_is_squared_norm() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    shift = np.array([1.0, -2.0, 0.0, 0.5], np.float32)
    assert frechet_distance(rows, rows + shift) == pytest.approx(1 + 4 + 0.25, rel=1e-5)


def test_frechet_distance_diagonal_covariances_matches_formula() -> None:
    first = gaussian([0, 0, 0], np.diag([1.0, 4.0, 9.0]))
    second = gaussian([1, 0, 0], np.diag([4.0, 4.0, 0.25]), seed=1)
    assert frechet_distance(first, second) == pytest.approx(1 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2, rel=1e-4)


def test_frechet_distance_non_commuting_covariances_matches_formula() -> None:
    first, second = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])
    product = first @ second
    # For 2 × 2: tr √M = √(tr M + 2 √det M).
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(first) + np.trace(second) - 2 * cross
    rows = gaussian([0, 0], first), gaussian([0, 0], second, seed=1)
    assert frechet_distance(*rows) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(*reversed(rows)) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_large_gaussian_samples_matches_formula() -> None:
    draw = np.random.default_rng(0).normal
    first = draw(size=(50_000, 3)).astype(np.float32)
    second = (draw(size=(40_000, 3)) * [1, 2, 3] + [0, 0, 1]).astype(np.float32)
    assert frechet_distance(first, second) == pytest.approx(1 + 0 + 1 + 4, abs=0.1)


def test_frechet_distance_fewer_rows_than_dimensions_is_finite() -> None:
    near, far = tiny_models.unit_rows(5, 64).astype(np.float32), tiny_models.unit_rows(7, 64, seed=1).astype(np.float32)
    assert frechet_distance(near, near) == pytest.approx(0, abs=1e-6)
    slightly = tiny_models.unit(near + 0.01 * tiny_models.unit_rows(5, 64, seed=2))
    assert 0 < frechet_distance(near, slightly) < 0.01 < frechet_distance(near, far) < 4


@pytest.mark.parametrize(("first", "second"), [(1, 5), (5, 1), (0, 5)])
def test_frechet_distance_one_image_raises(first: int, second: int) -> None:
    with pytest.raises(ModelError, match="at least 2 in each set"):
        frechet_distance(
            tiny_models.unit_rows(first).astype(np.float32), tiny_models.unit_rows(second).astype(np.float32)
        )


def test_clip_score_is_mean_cosine_of_pairs() -> None:
    axes = np.eye(4, dtype=np.float32)
    diagonal = np.full(4, 0.5, np.float32)
    pairs = np.stack([axes[0], axes[1], axes[2]]), np.stack([axes[0], -axes[1], diagonal])
    assert clip_score(*pairs) == pytest.approx((1 - 1 + 0.5) / 3)
    rows = tiny_models.unit_rows(9).astype(np.float32)
    assert clip_score(rows, rows) == pytest.approx(1, abs=1e-3)
    assert clip_score(rows, rows[::-1]) < 0.9


def test_clip_score_shape_mismatch_raises() -> None:
    with pytest.raises(ModelError, match=r"different shapes: \(3, 8\), \(2, 8\); pass one text"):
        clip_score(tiny_models.unit_rows(3).astype(np.float32), tiny_models.unit_rows(2).astype(np.float32))


def test_weighted_frechet_equals_repeated_rows() -> None:
    first, second = tiny_models.unit_rows(9).astype(np.float32), tiny_models.unit_rows(7, seed=1).astype(np.float32)
    counts = np.array([2.0, 0, 1, 1, 3, 0, 1, 1, 0]), np.array([1.0, 1, 0, 2, 2, 0, 1])
    repeated = (np.repeat(rows, count.astype(int), axis=0) for rows, count in zip((first, second), counts, strict=True))
    weighted = weighted_frechet(first, counts[0], second, counts[1])
    assert weighted == pytest.approx(frechet_distance(*repeated), rel=1e-6)


def mmd_by_hand(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    def mean(rows: NDArray[np.float32], others: NDArray[np.float32]) -> float:
        wide = rows.astype(np.float64), others.astype(np.float64)
        return float(np.mean([[np.exp(-np.square(a - b).sum() / (2 * 10**2)) for b in wide[1]] for a in wide[0]]))

    return 1000 * (mean(first, first) + mean(second, second) - 2 * mean(first, second))


def test_mmd_distance_matches_published_formula() -> None:
    first, second = (tiny_models.unit_rows(count, seed=count).astype(np.float32) for count in (11, 17))
    assert mmd_distance(first, second) == pytest.approx(mmd_by_hand(first, second), abs=1e-9)
    assert mmd_distance(first, first[::-1]) == pytest.approx(0, abs=1e-9)
    many = tiny_models.unit_rows(2_100, seed=3).astype(np.float32)  # more than one block
    assert mmd_distance(many, many[::-1]) == pytest.approx(0, abs=1e-9)


def test_mmd_distance_many_images_limits_memory() -> None:
    rows = tiny_models.unit_rows(6_000, 2).astype(np.float32)
    tracemalloc.start()
    mmd_distance(rows, rows[::-1])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 6_000 * 6_000 * 8 / 2


def test_mmd_distance_points_and_gaussians_match_closed_form() -> None:
    axes = np.eye(2, dtype=np.float32)
    assert mmd_distance(axes[:1], axes[1:]) == pytest.approx(1000 * (2 - 2 * np.exp(-2 / 200)), rel=1e-6)
    # E k(x, y) for x, y of N(0, s²) and N(m, s²) in D dimensions: (1 + 2s²/σ²)^(−D/2) exp(−m²/(2(σ² + 2s²))).
    draw, spread, shift, width = np.random.default_rng(0).normal, 4.0, 6.0, 3
    first = (draw(size=(3_000, width)) * spread).astype(np.float32)
    second = (draw(size=(3_000, width)) * spread + [shift, 0, 0]).astype(np.float32)
    inner = (1 + 2 * spread**2 / 100) ** (-width / 2)
    expected = 1000 * 2 * inner * (1 - np.exp(-(shift**2) / (2 * (100 + 2 * spread**2))))
    assert mmd_distance(first, second) == pytest.approx(expected, rel=0.05)


def test_precision_recall_identical_and_distant_sets() -> None:
    rows = tiny_models.unit_rows(40).astype(np.float32)
    assert precision_recall(rows, rows[::-1]) == (1.0, 1.0)
    assert precision_recall(np.repeat(rows[:2], 10, axis=0), np.repeat(rows[:2], 8, axis=0)) == (1.0, 1.0)
    assert precision_recall(rows, rows + 100) == (0.0, 0.0)


def test_precision_recall_one_of_two_clusters_is_one_and_half() -> None:
    noise = 0.01 * np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    near, far = noise[:30], noise[30:] + np.array([1, 0, 0, 0], np.float32)
    assert precision_recall(near, np.concatenate([near, far])) == (1.0, 0.5)
    assert precision_recall(np.concatenate([near, far]), far) == (0.5, 1.0)


def test_on_manifold_radius_is_third_neighbour() -> None:
    line = np.array([[0.0], [1.0], [2.0], [4.0], [100.0]], np.float32)  # radii 4, 3, 2, 4, 99
    points = np.array([[-4.0], [-4.1], [8.0], [0.99 + 199], [199.1]], np.float32)
    assert on_manifold(points[[0, 1]], line[:4]).tolist() == [True, False]
    assert on_manifold(points[[2]], line[:4]).tolist() == [True]
    assert on_manifold(points[[3, 4]], line).tolist() == [False, False]
    with pytest.raises(ModelError, match="precision and recall: 3; pass more than k = 3 in each set"):
        on_manifold(points, line[:3])


def test_coverage_counts_real_images_with_a_sample_in_their_ball() -> None:
    line = np.array([[0.0], [1.0], [2.0], [4.0]], np.float32)  # radii to the second other: 2, 1, 2, 3
    assert covered(np.array([[-1.9]], np.float32), line, k=2).tolist() == [True, False, False, False]
    assert covered(np.array([[6.9], [100]], np.float32), line, k=2).tolist() == [False, False, False, True]
    assert coverage(line, line, k=9) == 1, "k is limited by the number of images"


def test_coverage_is_not_raised_by_odd_samples_and_detects_a_collapse() -> None:
    real, other = (tiny_models.unit_rows(300, seed=seed).astype(np.float32) for seed in (0, 1))
    odd = 2 * other
    assert precision_recall(odd, real)[1] > 0.9
    assert coverage(odd, real) < 0.5 < 0.9 < coverage(other, real)
    assert coverage(np.repeat(other[:5], 60, axis=0), real) < 0.5


def test_authentic_compares_a_sample_with_the_spacing_of_its_image() -> None:
    cosines = np.array([[0.99, 0.96, 0.80], [0.70, 0.60, 0.50], [0.99, 0.98, -np.inf], [-np.inf] * 3], np.float32)
    spacing = distinct_nearest(cosines)
    assert spacing == pytest.approx([0.80, 0.70, 0.98, -1.0]), "variants are not distinct, unless there are no others"
    assert authentic(np.full(4, 0.75), spacing).tolist() == [True, False, True, False]
    assert distinct_nearest(cosines, 0.995)[0] == pytest.approx(0.99)


def test_copy_rate_copies_is_one_and_new_images_matches_percentile() -> None:
    rows = tiny_models.unit_rows(2_000, 6).astype(np.float32)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    threshold = copy_threshold(cosines[:1_000].max(axis=1), 90, 0.999)  # in 6 dimensions all rows are close
    assert copy_rate(cosines[1_000:].max(axis=1), threshold) == pytest.approx(0.1, abs=0.03)
    slightly = tiny_models.unit(rows + 1e-4 * tiny_models.unit_rows(2_000, 6, seed=1))
    assert copy_rate((slightly @ rows.T).max(axis=1), threshold) == 1.0
    assert copy_rate((tiny_models.unit(-rows[:, ::-1]) @ rows.T).max(axis=1), threshold) < 0.3


def test_copy_threshold_ignores_duplicates_and_variants() -> None:
    distinct = np.linspace(0.2, 0.7, 51)
    for doubled in (1.0, 1.0003, 1 - 1e-3, NEAR_DUPLICATE):
        assert copy_threshold(np.append(distinct, [doubled] * 500), 50) == pytest.approx(0.45)
    assert copy_threshold(np.full(9, 1.0)) == NEAR_DUPLICATE
    assert copy_threshold(np.full(9, -np.inf)) == NEAR_DUPLICATE
    assert copy_threshold(np.append(distinct, [0.8] * 500), 50, 0.75) == pytest.approx(0.45)


def test_copy_rate_changed_copies_among_variants_are_found() -> None:
    """Half of the rows are families of six variants; changed copies are as distant as the most distant variants."""
    families, alone, new = (tiny_models.unit_rows(count, 24, seed=count) for count in (100, 500, 400))
    tones = tiny_models.unit(families[:, None] + 0.015 * np.random.default_rng(0).normal(size=(100, 6, 24)))
    stored = np.concatenate([tones.reshape(-1, 24), alone.astype(np.float32)])
    cosines = stored @ stored.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = cosines.max(axis=1)
    threshold = copy_threshold(nearest)
    copies = tiny_models.unit(stored + 0.03 * np.random.default_rng(1).normal(size=stored.shape))
    assert copy_rate((copies @ stored.T).max(axis=1), threshold) > 0.99
    assert copy_rate((new.astype(np.float32) @ stored.T).max(axis=1), threshold) == pytest.approx(0.05, abs=0.04)
    assert copy_rate(nearest, threshold) == pytest.approx((600 + 0.05 * 500) / 1_100, abs=0.01)


def test_diversity_is_mean_over_pairs_of_seeds() -> None:
    axes = np.eye(4, dtype=np.float32)
    same, different = np.stack([axes[0]] * 3), axes[:3]
    assert diversity(np.stack([same])) == pytest.approx(0)
    assert diversity(np.stack([different])) == pytest.approx(1)
    assert diversity(np.stack([same, different, different])) == pytest.approx(2 / 3)
    rows = tiny_models.unit_rows(20).astype(np.float32).reshape(4, 5, -1)
    pairs = [1 - rows[p, i] @ rows[p, j] for p in range(4) for i in range(5) for j in range(i)]
    assert diversity(rows) == pytest.approx(np.mean(pairs), abs=2e-3)  # float16 rows are not exactly of unit length
    with pytest.raises(ModelError, match="at least 2 seeds"):
        diversity(rows[:, :1])


def test_kernel_distance_equals_the_definition() -> None:
    first, second = (tiny_models.unit_rows(count, seed=count).astype(np.float32) for count in (5, 7))

    def kernel(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
        return float((1 + np.dot(a.astype(np.float64), b)) ** 3)

    def mean_of_pairs(rows: NDArray[np.float32]) -> float:
        return float(np.mean([kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]))

    across = np.mean([kernel(a, b) for a in first for b in second])
    expected = mean_of_pairs(first) + mean_of_pairs(second) - 2 * across
    assert kernel_distance(first, second) == pytest.approx(expected, abs=1e-9)


def test_kernel_distance_of_one_distribution_does_not_depend_on_the_count() -> None:
    rows = tiny_models.unit_rows(3_000).astype(np.float32)
    real = tiny_models.unit_rows(500, seed=1).astype(np.float32)
    small = [kernel_distance(rows[start : start + 20], real) for start in range(0, 3_000, 20)]
    assert abs(np.mean(small)) < 3 * np.std(small) / len(small) ** 0.5
    assert frechet_distance(rows[:20], real) > 3 * frechet_distance(rows[:500], real)


def test_kernel_distance_detects_a_collapse_to_few_images() -> None:
    rows = tiny_models.unit_rows(400).astype(np.float32)
    collapsed = np.repeat(rows[:10], 20, axis=0)
    assert kernel_distance(collapsed, rows) > 20 * abs(kernel_distance(rows[:200], rows[200:]))


def test_kernel_distance_of_one_image_raises() -> None:
    rows = tiny_models.unit_rows(3).astype(np.float32)
    with pytest.raises(ModelError, match="too few images for a KID: 1 and 3"):
        kernel_distance(rows[:1], rows)
