"""Database reads of an evaluation: random rows and URLs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models

from model.retrieval.database import Database
from tasks.evaluate.measure import random_rows, urls_of

HIDDEN = np.array([0, 7, 30])


def test_random_rows_returns_distinct_visible_rows(tmp_path: Path) -> None:
    database = tiny_models.database(tmp_path, tiny_models.unit_rows(40), hidden=HIDDEN)
    ids = random_rows(database, 100, seed=0)
    assert sorted(ids) == sorted(set(range(40)) - set(HIDDEN.tolist()))
    few = random_rows(database, 9, seed=0)
    assert len(set(few.tolist()) - set(HIDDEN.tolist())) == 9
    assert (few == random_rows(database, 9, seed=0)).all()
    assert (few != random_rows(database, 9, seed=1)).any()


def test_random_rows_without_hidden_rows_does_not_list_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = tiny_models.database(tmp_path, tiny_models.unit_rows(40))
    monkeypatch.setattr(Database, "ids", None)
    assert len(set(random_rows(database, 9, seed=0).tolist())) == 9


def test_urls_of_reads_metadata_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_sizes = []

    def describe(ids: Sequence[int]) -> list[dict[str, Any]]:
        batch_sizes.append(len(ids))
        return [{"url": f"http://x/{row}"} for row in ids]

    monkeypatch.setattr("tasks.evaluate.measure._DESCRIBED_ROWS", 16)
    database = tiny_models.database(tmp_path, tiny_models.unit_rows(40), hidden=HIDDEN, describe=describe)
    assert dict(urls_of(database)) == {row: f"http://x/{row}" for row in range(40) if row not in HIDDEN}
    assert batch_sizes == [16, 16, 5]
