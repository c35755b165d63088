"""A living database in an object store: it grows, forgets, is compacted, and its garbage is collected."""

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
def living(prefect_server: None, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Living]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("KNN_DIFFUSION_CACHE", str(tmp_path / "cache"))
    WithoutRay().install(monkeypatch)
    with LoopbackServer({path: Reply(body=body) for path, body in BODY.items()}) as server:
        yield Living(server, tmp_path, f"{bucket.uri}/line")


def cached(living: Living, body: bytes) -> list[Path]:
    """The files of the local cache that hold a picture."""
    files = [path for path in (living.folder / "cache").rglob("*") if path.is_file()]
    return [path for path in files if body in path.read_bytes()]


def test_a_database_lives_on_in_an_object_store(living: Living, bucket: Bucket) -> None:
    living.build(NAMES[:FIRST])
    down = living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl")

    grown = living.rebuild(urls=living.listed(*NAMES[: FIRST + 3]), takedown=down, compact_above=0.5)

    assert sorted(living.server.requests) == sorted(NAMES[FIRST : FIRST + 3])
    left = set(NAMES[: FIRST + 3]) - {NAMES[1]}
    assert living.found(grown.after.database) == left
    folders = [shard.folder for shard in grown.after.embeddings.manifest().shards]
    assert folders == [grown.before.embeddings.uri] * 3 + [None]
    assert living.rebuild(urls=living.listed(*NAMES[: FIRST + 3]), takedown=down, compact_above=0.5).unchanged

    compacted = living.rebuild(compact=True)
    assert compacted.after.database.rows == len(left)

    def holding_it() -> list[str]:
        keys = bucket.keys()
        return [key for key in keys if BODY[NAMES[1]] in bucket.read(key)]

    assert holding_it(), "versions before still have it"
    (listed,) = living.collect()
    assert listed.files and holding_it(), "a dry run deletes nothing"
    assert cached(living, BODY[NAMES[1]])
    (removed,) = living.collect(dry_run=False)
    assert removed.files == listed.files
    assert not holding_it()
    assert not cached(living, BODY[NAMES[1]])
    shutil.rmtree(living.folder / "cache")  # from the store alone
    assert living.found(compacted.after.database) == left


def test_a_second_rebuild_in_an_object_store_is_refused_while_the_first_runs(living: Living) -> None:
    living.build(NAMES[:4])
    with lease(f"{living.root}/shapes", holder="another"), pytest.raises(StageError, match="another"):
        living.rebuild(urls=living.listed(*NAMES[:5]))
    assert living.rebuild(urls=living.listed(*NAMES[:5])).after.database.rows == 5


def test_images_of_shards_that_were_taken_over_go_from_the_cache(living: Living) -> None:
    living.build(NAMES[:4])
    living.rebuild(urls=living.listed(*NAMES[:6]))
    living.collect(dry_run=False)  # the first version's manifest goes, its shards are the second's
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), compact=True)
    assert cached(living, BODY[NAMES[1]])
    assert living.collect(dry_run=False)[0].files
    assert not cached(living, BODY[NAMES[1]])


def test_images_go_from_the_cache_though_the_collection_was_interrupted(
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


def test_collect_copied_prefix_is_refused(living: Living, bucket: Bucket) -> None:
    living.build(NAMES[:4])
    living.rebuild(urls=living.listed(*NAMES[:5]))
    keys = bucket.keys()
    original = [key for key in keys if "/lease/" not in key]
    copied = [key.replace("line/", "copy/", 1) for key in original]
    for key, copy in zip(original, copied, strict=True):
        bucket.write(copy, bucket.read(key))
    told = rf"registered at {bucket.uri}/line/shapes/database/.*{bucket.uri}/copy; .*--root {bucket.uri}/line"
    with pytest.raises(IntegrityError, match=told):
        living.collect(root=f"{bucket.uri}/copy", dry_run=False)
    assert set(bucket.keys()) >= {*original, *copied}
