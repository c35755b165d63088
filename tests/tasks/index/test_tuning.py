"""Choice of queries, and extension of their true neighbours to new rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models

from model.retrieval.recall import exact_neighbours
from tasks.index.tuning import _choose_ids, _extend_truth

WIDE = 16


def test_extend_truth_twice_equals_exact_search(tmp_path: Path) -> None:
    rows, own = tiny_models.unit_rows(320, WIDE), np.arange(1)
    truth = exact_neighbours([rows[:300]], rows[own].astype(np.float32), own=own, own_rows=rows[own])
    hidden, depth = np.zeros(0, np.int64), truth.ids.shape[1]
    for first_rows, count in ((300, 310), (310, 320)):
        nearest = truth.ids[:, : depth // 2]
        hidden = np.setdiff1d(np.union1d(hidden, nearest[nearest >= 0]), own)
        database = tiny_models.database(tmp_path / str(count), rows[:count], hidden=hidden)

        truth = _extend_truth(database, truth, first_rows, hidden, np.zeros(0, np.int64))

        expected = exact_neighbours([rows[:count]], truth.queries, own=own, own_rows=rows[own], hidden=hidden)
        np.testing.assert_array_equal(truth.ids[:, :10], expected.ids[:, :10])


@pytest.mark.parametrize("count", [300, 310])
def test_extend_truth_includes_rows_shown_again(tmp_path: Path, count: int) -> None:
    rows, own = tiny_models.unit_rows(count, WIDE), np.arange(4)
    whole = exact_neighbours([rows[:300]], rows[own].astype(np.float32), own=own, own_rows=rows[own])
    hidden = np.setdiff1d(whole.ids[:, :6], own)
    before = exact_neighbours([rows[:300]], whole.queries, own=own, own_rows=rows[own], hidden=hidden)
    shown, still_hidden = hidden[::2], hidden[1::2]
    database = tiny_models.database(tmp_path, rows, hidden=still_hidden)

    truth = _extend_truth(database, before, 300, still_hidden, shown)

    expected = exact_neighbours([rows], whole.queries, own=own, own_rows=rows[own], hidden=still_hidden)
    assert np.isin(shown, expected.ids[:, :10]).all()
    np.testing.assert_array_equal(truth.ids[:, :10], expected.ids[:, :10])
    assert truth.ids.shape == before.ids.shape


@pytest.mark.parametrize("count", [20, 100, 150])
def test_choose_ids_returns_distinct_visible_rows(tmp_path: Path, count: int) -> None:
    hidden = np.arange(0, 300, 2)
    database = tiny_models.database(tmp_path, tiny_models.unit_rows(300), hidden=hidden)
    chosen = [_choose_ids(database, hidden, count, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(chosen[0], chosen[1])
    assert (chosen[0] != chosen[2]).any()
    for ids in chosen:
        assert len(np.unique(ids)) == len(ids) == count
        assert (ids % 2 == 1).all()
        assert ids.max() < 300


def test_choose_ids_is_uniform(tmp_path: Path) -> None:
    hidden = np.arange(20)
    database, rng = tiny_models.database(tmp_path, tiny_models.unit_rows(100), hidden=hidden), np.random.default_rng(0)
    counts = np.bincount(np.concatenate([_choose_ids(database, hidden, 10, rng) for _ in range(4_000)]), minlength=100)
    assert counts[:20].sum() == 0
    assert np.abs(counts[20:] - 500).max() < 100, "expected 500 each, with a standard deviation of 21"


def test_choose_ids_of_billion_rows_does_not_list_all_ids() -> None:
    class Huge:
        stored = 10**9

        def __len__(self) -> int:
            return self.stored - 3

    database: Any = Huge()
    ids = _choose_ids(database, np.array([1, 2, 3]), 256, np.random.default_rng(0))
    assert len(np.unique(ids)) == 256
