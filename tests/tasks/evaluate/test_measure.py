"""What an evaluation takes from a database: no more than it needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models

from model.retrieval.database import Database
from tasks.evaluate.measure import random_rows, urls_of

HIDDEN = np.array([0, 7, 30])


def test_random_rows_are_different_and_none_is_hidden(tmp_path: Path) -> None:
    database = tiny_models.database(tmp_path, tiny_models.unit_rows(40), hidden=HIDDEN)
    ids = random_rows(database, 100, seed=0)
    assert sorted(ids) == sorted(set(range(40)) - set(HIDDEN.tolist()))
    few = random_rows(database, 9, seed=0)
    assert len(set(few.tolist()) - set(HIDDEN.tolist())) == 9
    assert (few == random_rows(database, 9, seed=0)).all()
    assert (few != random_rows(database, 9, seed=1)).any()


def test_where_nothing_is_hidden_a_few_rows_are_drawn_without_a_list_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tiny_models.database(tmp_path, tiny_models.unit_rows(40))
    monkeypatch.setattr(Database, "ids", None)
    assert len(set(random_rows(database, 9, seed=0).tolist())) == 9


def test_urls_are_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def describe(ids: Sequence[int]) -> list[dict[str, Any]]:
        asked.append(len(ids))
        return [{"url": f"http://x/{row}"} for row in ids]

    monkeypatch.setattr("tasks.evaluate.measure._DESCRIBED_ROWS", 16)
    database = tiny_models.database(tmp_path, tiny_models.unit_rows(40), hidden=HIDDEN, describe=describe)
    assert dict(urls_of(database)) == {row: f"http://x/{row}" for row in range(40) if row not in HIDDEN}
    assert asked == [16, 16, 5]
