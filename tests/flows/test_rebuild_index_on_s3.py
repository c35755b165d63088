"""Rebuilds in an object store: additions, takedowns, compaction and garbage collection."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.changing_domain import BODY, FIRST, NAMES, Living
from support.fakes import LoopbackServer, Reply, WithoutRay
from support.object_stores import Bucket

from infra import storage
from infra.errors import IntegrityError, NotFoundError, StageError
from infra.storage.lease import lease


@pytest.fixture
def living(
    migrated_database: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Living]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("KNN_DIFFUSION_CACHE", str(tmp_path / "cache"))
    WithoutRay().install(monkeypatch)
    with LoopbackServer({path: Reply(body=body) for path, body in BODY.items()}) as server:
        yield Living(server, tmp_path, migrated_database, f"{bucket.uri}/line")


def cached(living: Living, body: bytes) -> list[Path]:
    """Return the files of the local cache that contain an image."""
    files = [path for path in (living.folder / "cache").rglob("*") if path.is_file()]
    return [path for path in files if body in path.read_bytes()]


def test_rebuild_in_object_store_adds_hides_compacts_and_collects(living: Living, bucket: Bucket) -> None:
    living.build(NAMES[:FIRST])
    down = living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl")

    grown = living.rebuild(urls=living.listed(*NAMES[: FIRST + 3]), takedown=down, compact_above=0.5)

    assert sorted(living.server.requests) == sorted(NAMES[FIRST : FIRST + 3])
    remaining = set(NAMES[: FIRST + 3]) - {NAMES[1]}
    assert living.found(grown.after.database) == remaining
    folders = [shard.folder for shard in grown.after.embeddings.manifest().shards]
    assert folders == [grown.before.embeddings.uri] * 3 + [None]
    assert living.rebuild(urls=living.listed(*NAMES[: FIRST + 3]), takedown=down, compact_above=0.5).unchanged

    compacted = living.rebuild(compact=True)
    assert compacted.after.database.rows == len(remaining)

    def keys_with_image() -> list[str]:
        keys = bucket.keys()
        return [key for key in keys if BODY[NAMES[1]] in bucket.read(key)]

    assert keys_with_image(), "earlier versions still contain it"
    (listed,) = living.collect()
    assert listed.files and keys_with_image(), "a dry run deletes nothing"
    assert cached(living, BODY[NAMES[1]])
    (removed,) = living.collect(dry_run=False)
    assert removed.files == listed.files
    assert not keys_with_image()
    assert not cached(living, BODY[NAMES[1]])
    shutil.rmtree(living.folder / "cache")  # read from the store only
    assert living.found(compacted.after.database) == remaining


def test_rebuild_in_object_store_during_another_fails(living: Living) -> None:
    living.build(NAMES[:4])
    with lease(f"{living.root}/shapes", holder="another"), pytest.raises(StageError, match="another"):
        living.rebuild(urls=living.listed(*NAMES[:5]))
    assert living.rebuild(urls=living.listed(*NAMES[:5])).after.database.rows == 5


def test_collect_purges_images_of_reused_shards_from_the_cache(living: Living) -> None:
    living.build(NAMES[:4])
    living.rebuild(urls=living.listed(*NAMES[:6]))
    living.collect(dry_run=False)  # deletes the first version's manifest; the second version uses its shards
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), compact=True)
    assert cached(living, BODY[NAMES[1]])
    assert living.collect(dry_run=False)[0].files
    assert not cached(living, BODY[NAMES[1]])


def test_collect_after_interruption_purges_images_from_the_cache(
    living: Living, monkeypatch: pytest.MonkeyPatch
) -> None:
    living.build(NAMES[:4])
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), compact=True)
    remove = storage.remove

    def refuses_tars(uri: str) -> None:
        if uri.endswith(".tar"):
            raise NotFoundError(f"{uri} is locked")
        remove(uri)

    assert cached(living, BODY[NAMES[1]])
    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", refuses_tars)
        with pytest.raises(NotFoundError, match="is locked"):
            living.collect(dry_run=False)
    assert living.collect(dry_run=False)[0].files
    assert not cached(living, BODY[NAMES[1]])


def test_collect_in_copied_prefix_fails(living: Living, bucket: Bucket) -> None:
    living.build(NAMES[:4])
    living.rebuild(urls=living.listed(*NAMES[:5]))
    keys = bucket.keys()
    original = [key for key in keys if "/lease/" not in key]
    copied = [key.replace("line/", "copy/", 1) for key in original]
    for key, copy in zip(original, copied, strict=True):
        bucket.write(copy, bucket.read(key))
    message = rf"registered at {bucket.uri}/line/shapes/database/.*{bucket.uri}/copy; .*--root {bucket.uri}/line"
    with pytest.raises(IntegrityError, match=message):
        living.collect(root=f"{bucket.uri}/copy", dry_run=False)
    assert set(bucket.keys()) >= {*original, *copied}
