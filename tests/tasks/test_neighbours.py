"""The neighbours of a set in a database."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from made_rows import build, stored

from infra import artifacts
from tasks.neighbours import find_neighbours

pytestmark = pytest.mark.usefixtures("alone")


def test_a_row_is_not_its_own_neighbour_wherever_the_database_has_it_from(tmp_path: Path) -> None:
    rows = tiny.unit_rows(600)
    ours = stored(tmp_path / "ours", np.split(rows[:300], 3))
    elsewhere = np.concatenate([rows[300:], rows[100:200][::-1]])
    database = build(stored(tmp_path / "theirs", np.split(elsewhere, 4)), tmp_path / "theirs")
    found = find_neighbours(ours, database, str(tmp_path / "ours"), 5, cache=tmp_path / "cache").reference
    for shard, theirs in zip(found.manifest().shards, np.split(rows[:300], 3), strict=True):
        neighbours = elsewhere[np.load(artifacts.fetch_shard(found.uri, shard, ".npy", tmp_path / "cache"))]
        assert neighbours.shape == (100, 5, tiny.WIDTH)
        assert not (neighbours == theirs[:, None]).all(axis=2).any()
