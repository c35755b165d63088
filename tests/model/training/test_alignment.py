from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from model.errors import ModelError
from model.training import alignment
from model.training.alignment import align_all, align_neighbour, correlation, first_distinct, is_plausible

SIDE = 64
IDENTITY = np.eye(2, 3, dtype=np.float32)


def drawing() -> NDArray[np.uint8]:
    """Return a house with a sun on white, without symmetries that would make motions ambiguous."""
    canvas = np.full((SIDE, SIDE, 3), 255, np.uint8)
    cv2.rectangle(canvas, (18, 30), (42, 50), (200, 60, 40), -1)
    cv2.fillPoly(canvas, [np.array([[14, 30], [30, 14], [46, 30]], np.int32)], (60, 40, 160))
    cv2.circle(canvas, (50, 16), 5, (240, 200, 0), -1)
    return canvas


def moved(
    image: NDArray[np.uint8], *, degrees: float = 0.0, scale: float = 1.0, shift: tuple[float, float] = (0, 0)
) -> NDArray[np.uint8]:
    motion = cv2.getRotationMatrix2D((31.5, 31.5), degrees, scale)
    motion[:, 2] += shift
    return cv2.warpAffine(image, motion, (SIDE, SIDE), borderValue=(255, 255, 255))


def error(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(int) - other).mean())


@pytest.mark.parametrize(
    "motion",
    [{"shift": (5, -3)}, {"degrees": 12}, {"degrees": -8, "scale": 1.15, "shift": (2, 3)}],
    ids=["shift", "rotation", "all"],
)
def test_align_neighbour_reverts_a_known_motion(motion: dict[str, Any]) -> None:
    image = drawing()
    neighbour = moved(image, **motion)
    assert error(image, neighbour) > 8
    aligned, converged = align_neighbour(image, neighbour)
    assert converged
    assert (aligned.shape, aligned.dtype) == (image.shape, np.uint8)
    assert error(image, aligned) < 2.5


def test_align_neighbour_fills_the_outside_with_the_background_of_the_neighbour() -> None:
    image = np.where(drawing() == 255, 90, drawing()).astype(np.uint8)
    neighbour = np.roll(image, 9, axis=1)
    aligned, converged = align_neighbour(image, neighbour)
    assert converged
    assert aligned[:, -4:].min() > 85, "neither black nor the colours at the edge"
    assert aligned[:, -4:].max() < 95


def test_align_neighbour_constant_image_returns_a_copy_of_the_neighbour() -> None:
    neighbour = drawing()
    for flat in (np.full_like(neighbour, 255), np.zeros_like(neighbour)):
        aligned, converged = align_neighbour(flat, neighbour)
        assert not converged
        np.testing.assert_array_equal(aligned, neighbour)
        assert aligned is not neighbour


def test_align_neighbour_motion_out_of_the_frame_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    far = np.float32([[1, 0, 40], [0, 1, 0]])
    monkeypatch.setattr(alignment, "_estimate", lambda *_: far)
    aligned, converged = align_neighbour(drawing(), moved(drawing(), shift=(40, 0)))
    assert not converged
    np.testing.assert_array_equal(aligned, moved(drawing(), shift=(40, 0)))


def test_align_neighbour_motion_that_lowers_the_correlation_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "_estimate", lambda *_: np.float32([[1, 0, 6], [0, 1, 6]]))
    assert not align_neighbour(drawing(), drawing())[1]


def test_align_neighbour_tries_a_euclidean_motion_after_an_affine_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = np.float32([[1, 0, 5], [0, 1, 0]])
    monkeypatch.setattr(alignment, "_estimate", lambda a, b, motion: right if motion == cv2.MOTION_EUCLIDEAN else None)
    aligned, converged = align_neighbour(drawing(), moved(drawing(), shift=(5, 0)))
    assert converged
    assert error(drawing(), aligned) < 0.5


@pytest.mark.parametrize(
    ("warp", "plausible"),
    [
        (IDENTITY, True),
        (IDENTITY * 1.6, True),
        (IDENTITY * 1.8, False),
        (IDENTITY * 0.5, False),
        (np.float32([[-1, 0, 63], [0, 1, 0]]), False),
        (np.float32([[1, 0, 20], [0, 1, -20]]), True),
        (np.float32([[1, 0, 0], [0, 1, 22]]), False),
        (np.float32([[1, 0, np.nan], [0, 1, 0]]), False),
    ],
)
def test_is_plausible_bounds(warp: NDArray[np.float32], plausible: bool) -> None:
    if warp[0, 0] not in (1, -1):  # scale around the centre
        warp = warp.copy()
        warp[:, 2] = 31.5 - warp[:, :2] @ [31.5, 31.5]
    assert is_plausible(warp, SIDE) is plausible


def test_correlation_known_images() -> None:
    ramp = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert correlation(ramp, ramp * 3) == pytest.approx(1)
    assert correlation(ramp, 15 - ramp) == pytest.approx(-1)
    assert correlation(ramp, np.full_like(ramp, 7)) == 0


def test_first_distinct_skips_copies() -> None:
    image, other = drawing(), moved(drawing(), degrees=20)
    almost = image.copy()
    almost[0, 0] = 0
    candidates = np.stack([image, almost, other])
    assert first_distinct(image, candidates, np.array([0, 1, 2])) == 2
    assert first_distinct(image, candidates, np.array([1, 0])) == 1, "if all are copies, the nearest"


def test_align_all_equals_aligning_each_image() -> None:
    pixels = np.stack([moved(drawing(), degrees=3 * turn) for turn in range(70)])
    neighbours = np.stack([(np.arange(70) + 1) % 70, (np.arange(70) + 2) % 70], axis=1)
    before = cv2.getNumThreads()
    together = align_all(pixels, neighbours, workers=2)
    alone = [align_neighbour(pixels[row], pixels[(row + 1) % 70]) for row in range(70)]
    np.testing.assert_array_equal(together.pixels, np.stack([aligned for aligned, _ in alone]))
    assert together.converged == np.mean([converged for _, converged in alone])
    assert together.converged > 0.9
    assert cv2.getNumThreads() == before
    reversed_database = align_all(pixels[:3], 69 - neighbours[:3], database_pixels=pixels[::-1], workers=1)
    np.testing.assert_array_equal(reversed_database.pixels, together.pixels[:3])


def test_alignment_inconsistent_inputs_raise() -> None:
    pixels = np.stack([drawing()] * 2)
    with pytest.raises(ModelError, match=r"differ in shape.*resize"):
        align_neighbour(drawing(), drawing()[:32])
    with pytest.raises(ModelError, match="differ or are 0: 2, 1"):
        align_all(pixels, np.array([[1]]))
    with pytest.raises(ModelError, match="neighbour ids are out of range"):
        align_all(pixels, np.array([[1], [2]]))
