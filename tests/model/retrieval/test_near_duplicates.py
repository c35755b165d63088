from pathlib import Path

import numpy as np
import pytest
from support import tiny_models

from model.retrieval import near_duplicates
from model.retrieval.near_duplicates import NEAREST, duplicates_to_hide, find_pairs


def near(row: np.ndarray, step: float) -> np.ndarray:
    return tiny_models.unit(row.astype(np.float32) + step * np.eye(len(row), dtype=np.float32)[0]).astype(np.float16)


def test_find_pairs_across_shards_returns_rows_above_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_BATCH", 33)
    rows = tiny_models.unit_rows(200)
    rows[150], rows[60] = rows[7], near(rows[20], 0.02)
    database = tiny_models.database(tmp_path, rows[:100], rows[100:])
    cosines = rows.astype(np.float32) @ rows.astype(np.float32).T
    expected = [(a, b) for a, b in np.argwhere(np.triu(cosines, 1) >= 0.999).tolist()]
    assert {(7, 150), (20, 60)} <= set(expected)
    assert [tuple(pair) for pair in find_pairs(database, rows, 0, 0.999).tolist()] == expected


def test_find_pairs_of_new_rows_returns_their_pairs(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(100)
    rows[90], rows[95] = rows[3], rows[91]
    pairs = find_pairs(tiny_models.database(tmp_path, rows[:80], rows[80:]), rows[80:], 80, 0.9999)
    assert pairs.tolist() == [[3, 90], [91, 95]]


@pytest.mark.parametrize("factory", ["IVF16,SQfp16", "IVF16,Flat", "IVF16_HNSW8,SQfp16"])
def test_find_pairs_by_cell_equals_by_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str) -> None:
    rows = tiny_models.unit_rows(2000, 32)
    rows[1500], rows[60], rows[700:705] = rows[7], near(rows[20], 0.02), rows[3]
    database = tiny_models.database(tmp_path, rows[:900], rows[900:], factory=factory, nprobe=3)
    monkeypatch.setattr(near_duplicates, "_BLOCK_SCORES", 1000)  # splits the visitors of a cell into several blocks
    by_cell = find_pairs(database, rows, 0, 0.999)
    assert {(7, 1500), (20, 60), (3, 700), (703, 704)} <= set(map(tuple, by_cell.tolist()))
    with monkeypatch.context() as patch:
        patch.setattr(near_duplicates, "_pairs_by_search", None)
        assert np.array_equal(find_pairs(database, rows, 0, 0.999), by_cell)
        assert find_pairs(database, rows[1400:], 1400, 0.999).tolist() == [[7, 1500]]
    monkeypatch.setattr(near_duplicates, "_pairs_by_cell", None)
    monkeypatch.setattr(near_duplicates, "_VISITORS", 10**6)
    assert np.array_equal(find_pairs(database, rows, 0, 0.999), by_cell)


def test_find_pairs_large_group_stays_connected(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(600, 32)
    rows[40:80] = rows[5]
    database = tiny_models.database(tmp_path, rows[:50], rows[50:], factory="IVF4,SQfp16", nprobe=1)
    pairs = find_pairs(database, rows, 0, 0.999)
    assert duplicates_to_hide(pairs).tolist() == list(range(40, 80))
    assert len(pairs) <= 41 * NEAREST
    others = pairs[(pairs != 5).all(axis=1) & ((pairs < 40) | (pairs > 52)).all(axis=1)]  # taken down
    assert duplicates_to_hide(others).tolist() == list(range(54, 80))


def test_duplicates_to_hide_keeps_lowest_id_of_group() -> None:
    pairs = np.array([[2, 9], [5, 9], [7, 8], [5, 11]])
    assert duplicates_to_hide(pairs).tolist() == [5, 8, 9, 11]
    assert duplicates_to_hide(np.zeros((0, 2), np.int64)).tolist() == []
