import numpy as np
import pytest
import tiny
from numpy.typing import NDArray

from model.errors import ModelError
from model.metrics import clip_score, frechet_distance


def gaussian(
    mean: list[float], covariance: NDArray[np.float64], *, seed: int = 0, count: int = 500
) -> NDArray[np.float32]:
    """Rows (count, D) with exactly this mean and covariance."""
    rows = np.random.default_rng(seed).normal(size=(count, len(mean)))
    rows -= rows.mean(axis=0)
    whitened = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return (whitened @ np.linalg.cholesky(covariance).T + mean).astype(np.float32)


def test_identical_sets_are_at_no_distance() -> None:
    rows = tiny.unit_rows(50).astype(np.float32)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(rows, rows[::-1]) == pytest.approx(0, abs=1e-9)


def test_a_shift_counts_squared() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    shift = np.array([1.0, -2.0, 0.0, 0.5], np.float32)
    assert frechet_distance(rows, rows + shift) == pytest.approx(1 + 4 + 0.25, rel=1e-5)


def test_diagonal_covariances_differ_by_their_standard_deviations() -> None:
    first = gaussian([0, 0, 0], np.diag([1.0, 4.0, 9.0]))
    second = gaussian([1, 0, 0], np.diag([4.0, 4.0, 0.25]), seed=1)
    assert frechet_distance(first, second) == pytest.approx(1 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2, rel=1e-4)


def test_covariances_that_do_not_commute() -> None:
    first, second = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])
    product = first @ second
    # For 2 × 2: tr √M = √(tr M + 2 √det M).
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(first) + np.trace(second) - 2 * cross
    rows = gaussian([0, 0], first), gaussian([0, 0], second, seed=1)
    assert frechet_distance(*rows) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(*reversed(rows)) == pytest.approx(expected, rel=1e-4)


def test_large_samples_of_known_gaussians() -> None:
    draw = np.random.default_rng(0).normal
    first = draw(size=(50_000, 3)).astype(np.float32)
    second = (draw(size=(40_000, 3)) * [1, 2, 3] + [0, 0, 1]).astype(np.float32)
    assert frechet_distance(first, second) == pytest.approx(1 + 0 + 1 + 4, abs=0.1)


def test_few_rows_of_many_dimensions_have_a_distance_all_the_same() -> None:
    near, far = tiny.unit_rows(5, 64).astype(np.float32), tiny.unit_rows(7, 64, seed=1).astype(np.float32)
    assert frechet_distance(near, near) == pytest.approx(0, abs=1e-6)
    slightly = tiny.unit(near + 0.01 * tiny.unit_rows(5, 64, seed=2))
    assert 0 < frechet_distance(near, slightly) < 0.01 < frechet_distance(near, far) < 4


@pytest.mark.parametrize(("first", "second"), [(1, 5), (5, 1), (0, 5)])
def test_one_picture_has_no_distribution(first: int, second: int) -> None:
    with pytest.raises(ModelError, match="at least two"):
        frechet_distance(tiny.unit_rows(first).astype(np.float32), tiny.unit_rows(second).astype(np.float32))


def test_the_clip_score_is_the_mean_cosine_of_pairs() -> None:
    axes = np.eye(4, dtype=np.float32)
    diagonal = np.full(4, 0.5, np.float32)
    pairs = np.stack([axes[0], axes[1], axes[2]]), np.stack([axes[0], -axes[1], diagonal])
    assert clip_score(*pairs) == pytest.approx((1 - 1 + 0.5) / 3)
    rows = tiny.unit_rows(9).astype(np.float32)
    assert clip_score(rows, rows) == pytest.approx(1, abs=1e-3)
    assert clip_score(rows, rows[::-1]) < 0.9


def test_pictures_and_texts_must_pair_up() -> None:
    with pytest.raises(ModelError, match=r"\(3, 8\) pictures and \(2, 8\) texts"):
        clip_score(tiny.unit_rows(3).astype(np.float32), tiny.unit_rows(2).astype(np.float32))
