"""Compaction removes what was taken down from every file and changes nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.fakes import WithoutRay
from support.tiny_artifacts import IMAGES, embedding, embedding_shards, image_shards, sha, urls_of

from infra import storage
from infra.formats import webdataset
from tasks.references.domain_folder import DomainFolder
from tasks.references.takedown import Entries, match_rows
from tasks.references.types import EmbeddingShards, ImageShards, Takedown
from tasks.references.url_history import UrlHistory
from tasks.upkeep.compact import compact
from tasks.upkeep.takedown import commit_takedown


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> WithoutRay:
    fake = WithoutRay()
    fake.install(monkeypatch)
    return fake


def build(folder: Path) -> tuple[ImageShards, EmbeddingShards]:
    images = image_shards(folder, [IMAGES[:3], IMAGES[3:6], [("http://host/gone.png", None), *IMAGES[6:8]]])
    return images, embedding_shards(folder, images)


def take_down(folder: Path, *numbers: int) -> Takedown:
    urls = frozenset(IMAGES[n][0] for n in numbers)
    return commit_takedown(Entries(urls), DomainFolder(uri=str(folder)), info={}).reference


def files_of(source: Any) -> dict[str, Path]:
    """Return the path of every file of a version by name, including reused ones."""
    return {
        file.name: Path(storage.join(shard.folder or source.uri, file.name))
        for shard in source.manifest().shards
        for file in shard.files
    }


def test_compact_rewrites_only_shards_with_matching_rows(tmp_path: Path, ray: WithoutRay) -> None:
    images, embeddings = build(tmp_path)
    down = take_down(tmp_path, 1, 7)
    slim, rows = (
        outcome.reference
        for outcome in compact(images, embeddings, down, DomainFolder(uri=str(tmp_path), cache=tmp_path))
    )
    for before, after in ((images, slim), (embeddings, rows)):
        folders = {shard.name: shard.folder for shard in after.manifest().shards}
        assert folders == {"00000": None, "00001": before.uri, "00002": None}
        assert before.uri not in [source["uri"] for source in after.manifest().inputs.values()]
    assert (slim.rows, rows.rows) == (6, 6)
    assert urls_of(rows) == [IMAGES[n][0] for n in (0, 2, 3, 4, 5, 6)]
    expected = np.array([embedding(sha(IMAGES[n][1])) for n in (0, 2, 3, 4, 5, 6)], dtype=np.float16)
    found = [np.load(path) for name, path in files_of(rows).items() if name.endswith(".npy")]
    assert np.array_equal(np.concatenate(found), expected)
    assert [row["row"] for row in pq.read_table(files_of(rows)["metadata/metadata_00000.parquet"]).to_pylist()] == [
        0,
        1,
    ]
    assert match_rows(down, rows, tmp_path).tolist() == []
    assert len(ray.items) == 4


def test_compact_removes_image_bytes_but_keeps_url_history(tmp_path: Path) -> None:
    images, embeddings = build(tmp_path)
    data = IMAGES[1][1]
    assert any(data in path.read_bytes() for path in files_of(images).values())
    slim, _ = compact(images, embeddings, take_down(tmp_path, 1), DomainFolder(uri=str(tmp_path), cache=tmp_path))
    tars = [path for name, path in files_of(slim.reference).items() if name.endswith(".tar")]
    assert not any(data in path.read_bytes() or b"000000001.json" in path.read_bytes() for path in tars)
    assert [key for key, _ in webdataset.iter_images(tars[0])] == ["000000000", "000000002"]
    row = pq.read_table(files_of(slim.reference)["00000.parquet"]).to_pylist()[1]
    assert row == {
        "url": IMAGES[1][0], "key": "000000001", "sha256": sha(data), "status": "dropped",
        "error_class": "taken_down", "error_message": "taken_down: left out of the shard",
        "width": None, "height": None, "original_width": None, "original_height": None,
    }  # fmt: skip
    seen = UrlHistory.of(slim.reference, tmp_path)
    assert seen.requested([IMAGES[1][0]], failed_too=False).all()
    assert seen.contains([sha(data)]).all()


def test_compact_without_matching_rows_returns_same_version(tmp_path: Path) -> None:
    images, embeddings = build(tmp_path)
    down = commit_takedown(
        Entries(frozenset({"http://elsewhere/x.png"})), DomainFolder(uri=str(tmp_path)), info={}
    ).reference
    slim, rows = compact(images, embeddings, down, DomainFolder(uri=str(tmp_path), cache=tmp_path))
    assert (slim.reference, rows.reference) == (images, embeddings)
    assert slim.skipped and rows.skipped
    first = compact(images, embeddings, take_down(tmp_path, 0), DomainFolder(uri=str(tmp_path), cache=tmp_path))
    again = compact(images, embeddings, take_down(tmp_path, 0), DomainFolder(uri=str(tmp_path), cache=tmp_path))
    assert [outcome.reference for outcome in again] == [outcome.reference for outcome in first]
    assert all(outcome.skipped for outcome in again)


def test_compact_union_in_object_store_keeps_shard_names(bucket: Any, tmp_path: Path) -> None:
    from tasks.upkeep.merge import merged_images

    parts = [image_shards(f"{bucket.uri}/{name}", [IMAGES[n : n + 2]]) for name, n in (("a", 0), ("b", 2))]
    union = merged_images(parts, DomainFolder(uri=f"{bucket.uri}/c", cache=tmp_path)).reference
    rows = embedding_shards(f"{bucket.uri}/c", union)
    down = commit_takedown(
        Entries(frozenset({IMAGES[0][0], IMAGES[3][0]})), DomainFolder(uri=f"{bucket.uri}/c"), info={}
    ).reference
    slim, slim_rows = compact(union, rows, down, DomainFolder(uri=f"{bucket.uri}/c", cache=tmp_path))
    names = [file.name for shard in slim.reference.manifest().shards for file in shard.files]
    assert names == ["00000.parquet", "00000.tar", "00001.parquet", "00001.tar"]
    assert urls_of(slim_rows.reference) == [IMAGES[1][0], IMAGES[2][0]]
    keys: list[str] = bucket.keys()
    tars = [bucket.read(key) for key in keys if key.startswith("c/images") and key.endswith(".tar")]
    assert len(tars) == 2
    assert not any(IMAGES[n][1] in tar for n in (0, 3) for tar in tars)
