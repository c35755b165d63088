from pathlib import Path

import numpy as np
import pytest
import tiny

from model.retrieval.recall import find_truth
from tasks.tune import _grown

WIDE = 16


def test_the_truth_of_a_version_that_grew_twice_is_that_of_all_its_rows(tmp_path: Path) -> None:
    rows, own = tiny.unit_rows(320, WIDE), np.arange(1)
    truth = find_truth([rows[:300]], rows[own].astype(np.float32), own=own, own_rows=rows[own])
    hidden, depth = np.zeros(0, np.int64), truth.ids.shape[1]
    for known, count in ((300, 310), (310, 320)):
        nearest = truth.ids[:, : depth // 2]
        hidden = np.setdiff1d(np.union1d(hidden, nearest[nearest >= 0]), own)
        database = tiny.database(tmp_path / str(count), rows[:count], hidden=hidden)

        truth = _grown(database, truth, known, hidden, np.zeros(0, np.int64))

        anew = find_truth([rows[:count]], truth.queries, own=own, own_rows=rows[own], hidden=hidden)
        np.testing.assert_array_equal(truth.ids[:, :10], anew.ids[:, :10])


@pytest.mark.parametrize("count", [300, 310])
def test_rows_that_are_shown_again_are_among_the_true_neighbours(tmp_path: Path, count: int) -> None:
    rows, own = tiny.unit_rows(count, WIDE), np.arange(4)
    whole = find_truth([rows[:300]], rows[own].astype(np.float32), own=own, own_rows=rows[own])
    hidden = np.setdiff1d(whole.ids[:, :6], own)
    known = find_truth([rows[:300]], whole.queries, own=own, own_rows=rows[own], hidden=hidden)
    shown, still = hidden[::2], hidden[1::2]
    database = tiny.database(tmp_path, rows, hidden=still)

    truth = _grown(database, known, 300, still, shown)

    anew = find_truth([rows], whole.queries, own=own, own_rows=rows[own], hidden=still)
    assert np.isin(shown, anew.ids[:, :10]).all()
    np.testing.assert_array_equal(truth.ids[:, :10], anew.ids[:, :10])
    assert truth.ids.shape == known.ids.shape
