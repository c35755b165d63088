"""All rows compared on an accelerator: with the CPU in a GPU's place, and with a real one where there is one."""

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
    """Rows of which ``crowd`` score within 5e-4 of each other for the queries (3, D), among others."""
    rng = np.random.default_rng(0)
    frame = tiny_models.unit(rng.normal(size=(1, WIDTH)))
    frames = tiny_models.unit(frame + 3e-4 * rng.normal(size=(crowd, WIDTH)))
    rows = np.concatenate([tiny_models.unit_rows(500, WIDTH), frames.astype(np.float16)])
    queries = tiny_models.unit(frame + 0.02 * rng.normal(size=(3, WIDTH)))
    scores = frames @ queries.T
    assert np.ptp(scores, axis=0).max() < 5e-4
    return rows[rng.permutation(len(rows))], queries


def products_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.mm`` as it is on CUDA: float16 on both sides, summed in float32, rounded to what is asked for."""
    real = torch.mm

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype = torch.float16) -> Tensor:
        assert left.dtype == right.dtype == torch.float16
        return real(left.float(), right.float()).to(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)


def require_true_neighbours(database: Any, rows: NDArray[np.float16], queries: NDArray[np.float32]) -> None:
    order = np.argsort(-(queries.astype(np.float64) @ rows.astype(np.float64).T), axis=1)[:, :10]
    np.testing.assert_array_equal(database.search(queries, 10).ids, order)


@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
def test_a_crowd_of_near_copies_costs_no_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: torch.dtype
) -> None:
    rows, queries = near_copies(400)
    database = tiny_models.database(tmp_path, rows[:300], rows[300:]).to("cpu")
    assert isinstance(database.proposer, TorchBruteForce)
    database.proposer._parts = [part.to(kept) for part in database.proposer._parts]
    products_of_a_gpu(monkeypatch)
    require_true_neighbours(database, rows, queries)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_finds_the_neighbours_in_a_crowd(tmp_path: Path) -> None:
    rows, queries = near_copies(400)
    require_true_neighbours(tiny_models.database(tmp_path, rows[:300], rows[300:]).to("cuda"), rows, queries)
