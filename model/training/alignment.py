"""A picture's first neighbour laid over it, so that a region of one fits into the other (Sheynin et al., manipulation).

Legend: ``N`` pictures, ``M`` database pictures, ``K`` neighbours, ``S`` side.

The alignment is OpenCV's ECC (Evangelidis & Psarakis 2008) on grey pictures: an affine motion first, a Euclidean one
where that fails, and the neighbour as it stands where neither helps. A motion helps when it stays within sane bounds
and the pictures correlate better after it than before.
"""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from numpy.typing import NDArray

from model.errors import ModelError

Pixels = NDArray[np.uint8]

MOTIONS = (cv2.MOTION_AFFINE, cv2.MOTION_EUCLIDEAN)
MAX_STRETCH = 1.7
"""Most that a sane motion scales any direction up, or (by its inverse) down."""
MAX_SHIFT = 1 / 3
"""Farthest that a sane motion moves the picture's centre, as a share of its side."""
ITERATIONS, TOLERANCE, BLUR = 50, 1e-4, 5
MIN_DIFFERENCE = 2.0
"""Mean grey levels by which a neighbour must differ to be no copy of the picture."""


@dataclasses.dataclass(frozen=True, slots=True)
class Aligned:
    """References (N, S, S, 3) uint8, one a picture, and the share of them that a motion helped."""

    pixels: Pixels
    converged: float


def align_neighbour(picture: Pixels, neighbour: Pixels) -> tuple[Pixels, bool]:
    """The neighbour moved onto the picture.

    Args:
        picture: (S, S, 3) uint8, stays where it is.
        neighbour: (S, S, 3) uint8. Past its edge lies the background that its rim shows.

    Returns:
        (S, S, 3) uint8, and whether a motion helped; False comes with the neighbour as it was.

    Raises:
        ModelError: the two are not of one shape.
    """
    if picture.shape != neighbour.shape or picture.ndim != 3 or picture.shape[2] != 3:
        raise ModelError(
            f"picture {picture.shape} and neighbour {neighbour.shape} must be of one shape (S, S, 3); resize them first"
        )
    still, moving = _grey(picture), _grey(neighbour)
    before = correlation(still, moving)
    for motion in MOTIONS:
        warp = _estimate(still, moving, motion)
        if warp is None or not is_plausible(warp, len(picture)):
            continue
        moved = _warp(neighbour, warp)
        if correlation(still, _grey(moved)) > before:
            return moved, True
    return neighbour.copy(), False


def align_all(
    pixels: Pixels, neighbours: NDArray[np.int64], *, database_pixels: Pixels | None = None, workers: int | None = None
) -> Aligned:
    """The reference of each picture: its first neighbour that is no copy of it, aligned. About 1.5 ms and core a pair.

    Args:
        pixels: (N, S, S, 3) uint8.
        neighbours: (N, K) rows of ``database_pixels``, nearest first.
        database_pixels: (M, S, S, 3) uint8; None when the pictures are their own database.
        workers: threads; None takes every core.

    Raises:
        ModelError: the parts do not belong together.
    """
    candidates = pixels if database_pixels is None else database_pixels
    if len(pixels) != len(neighbours) or not len(pixels):
        raise ModelError(f"{len(pixels)} pictures and {len(neighbours)} neighbour lists; search the neighbours again")
    if neighbours.min() < 0 or neighbours.max() >= len(candidates):
        raise ModelError("the neighbours point past the database's pictures; give the pictures they were searched in")
    aligned = np.empty_like(pixels)

    def align(rows: Sequence[int]) -> int:
        helped = 0
        for row in rows:
            chosen = first_distinct(pixels[row], candidates, neighbours[row])
            aligned[row], converged = align_neighbour(pixels[row], candidates[chosen])
            helped += converged
        return helped

    parts = [range(start, min(start + 64, len(pixels))) for start in range(0, len(pixels), 64)]
    inner = cv2.getNumThreads()
    cv2.setNumThreads(1)  # pictures of this size are slower on OpenCV's own threads
    try:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            converged = sum(pool.map(align, parts))
    finally:
        cv2.setNumThreads(inner)
    return Aligned(aligned, converged / len(pixels))


def first_distinct(picture: Pixels, candidates: Pixels, neighbours: NDArray[np.int64]) -> int:
    """The first of the neighbours (K,) that is no copy of the picture: pasting a copy would teach nothing."""
    for row in neighbours:
        if np.abs(picture.astype(np.int16) - candidates[row]).mean() >= MIN_DIFFERENCE:
            return int(row)
    return int(neighbours[0])


def correlation(first: Pixels, second: Pixels) -> float:
    """Pearson's correlation of two grey pictures (S, S); 0 where one is flat."""
    first_centred, second_centred = first - first.mean(), second - second.mean()
    length = float(np.linalg.norm(first_centred) * np.linalg.norm(second_centred))
    return float((first_centred * second_centred).sum()) / length if length else 0.0


def is_plausible(warp: NDArray[np.float32], side: int) -> bool:
    """Whether the motion (2, 3) neither mirrors, nor crushes, nor throws the picture out of its frame."""
    if not np.isfinite(warp).all() or np.linalg.det(warp[:, :2]) <= 0:
        return False
    stretch = np.linalg.svd(warp[:, :2], compute_uv=False)
    centre = np.full(2, (side - 1) / 2)
    shift = np.abs(warp[:, :2] @ centre + warp[:, 2] - centre).max()
    return bool(stretch.max() <= MAX_STRETCH and stretch.min() >= 1 / MAX_STRETCH and shift <= MAX_SHIFT * side)


def _grey(picture: Pixels) -> Pixels:
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def _estimate(still: Pixels, moving: Pixels, motion: int) -> NDArray[np.float32] | None:
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, ITERATIONS, TOLERANCE)
    start, everywhere = np.eye(2, 3, dtype=np.float32), np.full_like(still, 1)
    try:
        _, warp = cv2.findTransformECC(still, moving, start, motion, criteria, everywhere, BLUR)
    except cv2.error:  # it did not converge, or a picture is flat
        return None
    return np.asarray(warp, dtype=np.float32)


def _warp(picture: Pixels, warp: NDArray[np.float32]) -> Pixels:
    """The picture moved; its background, the middle colour of its rim, fills what comes into view."""
    rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    background = np.median(rim, axis=0).tolist()
    size, flags = (picture.shape[1], picture.shape[0]), cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(picture, warp, size, flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=background)
    return np.asarray(moved, dtype=np.uint8)
