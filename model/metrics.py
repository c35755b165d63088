"""How well pictures fit their prompts and their domain, measured on embeddings.

Legend: ``N`` pictures, ``D`` embedding width. All rows are unit vectors of one encoder.
"""

import numpy as np
from numpy.typing import NDArray

from model.errors import ModelError

Rows = NDArray[np.float32]


def clip_score(images: Rows, texts: Rows) -> float:
    """Mean cosine between picture i and text i, both (N, D): in [−1, 1], higher is better."""
    if images.shape != texts.shape:
        raise ModelError(f"{images.shape} pictures and {texts.shape} texts do not pair up")
    return float(np.einsum("nd,nd->n", images, texts, dtype=np.float64).mean())


def frechet_distance(first: Rows, second: Rows) -> float:
    """Fréchet distance between Gaussians fitted to two sets (N, D) and (M, D): at least 0, lower is closer.

    ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½)   (Heusel et al. 1706.08500, eq. 6, on CLIP instead of Inception features).
    The estimate is biased upwards for few rows, so only distances of equally many rows compare.
    """
    if min(len(first), len(second)) < 2:
        raise ModelError("a Fréchet distance needs at least two pictures on each side")
    (mean_1, cov_1), (mean_2, cov_2) = _gaussian(first), _gaussian(second)
    # tr (Σ₁Σ₂)^½ = Σ √λ(Σ₁^½ Σ₂ Σ₁^½), a symmetric matrix: stable where few rows leave the covariances singular.
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_2 @ root).clip(min=0)).sum()
    distance = np.square(mean_1 - mean_2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * cross
    return float(max(distance, 0.0))


def _gaussian(rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    wide = rows.astype(np.float64)
    return wide.mean(axis=0), np.cov(wide, rowvar=False)
