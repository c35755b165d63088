"""Hidden rows of a version: takedowns and near-duplicates."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models
from support.embedding_rows import CONFIG, build, everything, exact, hidden_in, stored, without
from support.fakes import WithoutRay

import tasks.index.task
from infra import artifacts
from infra.errors import StageError
from tasks.index import hidden_rows
from tasks.references.database import HIDDEN
from tasks.references.domain_folder import DomainFolder
from tasks.references.takedown import Entries
from tasks.upkeep.takedown import commit_takedown

pytestmark = pytest.mark.usefixtures("alone")


def test_index_with_takedown_and_dedup_hides_rows(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(300)
    rows[250] = rows[20]
    embeddings = stored(tmp_path, np.split(rows, 3))
    takedown = commit_takedown(
        Entries(url=frozenset({"http://00001/7", "http://00002/99"})), DomainFolder(uri=str(tmp_path)), info={}
    )
    config = dataclasses.replace(CONFIG, dedup=True)

    version = build(embeddings, tmp_path, config, takedown=takedown.reference)

    info = version.manifest().info
    assert (info["taken_down"], info["near_duplicates"], info["hidden"]) == (2, 1, 3)
    database = everything(version, tmp_path)
    assert len(database) == 297
    assert database.search(rows[[107, 299, 20]], 4).ids.tolist() == exact(
        rows[[107, 299, 20]], rows, 4, {107, 299, 250}
    )
    counted = build(embeddings, tmp_path, takedown=takedown.reference).manifest().info
    assert (counted["near_duplicates"], counted["hidden"]) == (1, 2), (
        "near-duplicates are counted but returned by default"
    )


def test_index_grown_from_version_keeps_rows_hidden(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(400)
    rows[350] = rows[30]
    before = stored(tmp_path, np.split(rows[:300], 3))
    config = dataclasses.replace(CONFIG, dedup=True)
    takedown = commit_takedown(
        Entries(url=frozenset({"http://00001/7"})), DomainFolder(uri=str(tmp_path)), info={}
    ).reference
    first = build(before, tmp_path, config, takedown=takedown)
    more = commit_takedown(
        Entries(url=frozenset({"http://00001/7", "http://00003/5"})), DomainFolder(uri=str(tmp_path)), info={}
    ).reference
    after = stored(tmp_path, [rows[300:]], first=3, previous=before)
    for entries, hidden in ((takedown, {107, 350}), (more, {107, 305, 350})):
        version = build(after, tmp_path, config, previous=first, takedown=entries)
        assert hidden_in(version, tmp_path) == hidden


def test_index_takedown_of_first_near_duplicate_shows_another(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(300)
    rows[[250, 270]] = rows[20]
    turned = tiny_models.unit(
        rows[[30]] + 0.1 * tiny_models.unit_rows(2, seed=5)
    )  # row 30 is a near-duplicate of both, which are not near-duplicates of each other
    rows[[150, 160]] = turned
    config = dataclasses.replace(CONFIG, dedup=True, near_duplicate_cosine=0.992)
    near = rows.astype(np.float32)[[150, 160, 30]] @ rows.astype(np.float32)[[150, 160, 30]].T
    assert near[2, :2].min() > 0.992 > near[0, 1]
    embeddings = stored(tmp_path, np.split(rows, 3))
    first = build(embeddings, tmp_path, config)
    assert hidden_in(first, tmp_path) == {150, 160, 250, 270}

    second = build(embeddings, tmp_path, config, previous=first, takedown=without(np.array([20, 30]), tmp_path))

    assert hidden_in(second, tmp_path) == {20, 30, 270}
    info = second.manifest().info
    assert (info["taken_down"], info["near_duplicates"], info["hidden"]) == (2, 1, 3)


def test_index_commits_hidden_rows_as_files(tmp_path: Path) -> None:
    version = build(stored(tmp_path, np.split(tiny_models.unit_rows(300), 3)), tmp_path)
    (hidden,) = (shard for shard in version.manifest().shards if shard.name == HIDDEN)
    assert {file.name for file in hidden.files} == {"hidden.npy", "pairs.npy", "taken.npy"}


def test_index_takedown_with_recall_below_target_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tiny_models.unit_rows(400)
    embeddings = stored(tmp_path, np.split(rows[:300], 3))
    first = build(embeddings, tmp_path)
    down = commit_takedown(
        Entries(url=frozenset({"http://00001/7"})), DomainFolder(uri=str(tmp_path)), info={}
    ).reference
    tuned = tasks.index.task.tune_database

    def just_below(*arguments: Any) -> Any:
        shard, measured = tuned(*arguments)
        return shard, {**measured, "recall_at_10_image": 0.9473}

    monkeypatch.setattr("tasks.index.task.tune_database", just_below)
    more = stored(tmp_path, [rows[300:]], first=3, previous=embeddings)
    finer = dataclasses.replace(CONFIG, recall_queries=29)
    for failing_build in (
        lambda: build(embeddings, tmp_path, takedown=down),
        lambda: build(more, tmp_path, previous=first, takedown=down),
        lambda: build(embeddings, tmp_path, finer, previous=first, takedown=down),
    ):
        with pytest.raises(StageError, match=r"is below the target 0\.95: recall_at_10_image 0\.947"):
            failing_build()
    with caplog.at_level("WARNING"):
        version = build(embeddings, tmp_path, previous=first, takedown=down)
    assert version.manifest().info["taken_down"] == 1
    assert "takedowns are applied although recall of IVF8,SQfp16 is below the target" in caplog.text


def test_index_many_shards_searches_near_duplicates_in_groups(
    tmp_path: Path, alone: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny_models.unit_rows(600)
    rows[[29, 30, 599]] = rows[[580, 3, 31]]
    monkeypatch.setattr(hidden_rows, "_GROUP_ROWS", 100)
    version = build(stored(tmp_path, np.split(rows, 20)), tmp_path)
    groups = [item for description, item in alone.items if description == "near-duplicates"]
    assert [[first for _, first in group] for group in groups] == [
        [0, 30, 60], [90, 120, 150], [180, 210, 240], [270, 300, 330], [360, 390, 420], [450, 480, 510], [540, 570],
    ]  # fmt: skip
    (hidden,) = (shard for shard in version.manifest().shards if shard.name == HIDDEN)
    pairs = np.load(artifacts.fetch_shard(version.uri, hidden, "pairs.npy", tmp_path / "cache"))
    unit = tiny_models.unit(rows.astype(np.float64))
    cosines = np.triu(unit @ unit.T, 1)
    assert pairs.tolist() == np.argwhere(cosines >= CONFIG.near_duplicate_cosine).tolist()
    assert {(3, 30), (29, 580), (31, 599)} <= set(map(tuple, pairs.tolist()))
