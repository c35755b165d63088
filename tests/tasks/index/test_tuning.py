from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models

from model.retrieval.recall import exact_neighbours
from tasks.index.tuning import _choose_ids, _grown

WIDE = 16


def test_the_truth_of_a_version_that_grew_twice_is_that_of_all_its_rows(tmp_path: Path) -> None:
    rows, own = tiny_models.unit_rows(320, WIDE), np.arange(1)
    truth = exact_neighbours([rows[:300]], rows[own].astype(np.float32), own=own, own_rows=rows[own])
    hidden, depth = np.zeros(0, np.int64), truth.ids.shape[1]
    for known, count in ((300, 310), (310, 320)):
        nearest = truth.ids[:, : depth // 2]
        hidden = np.setdiff1d(np.union1d(hidden, nearest[nearest >= 0]), own)
        database = tiny_models.database(tmp_path / str(count), rows[:count], hidden=hidden)

        truth = _grown(database, truth, known, hidden, np.zeros(0, np.int64))

        anew = exact_neighbours([rows[:count]], truth.queries, own=own, own_rows=rows[own], hidden=hidden)
        np.testing.assert_array_equal(truth.ids[:, :10], anew.ids[:, :10])


@pytest.mark.parametrize("count", [300, 310])
def test_rows_that_are_shown_again_are_among_the_true_neighbours(tmp_path: Path, count: int) -> None:
    rows, own = tiny_models.unit_rows(count, WIDE), np.arange(4)
    whole = exact_neighbours([rows[:300]], rows[own].astype(np.float32), own=own, own_rows=rows[own])
    hidden = np.setdiff1d(whole.ids[:, :6], own)
    known = exact_neighbours([rows[:300]], whole.queries, own=own, own_rows=rows[own], hidden=hidden)
    shown, still = hidden[::2], hidden[1::2]
    database = tiny_models.database(tmp_path, rows, hidden=still)

    truth = _grown(database, known, 300, still, shown)

    anew = exact_neighbours([rows], whole.queries, own=own, own_rows=rows[own], hidden=still)
    assert np.isin(shown, anew.ids[:, :10]).all()
    np.testing.assert_array_equal(truth.ids[:, :10], anew.ids[:, :10])
    assert truth.ids.shape == known.ids.shape


@pytest.mark.parametrize("count", [20, 100, 150])
def test_queries_are_drawn_once_each_from_what_is_not_hidden(tmp_path: Path, count: int) -> None:
    hidden = np.arange(0, 300, 2)
    database = tiny_models.database(tmp_path, tiny_models.unit_rows(300), hidden=hidden)
    drawn = [_choose_ids(database, hidden, count, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    for ids in drawn:
        assert len(np.unique(ids)) == len(ids) == count
        assert (ids % 2 == 1).all()
        assert ids.max() < 300


def test_every_row_is_as_likely_to_be_drawn(tmp_path: Path) -> None:
    hidden = np.arange(20)
    database, rng = tiny_models.database(tmp_path, tiny_models.unit_rows(100), hidden=hidden), np.random.default_rng(0)
    times = np.bincount(np.concatenate([_choose_ids(database, hidden, 10, rng) for _ in range(4_000)]), minlength=100)
    assert times[:20].sum() == 0
    assert np.abs(times[20:] - 500).max() < 100, "500 each, give or take 21"


def test_few_queries_of_a_billion_rows_are_drawn_without_a_list_of_them() -> None:
    class Huge:
        stored = 10**9

        def __len__(self) -> int:
            return self.stored - 3

    database: Any = Huge()
    ids = _choose_ids(database, np.array([1, 2, 3]), 256, np.random.default_rng(0))
    assert len(np.unique(ids)) == 256
