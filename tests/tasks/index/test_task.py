"""The index stage on seeded rows: shards, growth from an earlier version, failures."""

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny_models
from support.embedding_rows import CONFIG, build, everything, exact, stored
from support.fakes import Killed, WithoutRay, workers_of

from infra import storage
from infra.errors import IntegrityError
from tasks.index import shards
from tasks.index.config import IndexConfig
from tasks.index.task import index
from tasks.references.database import index_shards, open_database
from tasks.references.domain_folder import DomainFolder

pytestmark = pytest.mark.usefixtures("alone")


def test_index_groups_embedding_shards_into_index_shards(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(600)
    version = build(stored(tmp_path, np.split(rows, 6)), tmp_path)
    manifest = version.manifest()
    assert [shard.info["members"] for shard in index_shards(version)] == [
        ["00000", "00001"], ["00002", "00003"], ["00004", "00005"],
    ]  # fmt: skip
    assert (manifest.rows, manifest.info["factory"]) == (600, "IVF8,SQfp16")
    assert manifest.info["recall_at_10_image"] >= 0.95
    assert {"nprobe", "candidates", "recall_at_10_image", "latency_ms"} <= manifest.info["curve"][0].keys()
    assert storage.read_bytes(storage.join(version.uri, "recall.png")).startswith(b"\x89PNG")
    queries = tiny_models.unit_rows(9, seed=3)
    assert everything(version, tmp_path).search(queries, 5).ids.tolist() == exact(queries, rows, 5)


def test_index_grown_from_version_adds_only_new_rows(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(700)
    before = stored(tmp_path, np.split(rows[:600], 6))
    first = build(before, tmp_path)
    after = stored(tmp_path, [rows[600:]], first=6, previous=before)

    second = build(after, tmp_path, previous=first)

    folders = [shard.folder for shard in index_shards(second)]
    assert folders == [first.uri, first.uri, first.uri, None]
    assert second.manifest().info["shards_taken_over"] == 3
    written = {file.name for shard in second.manifest().shards if shard.folder is None for file in shard.files}
    assert {name for name in written if name.endswith(".faiss")} == {"index/00006.faiss"}
    assert second.manifest().info["recall_at_10_image"] >= 0.95
    queries = np.concatenate([tiny_models.unit_rows(9, seed=3), rows[650:652]])
    assert everything(second, tmp_path).search(queries, 5).ids.tolist() == exact(queries, rows, 5)
    again = index(after, DomainFolder(uri=str(tmp_path), cache=tmp_path / "cache"), CONFIG, previous=first)
    assert (again.skipped, again.reference) == (True, second)


def test_fill_shards_in_parts_equals_fill_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = stored(tmp_path, np.split(tiny_models.unit_rows(600), 6))
    config = dataclasses.replace(CONFIG, shard_rows=400)
    monkeypatch.setattr(shards, "PART_ROWS", 150)

    merged = build(embeddings, tmp_path / "parts", config)

    monkeypatch.setattr(shards, "PART_ROWS", 1000)
    whole = build(embeddings, tmp_path / "whole", config)
    assert merged.digest == whole.digest
    assert [len(shard.info["members"]) for shard in index_shards(merged)] == [4, 2]
    assert not list(Path(merged.uri).glob("parts*")), "parts are deleted after the merge"
    error, expected = (shard.info["error"] for version in (merged, whole) for shard in index_shards(version)[:1])
    assert error == pytest.approx(expected, rel=0.2)  # measured on different rows


def test_index_resumes_after_kill_between_fill_and_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: WithoutRay
) -> None:
    embeddings = stored(tmp_path, np.split(tiny_models.unit_rows(600), 6))
    config = dataclasses.replace(CONFIG, shard_rows=600)
    monkeypatch.setattr(shards, "PART_ROWS", 150)
    merge = shards._Merge

    class KilledMerge(merge):
        def __call__(self, item: Any) -> Any:
            raise Killed

    monkeypatch.setattr(shards, "_Merge", KilledMerge)
    with pytest.raises(Killed):
        build(embeddings, tmp_path, config)
    names = [name for _, (name, _) in alone.items]
    assert names == ["00000", "00001", "00002", "00003", "00004", "00005", "00000"]
    monkeypatch.setattr(shards, "_Merge", merge)
    monkeypatch.setattr(shards, "_Fill", None)  # filling again would fail

    version = build(embeddings, tmp_path, config)

    assert [shard.rows for shard in index_shards(version)] == [600]


def test_index_growing_repeatedly_merges_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny_models.unit_rows(1300)
    config = dataclasses.replace(CONFIG, shard_rows=1000)
    embeddings = stored(tmp_path, np.split(rows[:800], 8))
    version = build(embeddings, tmp_path, config)
    sizes = []
    for number in range(8, 13):
        more = rows[100 * number : 100 * (number + 1)]
        embeddings = stored(tmp_path, [more], first=number, previous=embeddings)
        version = build(embeddings, tmp_path, config, previous=version)
        sizes.append([shard.rows for shard in index_shards(version)])
    # Only shard_rows prevents a merge of the first shard once the others have 400 rows.
    assert sizes == [[800, 100], [800, 200], [800, 300], [800, 300, 100], [800, 500]]
    queries = np.concatenate([tiny_models.unit_rows(9, seed=3), rows[[850, 1010, 1250]]])
    assert everything(version, tmp_path).search(queries, 5).ids.tolist() == exact(queries, rows, 5)


def test_index_grown_twice_without_new_rows_is_unchanged(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(300)
    embeddings = stored(tmp_path, np.split(rows, 3))
    version = build(embeddings, tmp_path)
    for number in (3, 4):  # every new image was a copy or failed to download
        embeddings = stored(tmp_path, [rows[:0]], first=number, previous=embeddings)
        version = build(embeddings, tmp_path, previous=version)
    queries = tiny_models.unit_rows(9, seed=3)
    assert everything(version, tmp_path).search(queries, 5).ids.tolist() == exact(queries, rows, 5)


def test_index_unmergeable_type_is_filled_again_from_rows(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(500)
    config = dataclasses.replace(CONFIG, index="HNSW8", shard_rows=1000)
    before = stored(tmp_path, np.split(rows[:300], 3))
    first = build(before, tmp_path, config)
    after = stored(tmp_path, np.split(rows[300:], 2), first=3, previous=before)

    second = build(after, tmp_path, config, previous=first)

    assert [(shard.rows, shard.folder) for shard in index_shards(second)] == [(500, None)]
    assert second.manifest().info["recall_at_10_image"] >= 0.95


def test_index_after_compaction_fills_only_changed_shards(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(600)
    parts = np.split(rows, 6)
    before = stored(tmp_path, parts)
    first = build(before, tmp_path)
    smaller = stored(tmp_path / "smaller", [*parts[:2], parts[2][10:], *parts[3:]])

    second = build(smaller, tmp_path, previous=first)

    assert [shard.folder is None for shard in index_shards(second)] == [False, True, False]
    remaining = np.delete(rows, np.arange(200, 210), axis=0)
    queries = tiny_models.unit_rows(9, seed=3)
    assert everything(second, tmp_path).search(queries, 5).ids.tolist() == exact(queries, remaining, 5)


@pytest.mark.slow
@pytest.mark.on_ray
def test_index_killed_workers_retries_only_their_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = stored(tmp_path, np.split(tiny_models.unit_rows(12_000), 120))
    config = dataclasses.replace(CONFIG, shard_rows=100)
    markers: list[int] = []

    def kill() -> None:
        """Kill every worker as soon as one has committed a shard."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and not markers:
            done = list((tmp_path / "database").glob("*/shards/[0-9]*.json"))
            workers = workers_of(os.getpid()) if done else []
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            markers.extend([len(done)] if workers else [])
            time.sleep(0.002)

    thread = threading.Thread(target=kill)
    thread.start()
    interrupted = build(embeddings, tmp_path, config)
    thread.join()
    assert 0 < markers[0] < 120, "workers were killed during the build"
    WithoutRay().install(monkeypatch)
    assert interrupted.digest == build(embeddings, tmp_path / "uninterrupted", config).digest


@pytest.mark.parametrize("which", ["00002.faiss", "quantizer.faiss"])
def test_open_database_flipped_byte_raises(tmp_path: Path, which: str) -> None:
    version = build(stored(tmp_path, np.split(tiny_models.unit_rows(600), 6)), tmp_path)
    (path,) = Path(version.uri).rglob(which)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match=rf"{which} differs from its committed digest"):
        open_database(version, tmp_path / "cache")


def test_open_database_missing_shard_raises_its_name(tmp_path: Path) -> None:
    version = build(stored(tmp_path, np.split(tiny_models.unit_rows(600), 6)), tmp_path)
    (path,) = Path(version.uri).rglob("00002.faiss")
    path.unlink()
    with pytest.raises(IntegrityError, match=r"00002\.faiss is missing though it was committed"):
        open_database(version, tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"near_duplicate_cosine": 0.0}, "near_duplicate_cosine or max_drift is out of range: 0.0"),
        ({"shard_rows": 0}, "shard_rows or memory_bytes is below 1"),
        ({"target_recall": 1.5}, "between 0 and 1"),
        ({"max_drift": -1.0}, "a max_drift of at least 0"),
    ],
)
def test_index_config_out_of_range_raises(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexConfig(**changes)
