from pathlib import Path

import numpy as np
import pytest
from support import tiny_models

from model.retrieval.database import Database
from model.retrieval.index_files import fill_shard
from model.retrieval.recall import brute_force, exact_neighbours, recall


def recall_at_k(
    database: Database, rows: np.ndarray, queries: np.ndarray, k: int, exclude: np.ndarray | None = None
) -> float:
    own = None if exclude is None else rows[exclude]
    return recall(database, exact_neighbours([rows[:33], rows[33:]], queries, own=exclude, own_rows=own), k)


@pytest.mark.parametrize("exclude", [None, np.arange(12)])
def test_recall_exact_database_is_one(tmp_path: Path, exclude: np.ndarray | None) -> None:
    rows = tiny_models.unit_rows(200)
    rows[150] = rows[0]
    database = tiny_models.database(tmp_path, rows[:80], rows[80:])
    assert recall_at_k(database, rows, rows[:12].astype(np.float32), k=10, exclude=exclude) == 1.0


def test_recall_index_without_some_rows_is_share_found(tmp_path: Path) -> None:
    rows, queries = tiny_models.unit_rows(200), tiny_models.unit_rows(25, seed=1).astype(np.float32)
    truth = np.argsort(-queries @ rows.astype(np.float32).T, axis=1)[:, :10]
    files = tiny_models.shard_files(tmp_path, rows)
    damaged = rows.copy()
    damaged[120:] = 0  # the index lacks the last 80 rows
    fill_shard(tmp_path / "quantizer.faiss", [damaged], files[0].index)

    value = recall_at_k(Database(files, encoder=tiny_models.identity()), rows, queries, k=10)

    assert value == pytest.approx((truth < 120).mean())
    assert 0.4 < value < 0.8


def test_recall_decreases_with_fewer_cells(tmp_path: Path) -> None:
    rows, queries = tiny_models.unit_rows(600), tiny_models.unit_rows(30, seed=1).astype(np.float32)
    recalls = [
        recall_at_k(tiny_models.database(tmp_path / str(n), rows, factory="IVF8,Flat", nprobe=n), rows, queries, k=10)
        for n in (1, 3, 8)
    ]
    assert recalls[0] < recalls[1] < recalls[2] == 1.0


def test_recall_k_above_rows_is_one(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(4)
    database, queries = tiny_models.database(tmp_path, rows), rows.astype(np.float32)
    assert recall_at_k(database, rows, queries, k=10) == 1.0
    assert recall_at_k(database, rows, queries, k=10, exclude=np.arange(4)) == 1.0
    assert recall_at_k(database, rows, queries[:0], k=10) == 1.0


def test_brute_force_equals_sorted_cosines() -> None:
    rows, queries = tiny_models.unit_rows(300), tiny_models.unit_rows(9, seed=1).astype(np.float32)
    expected = np.argsort(-queries.astype(np.float64) @ rows.astype(np.float64).T, axis=1)[:, :7]
    np.testing.assert_array_equal(brute_force(rows, queries, 7), expected)


def test_brute_force_exclude_leaves_out_row_and_copies() -> None:
    rows = tiny_models.unit_rows(50)
    rows[[20, 40]] = rows[2]
    own = np.array([2, 7])
    scores = rows[own].astype(np.float64) @ rows.astype(np.float64).T
    scores[0, [2, 20, 40]] = scores[1, 7] = -np.inf
    found = brute_force(rows, rows[own].astype(np.float32), 5, exclude=own)
    np.testing.assert_array_equal(found, np.argsort(-scores, axis=1)[:, :5])


def test_brute_force_several_blocks_equals_sorted_cosines() -> None:
    rows = tiny_models.unit_rows(70_000, 4)
    queries = tiny_models.unit_rows(3, 4, seed=1)
    rows[[66_000, 123, 69_999]] = queries[0]  # equal rows on both sides of the block boundary
    found = brute_force(rows, queries.astype(np.float32), 20)
    assert found[0, :3].tolist() == [123, 66_000, 69_999]
    scores = queries.astype(np.float32) @ rows.astype(np.float32).T
    best = np.take_along_axis(scores, found, axis=1)
    np.testing.assert_allclose(best, -np.sort(-scores, axis=1)[:, :20], atol=1e-6)

    others = brute_force(rows, queries[:1].astype(np.float32), 20, exclude=np.array([123]))
    assert not {123, 66_000, 69_999} & set(others[0].tolist())
