"""What is known of rows: looked up in the shards' tables, of which few are kept."""

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
    monkeypatch.setattr(database, "_TABLES_KEPT", 2, raising=False)
    embeddings = embedding_shards(tmp_path, image_shards(tmp_path, PARTS))
    return Metadata(embeddings.uri, embeddings.manifest(), tmp_path)


def known(row: int) -> dict[str, Any]:
    url, data = IMAGES[row]
    key = f"{row // 2:05d}{row % 2:04d}"
    return dict(zip(COLUMNS, (key, url, sha(data), 48, 48), strict=True))


def test_rows_are_told_in_the_order_asked_whichever_shards_hold_them(lookup: Metadata) -> None:
    ids = [11, 0, 3, 0, 10, 2]
    assert lookup(ids) == [known(row) for row in ids]
    assert list(lookup([5])[0]) == COLUMNS
    assert lookup([]) == []
    assert lookup(np.array([7])) == [known(7)]  # type: ignore[arg-type]


def test_of_many_tables_few_are_kept_and_of_those_what_is_told_alone(
    lookup: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, read = tables.read_table, []

    def counted(*asked: Any) -> pa.Table:
        read.append(table(*asked))
        return read[-1]

    monkeypatch.setattr(tables, "read_table", counted)
    lookup(range(12))
    assert len(read) == 6, "each once, however the rows of its shard are asked for"
    assert [one.column_names for one in read] == [COLUMNS] * 6
    lookup([8, 9, 10, 11])
    assert len(read) == 6, "the last two were kept"
    lookup([0])
    assert len(read) == 7


def test_threads_share_the_tables(lookup: Metadata) -> None:
    asked = [np.random.default_rng(seed).integers(0, 12, 5).tolist() for seed in range(80)]
    with ThreadPoolExecutor(8) as pool:
        for ids, found in zip(asked, pool.map(lookup, asked), strict=True):
            assert found == [known(row) for row in ids]
