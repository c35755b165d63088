"""Brute-force search on an accelerator: simulated on the CPU, and on a real GPU if there is one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import tiny_models
from torch import Tensor

from model.retrieval.brute_force import TorchBruteForce

WIDTH = 64


def near_copies(crowd: int) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Return rows and queries (3, D); ``crowd`` of the rows have cosines within 5e-4 of each other."""
    rng = np.random.default_rng(0)
    frame = tiny_models.unit(rng.normal(size=(1, WIDTH)))
    frames = tiny_models.unit(frame + 3e-4 * rng.normal(size=(crowd, WIDTH)))
    rows = np.concatenate([tiny_models.unit_rows(500, WIDTH), frames.astype(np.float16)])
    queries = tiny_models.unit(frame + 0.02 * rng.normal(size=(3, WIDTH)))
    scores = frames @ queries.T
    assert np.ptp(scores, axis=0).max() < 5e-4
    return rows[rng.permutation(len(rows))], queries


def patch_cuda_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch ``torch.mm`` to behave as on CUDA: float16 inputs, float32 sums, rounded to ``out_dtype``."""
    real = torch.mm

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype = torch.float16) -> Tensor:
        assert left.dtype == right.dtype == torch.float16
        return real(left.float(), right.float()).to(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)


def require_true_neighbours(database: Any, rows: NDArray[np.float16], queries: NDArray[np.float32]) -> None:
    order = np.argsort(-(queries.astype(np.float64) @ rows.astype(np.float64).T), axis=1)[:, :10]
    np.testing.assert_array_equal(database.search(queries, 10).ids, order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_brute_force_many_near_copies_finds_true_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    rows, queries = near_copies(400)
    database = tiny_models.database(tmp_path, rows[:300], rows[300:]).to("cpu")
    assert isinstance(database.candidate_search, TorchBruteForce)
    database.candidate_search._parts = [part.to(dtype) for part in database.candidate_search._parts]
    patch_cuda_products(monkeypatch)
    require_true_neighbours(database, rows, queries)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_brute_force_on_gpu_with_near_copies_finds_true_neighbours(tmp_path: Path) -> None:
    rows, queries = near_copies(400)
    require_true_neighbours(tiny_models.database(tmp_path, rows[:300], rows[300:]).to("cuda"), rows, queries)
