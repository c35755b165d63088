from pathlib import Path

import numpy as np
import tiny

from model.retrieval.duplicates import find_pairs, later_ones


def near(row: np.ndarray, step: float) -> np.ndarray:
    return tiny.unit(row.astype(np.float32) + step * np.eye(tiny.WIDTH, dtype=np.float32)[0]).astype(np.float16)


def test_rows_above_the_bound_are_paired_whichever_shard_they_are_in(tmp_path: Path) -> None:
    rows = tiny.unit_rows(200)
    rows[150], rows[60] = rows[7], near(rows[20], 0.02)
    database = tiny.database(tmp_path, rows[:100], rows[100:])
    cosines = rows.astype(np.float32) @ rows.astype(np.float32).T
    expected = [(a, b) for a, b in np.argwhere(np.triu(cosines, 1) >= 0.999).tolist()]
    assert {(7, 150), (20, 60)} <= set(expected)
    assert [tuple(pair) for pair in find_pairs(database, rows, 0, 0.999, batch=33).tolist()] == expected


def test_only_new_rows_need_be_asked_about(tmp_path: Path) -> None:
    rows = tiny.unit_rows(100)
    rows[90], rows[95] = rows[3], rows[91]
    pairs = find_pairs(tiny.database(tmp_path, rows[:80], rows[80:]), rows[80:], 80, 0.9999)
    assert pairs.tolist() == [[3, 90], [91, 95]]


def test_one_of_each_group_is_kept_the_first() -> None:
    pairs = np.array([[2, 9], [5, 9], [7, 8], [5, 11]])
    assert later_ones(pairs).tolist() == [5, 8, 9, 11]
    assert later_ones(np.zeros((0, 2), np.int64)).tolist() == []
