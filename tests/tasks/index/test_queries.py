"""Queries, settings and recall target of a version."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_models
from support.embedding_rows import CONFIG, build, hidden_in, queries_of, stored, truth_of, without

from infra.errors import StageError
from infra.registry import Registry
from infra.settings import Settings
from model.encoder import clip
from model.retrieval.recall import GroundTruth, exact_neighbours
from tasks.index import tuning
from tasks.index.task import index
from tasks.references.domain_folder import DomainFolder
from tasks.register import register_database

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize(("removed", "replaced"), [(15, False), (16, True), (30, True)])
def test_index_takedown_of_queries_replaces_them_if_few_are_left(tmp_path: Path, removed: int, replaced: bool) -> None:
    embeddings = stored(tmp_path, np.split(tiny_models.unit_rows(300), 3))
    first = build(embeddings, tmp_path)
    queries = queries_of(first, tmp_path)
    assert len(queries) == 30

    second = build(embeddings, tmp_path, previous=first, takedown=without(queries[:removed], tmp_path))

    assert second.manifest().info["image_queries"] == (30 if replaced else 30 - removed)
    assert second.manifest().info["recall_at_10_image"] >= 0.95
    assert not np.isin(queries[:removed], queries_of(second, tmp_path)).any()


def test_index_with_twice_the_rows_chooses_queries_again(tmp_path: Path) -> None:
    rows, config = tiny_models.unit_rows(200), dataclasses.replace(CONFIG, max_drift=1e9)
    embeddings = stored(tmp_path, [rows[:100]])
    version = build(embeddings, tmp_path, config)
    chosen = [queries_of(version, tmp_path)]
    for number, more in enumerate((rows[100:150], rows[150:]), start=1):
        embeddings = stored(tmp_path, [more], first=number, previous=embeddings)
        version = build(embeddings, tmp_path, config, previous=version)
        chosen.append(queries_of(version, tmp_path))
    np.testing.assert_array_equal(chosen[1], chosen[0])
    assert len(chosen[2]) == 30
    assert chosen[2].max() >= 150, "the first addition grew the database by half, the second doubled it"


@pytest.mark.parametrize(
    "changes",
    [
        {"texts": ("one", "two", "three", "four")},
        {"texts": ()},
        {"recall_queries": 40},
        {"seed": 1},
        {"near_duplicate_cosine": 0.9},
        {"near_duplicate_cosine": 1.0},
        {"dedup": False},
    ],
    ids=str,
)
def test_index_changed_settings_grown_equals_fresh_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(clip, "encoder_for", lambda identity: FakeTextEncoder())
    rows = tiny_models.unit_rows(400)
    rows[150:180] = rows[10:40]
    before = stored(tmp_path, np.split(rows[:300], 3))
    config = dataclasses.replace(CONFIG, dedup=True, texts=("one", "two"), max_drift=1e9)
    first = build(before, tmp_path, config)
    after = stored(tmp_path, [rows[300:]], first=3, previous=before)
    changed = dataclasses.replace(config, **changes)

    grown = build(after, tmp_path, changed, previous=first)

    fresh = build(after, tmp_path / "fresh", changed)
    assert grown.manifest().info["shards_taken_over"] > 0
    assert hidden_in(grown, tmp_path) == hidden_in(fresh, tmp_path)
    for name in ("near_duplicates", "image_queries", "text_queries"):
        assert grown.manifest().info[name] == fresh.manifest().info[name]
    for kind in ("image", "text"):
        actual, expected = (truth_of(version, kind, tmp_path) for version in (grown, fresh))
        np.testing.assert_array_equal(actual["queries"], expected["queries"])
        np.testing.assert_array_equal(actual["ids"], expected["ids"])


class FakeTextEncoder:
    """A text encoder that returns unit rows seeded by text length."""

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([tiny_models.unit_rows(1, seed=len(text)) for text in texts])).float()


def test_index_without_queries_is_registered_and_can_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = stored(tmp_path, np.split(tiny_models.unit_rows(300), 3))

    def no_queries(database: Any, *_: Any) -> GroundTruth:
        return exact_neighbours(database.parts, np.empty((0, tiny_models.WIDTH), np.float32))

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_image_truth", no_queries)
        built = index(embeddings, DomainFolder(uri=str(tmp_path), cache=tmp_path / "cache"), CONFIG)
    assert built.note.startswith("IVF8,SQfp16, no image queries, no text queries")
    settings = Settings(root=str(tmp_path / "data"))
    register_database("shapes", built.reference, settings)
    (listed,) = Registry(settings).versions("database")
    assert listed["index"] == "IVF8,SQfp16"
    assert "recall_at_10_image" not in listed
    takedown = without(np.arange(3), tmp_path)
    after = build(embeddings, tmp_path, previous=built.reference, takedown=takedown)
    assert after.manifest().info["image_queries"] == 30


def test_index_changed_target_ignores_previous_effort(tmp_path: Path) -> None:
    embeddings = stored(tmp_path, np.split(tiny_models.unit_rows(600), 6))
    strict = build(embeddings, tmp_path, dataclasses.replace(CONFIG, target_recall=0.99))
    assert strict.manifest().info["effort"]["nprobe"] >= 4, "otherwise the last assertion would always hold"
    lax = build(embeddings, tmp_path, dataclasses.replace(CONFIG, target_recall=0.1), previous=strict)
    assert lax.manifest().info["effort"]["nprobe"] == 1


def test_index_recall_below_target_is_not_committed(tmp_path: Path) -> None:
    embeddings = stored(tmp_path, [tiny_models.unit_rows(3_000)])
    config = dataclasses.replace(CONFIG, index="PQ1x4", target_recall=1.0)
    with pytest.raises(
        StageError, match=r"PQ1x4 is below the target 1\.0: recall_at_10_image 0\.\d+; choose a finer .*--index"
    ):
        build(embeddings, tmp_path, config)
    folders = list((tmp_path / "database").iterdir())
    assert not any((folder / "manifest.json").exists() for folder in folders)
