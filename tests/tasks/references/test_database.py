"""Tests of row metadata: looked up in the shards' tables, of which a few are cached."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.tiny_artifacts import IMAGES, embedding_shards, image_shards, sha

from infra.formats import tables
from tasks.references import database
from tasks.references.database import Metadata

PARTS = [IMAGES[start : start + 2] for start in range(0, 12, 2)]
COLUMNS = ["key", "url", "sha256", "width", "height"]


@pytest.fixture
def lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Metadata:
    monkeypatch.setattr(database, "_MAX_CACHED_TABLES", 2)
    embeddings = embedding_shards(tmp_path, image_shards(tmp_path, PARTS))
    return Metadata(embeddings.uri, embeddings.manifest(), tmp_path)


def record_of(row: int) -> dict[str, Any]:
    url, data = IMAGES[row]
    key = f"{row // 2:05d}{row % 2:04d}"
    return dict(zip(COLUMNS, (key, url, sha(data), 48, 48), strict=True))


def test_metadata_of_several_shards_keeps_the_order_of_ids(lookup: Metadata) -> None:
    ids = [11, 0, 3, 0, 10, 2]
    assert lookup(ids) == [record_of(row) for row in ids]
    assert list(lookup([5])[0]) == COLUMNS
    assert lookup([]) == []
    assert lookup(np.array([7])) == [record_of(7)]  # type: ignore[arg-type]


def test_metadata_caches_few_tables_with_only_the_needed_columns(
    lookup: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, read = tables.read_table, []

    def counted(*args: Any) -> pa.Table:
        read.append(table(*args))
        return read[-1]

    monkeypatch.setattr(tables, "read_table", counted)
    lookup(range(12))
    assert len(read) == 6, "each table must be read once"
    assert [one.column_names for one in read] == [COLUMNS] * 6
    lookup([8, 9, 10, 11])
    assert len(read) == 6, "the last two tables must be cached"
    lookup([0])
    assert len(read) == 7


def test_metadata_called_by_threads_returns_correct_rows(lookup: Metadata) -> None:
    requests = [np.random.default_rng(seed).integers(0, 12, 5).tolist() for seed in range(80)]
    with ThreadPoolExecutor(8) as pool:
        for ids, found in zip(requests, pool.map(lookup, requests), strict=True):
            assert found == [record_of(row) for row in ids]
