"""Tests of the neighbours stage."""

from pathlib import Path

import numpy as np
import pytest
from support import tiny_models
from support.embedding_rows import build, stored, without

from infra import artifacts
from infra.errors import InputError
from tasks.neighbours import find_neighbours
from tasks.references.domain_folder import DomainFolder

pytestmark = pytest.mark.usefixtures("alone")


def test_find_neighbours_excludes_own_row_and_copies_from_other_sources(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(600)
    ours = stored(tmp_path / "ours", np.split(rows[:300], 3))
    elsewhere = np.concatenate([rows[300:], rows[100:200][::-1]])
    database = build(stored(tmp_path / "theirs", np.split(elsewhere, 4)), tmp_path / "theirs")
    found = find_neighbours(
        ours, database, DomainFolder(uri=str(tmp_path / "ours"), cache=tmp_path / "cache"), 5
    ).reference
    for shard, theirs in zip(found.manifest().shards, np.split(rows[:300], 3), strict=True):
        neighbours = elsewhere[np.load(artifacts.fetch_shard(found.uri, shard, ".npy", tmp_path / "cache"))]
        assert neighbours.shape == (100, 5, tiny_models.WIDTH)
        assert not (neighbours == theirs[:, None]).all(axis=2).any()


def test_find_neighbours_of_images_taken_down_later_raises_input_error(tmp_path: Path) -> None:
    rows, cache = tiny_models.unit_rows(400), tmp_path / "cache"
    embeddings = stored(tmp_path, np.split(rows[:300], 3))
    first = build(embeddings, tmp_path)
    find_neighbours(embeddings, first, DomainFolder(uri=str(tmp_path), cache=cache), 5)
    down = without(np.array([107, 250]), tmp_path)
    second = build(embeddings, tmp_path, previous=first, takedown=down)
    for version in (first, second):
        with pytest.raises(InputError, match=r"contains images that were taken down: 2 of .*; compact"):
            find_neighbours(embeddings, version, DomainFolder(uri=str(tmp_path), cache=cache), 5)
    theirs = stored(tmp_path / "theirs", [rows[300:]])
    assert find_neighbours(theirs, first, DomainFolder(uri=str(tmp_path), cache=cache), 5).reference.rows == 100
