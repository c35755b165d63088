"""Rebuilds of a database: their cost, takedowns, and runs that fail or are killed."""

import dataclasses
import hashlib
import os
import re
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.changing_domain import BODY, FIRST, NAMES, Living
from support.fakes import Reply, WithoutRay

from flows.promote_version import PromoteVersionConfig, promote_version
from infra import compute
from infra.errors import InputError, IntegrityError, StageError
from infra.registry import Registry
from infra.settings import Settings
from infra.storage.lease import lease
from model.errors import ModelError
from tasks.references.database import open_database


def test_rebuild_downloads_only_new_urls_and_nothing_for_the_same_list(
    living_on_prefect: Living, ray: WithoutRay
) -> None:
    living = living_on_prefect
    living.start(NAMES[:FIRST])
    ray.items.clear()
    whole = living.listed(*NAMES[: FIRST + 3])
    rebuilt = living.rebuild(urls=whole)
    assert sorted(living.server.requests) == sorted(NAMES[FIRST : FIRST + 3])
    embedded = [item[0] for description, item in ray.items if description == "embeddings"]
    assert embedded == ["00003"]
    assert rebuilt.after.database.rows == FIRST + 3
    assert living.found(rebuilt.after.database) == set(NAMES[: FIRST + 3])
    after = rebuilt.after.embeddings.manifest()
    assert [shard.folder for shard in after.shards] == [rebuilt.before.embeddings.uri] * 3 + [None]
    assert [(v["version"], v["aliases"]) for v in living.versions()] == [(1, []), (2, ["champion"])]

    files = living.files()
    from tasks.index.config import IndexConfig

    again = living.rebuild(urls=whole, index=IndexConfig(recall_queries=4))
    assert (again.unchanged, living.server.requests) == (True, [])
    assert all(again.skipped.values())
    assert again.after == rebuilt.after
    assert len(living.versions()) == 2
    assert living.files() == files
    finer = living.rebuild(urls=whole, index=IndexConfig(recall_queries=5))
    assert finer.after.embeddings == again.after.embeddings
    assert finer.after.database.manifest().config["recall_queries"] == 5
    assert finer.after.database.manifest().info["image_queries"] == 5


def test_rebuild_after_drift_retrains_the_quantizer(living: Living, ray: WithoutRay) -> None:
    from tasks.index.config import IndexConfig
    from tasks.references.database import QUANTIZER

    tolerant = IndexConfig(index="IVF2,SQfp16", recall_queries=4, max_drift=1e9)
    living.build(NAMES[:8], index=tolerant)
    reused = living.rebuild(urls=living.listed(*NAMES[:10]))
    retrained = living.rebuild(urls=living.listed(*NAMES[:12]), index=dataclasses.replace(tolerant, max_drift=0.0))
    trained_for = []
    for rebuilt in (reused, retrained):
        (quantizer,) = (shard for shard in rebuilt.after.database.manifest().shards if shard.name == QUANTIZER)
        trained_for.append(quantizer.info["database_rows"])
    assert trained_for == [8, 12]
    assert living.found(retrained.after.database) == living.champion() == set(NAMES[:12])


def test_takedown_is_hidden_then_compacted_then_collected(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:FIRST])
    digest = hashlib.sha256(BODY[NAMES[5]]).hexdigest()
    down = living.listed({"url": living.server.url(NAMES[1])}, {"sha256": digest}, name="down.jsonl")
    gone = {NAMES[1], NAMES[5]}
    hidden = living.rebuild(takedown=down, compact_above=0.5)
    assert living.found(hidden.after.database) == set(NAMES[:FIRST]) - gone
    assert hidden.after.embeddings == hidden.before.embeddings  # hidden, no shard rewritten
    assert living.rebuild(takedown=down, compact_above=0.5).unchanged

    ray.items.clear()
    compacted = living.rebuild(compact=True)
    assert "embeddings" in [description for description, _ in ray.items]
    assert "embed" not in compacted.seconds  # no image was embedded
    assert compacted.after.database.rows == FIRST - 2
    assert living.found(compacted.after.database) == set(NAMES[:FIRST]) - gone
    assert living.rebuild(compact=True).unchanged
    assert living.rebuild(urls=living.listed(*NAMES[:FIRST])).unchanged  # images taken down are not requested again
    assert living.server.requests == []

    before = living.files()
    assert any(BODY[NAMES[1]] in data for data in before.values())
    (listed,) = living.collect()
    assert living.files() == before
    assert listed.files and not listed.deleted
    (removed,) = living.collect(dry_run=False)
    assert removed.files == listed.files
    after = living.files()
    assert len(before) - len(after) == len(removed.files)
    assert not any(BODY[name] in data for name in gone for data in after.values())
    assert living.found(compacted.after.database) == set(NAMES[:FIRST]) - gone
    assert [bool(version.get("collected")) for version in living.versions()] == [True, True, False]
    grown = living.rebuild(urls=living.listed(*NAMES[: FIRST + 2]))  # a collected domain can be rebuilt
    assert living.found(grown.after.database) == set(NAMES[: FIRST + 2]) - gone


def test_rebuild_with_many_hidden_rows_compacts_automatically(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:FIRST])
    down = living.listed(*({"url": living.server.url(name)} for name in NAMES[:3]), name="down.jsonl")
    rebuilt = living.rebuild(takedown=down)
    assert rebuilt.after.database.rows == FIRST - 3
    assert rebuilt.skipped == {"takedown": False, "compact": False, "index": False}
    assert len(living.versions()) == 3  # the second only hid them
    assert [shard.folder is None for shard in rebuilt.after.embeddings.manifest().shards] == [True, False, False]


def test_takedown_list_without_matches_fails_and_registers_nothing(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:4])
    with pytest.raises(InputError, match=r"takedown list .* matches no image of .*: 1 of 1 entries") as caught:
        living.rebuild(takedown=living.listed({"url": "http://host/none.png"}, name="down.jsonl"))
    assert "\n" not in str(caught.value)
    assert len(living.versions()) == 1


def test_takedown_is_champion_before_downloads_start(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:4])
    down = living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl")

    def record_champion() -> Iterator[bytes]:
        champions.append(living.champion())
        yield BODY[NAMES[4]]

    champions: list[set[str]] = []
    living.server.replies[NAMES[4]] = Reply(body=record_champion)
    living.server.replies[NAMES[5]] = Reply(status=503)
    with pytest.raises(StageError, match="none of the 1 URLs"):
        living.rebuild(takedown=down, urls=living.listed(NAMES[5]))
    assert living.champion() == set(NAMES[:4]) - {NAMES[1]}  # although the download failed
    further = living.listed({"url": living.server.url(NAMES[2])}, name="down.jsonl")
    rebuilt = living.rebuild(takedown=further, urls=living.listed(*NAMES[:5]), compact=True)
    assert champions == [{NAMES[0], NAMES[3]}]
    assert living.found(rebuilt.after.database) == living.champion() == {NAMES[0], NAMES[3], NAMES[4]}
    assert rebuilt.after.database.rows == 3  # also compacted
    assert rebuilt.skipped == {"takedown": False, "download": False, "embed": False, "compact": False, "index": False}
    assert len(living.versions()) == 4
    assert living.rebuild(takedown=further, urls=living.listed(*NAMES[:5]), compact=True).unchanged


def test_takedown_of_all_images_leaves_an_empty_version_that_can_grow(
    living: Living, ray: WithoutRay, tmp_path: Path
) -> None:
    from tasks.serve.load import search_database

    living.start(NAMES[:4])
    down = living.listed(*({"url": living.server.url(name)} for name in NAMES[:4]), name="down.jsonl")
    emptied = living.rebuild(takedown=down)
    assert emptied.after.database.uri != emptied.before.database.uri
    assert living.champion() == set()
    assert search_database("shapes", "a red circle", 3, living.settings).rows == []
    for path in Path(emptied.after.images.uri).glob("*.tar"):
        with tarfile.open(path) as tar:
            assert tar.getnames() == [], "the bytes are gone as well"
    assert living.rebuild(takedown=down).unchanged
    assert living.rebuild(urls=living.listed(*NAMES[:4])).unchanged, "a later list cannot bring them back"
    living.rebuild(urls=living.listed(*NAMES[:9]))
    assert living.champion() == set(NAMES[4:9])
    further = [{"url": living.server.url(name)} for name in NAMES[4:9]]
    living.rebuild(takedown=living.listed(*further, name="down.jsonl"))
    living.rebuild(urls=living.listed(*NAMES[9:11]))
    assert living.champion() == set(NAMES[9:11])


def test_rebuild_with_refresh_replaces_changed_images(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:6])
    assert living.rebuild(refresh=True).unchanged
    assert sorted(living.server.requests) == sorted(NAMES[:6])
    living.server.replies[NAMES[1]] = Reply(body=BODY[NAMES[7]])
    rebuilt = living.rebuild(refresh=True)
    assert rebuilt.after.embeddings.manifest().info["embedded"] == 1
    assert living.champion() == set(NAMES[:6])
    found = open_database(rebuilt.after.database, living.folder / "cache").describe(range(6))
    hashes = {row["url"].rpartition("/")[2]: row["sha256"] for row in found}
    assert hashes[NAMES[1][1:]] == hashlib.sha256(BODY[NAMES[7]]).hexdigest()


@pytest.mark.parametrize("field", ["index", "index_changes"])
def test_takedown_stays_hidden_when_the_index_fails(living: Living, ray: WithoutRay, field: str) -> None:
    from tasks.index.config import IndexConfig, IndexOverrides

    living.start(NAMES[:4])
    down = living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl")
    kind = IndexConfig if field == "index" else IndexOverrides
    with pytest.raises(ModelError, match="IVF4X"):
        living.rebuild(takedown=down, **{field: kind(index="IVF4X")})
    assert living.champion() == set(NAMES[:4]) - {NAMES[1]}
    assert living.rebuild(compact_above=1).unchanged


def test_takedown_stays_hidden_when_embedding_fails(
    living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.embed.task import EmbedConfig

    def fails(*_: Any, **__: Any) -> Any:
        raise StageError("the disk is full")

    living.start(NAMES[:4])
    monkeypatch.setattr("flows.rebuild_steps.embed", fails)
    down = living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl")
    with pytest.raises(StageError, match="the disk is full"):
        living.rebuild(takedown=down, embed=EmbedConfig(workers=1, batch_size=2))
    assert living.champion() == set(NAMES[:4]) - {NAMES[1]}


def test_second_rebuild_at_the_same_time_fails_or_waits(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:4])
    started, release = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        started.set()
        release.wait(30)
        yield BODY[NAMES[4]]

    living.server.replies[NAMES[4]] = Reply(body=slowly)
    listed = living.listed(*NAMES[:5])
    results: list[Any] = []
    first = threading.Thread(target=lambda: results.append(living.rebuild(urls=listed)))
    first.start()
    assert started.wait(30)
    with pytest.raises(StageError, match=r"is being written by rebuild-index shapes .* run again") as caught:
        living.rebuild(urls=listed)
    assert "\n" not in str(caught.value)
    with pytest.raises(StageError, match="is being written by rebuild-index"):
        living.collect()
    threading.Timer(1, release.set).start()
    second = living.rebuild(urls=listed, wait_s=30)
    first.join()
    assert second.unchanged
    assert second.before == results[0].after
    assert [version["version"] for version in living.versions()] == [1, 2]


def test_rebuild_resumes_after_kill_before_registration(
    living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.rebuild_index as module

    living.start(NAMES[:4])
    listed = living.listed(*NAMES[:7])
    register = module.register_database

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "register_database", killed)
    with pytest.raises(BaseException):  # noqa: B017  # Prefect changes the type
        living.rebuild(urls=listed)
    assert len(living.versions()) == 1
    monkeypatch.setattr(module, "register_database", register)
    ray.items.clear()
    again = living.rebuild(urls=listed)
    assert (living.server.requests, ray.items) == ([], [])
    assert again.skipped == {"download": True, "embed": True, "index": True}
    assert living.found(again.after.database) == set(NAMES[:7])
    assert len(living.versions()) == 2


@pytest.mark.parametrize(("suffix", "hidden"), [(".tar", True), (".npy", False)])
def test_rebuild_with_missing_shard_fails_with_its_name(
    living: Living, ray: WithoutRay, suffix: str, hidden: bool
) -> None:
    living.start(NAMES[:8])
    source = living.state().images if suffix == ".tar" else living.state().embeddings
    shard = source.manifest().shards[1]
    (Path(source.uri) / shard.file(suffix).name).unlink()
    down = living.listed({"url": living.server.url(NAMES[5])}, name="down.jsonl")
    name = re.escape(shard.file(suffix).name)
    with pytest.raises((IntegrityError, StageError), match=f"{name} is missing though it was committed; restore it"):
        living.rebuild(takedown=down, compact=True)
    assert len(living.versions()) == 1 + hidden  # hiding reads embeddings, but no tar
    if hidden:
        assert living.champion() == set(NAMES[:8]) - {NAMES[5]}


@pytest.mark.slow
def test_rebuild_after_killed_worker_repeats_only_its_shard(living: Living, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        WithoutRay().install(patch)
        living.start(NAMES[:4])
    WithoutRay(on_ray={"images"}).install(monkeypatch)
    with compute.cluster(cores=2):
        killed: list[int] = []

        def kill_worker() -> Iterator[bytes]:
            """Kill the worker that sends the first request."""
            if not killed:
                (worker,) = [
                    int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _is_downloading(p, living)
                ]
                killed.append(worker)
                os.kill(worker, signal.SIGKILL)
                time.sleep(0.2)
            yield BODY[NAMES[9]]

        living.server.replies[NAMES[9]] = Reply(body=kill_worker)
        rebuilt = living.rebuild(urls=living.listed(*NAMES[:12]))
        assert len(killed) == 1
        counts = {name: living.server.requests.count(name) for name in NAMES[:12]}
        assert all(counts[name] == 0 for name in NAMES[:4])
        assert all(counts[name] == 1 for name in NAMES[4:8])  # the previous shard was committed
        assert counts[NAMES[9]] == 2
        assert living.found(rebuilt.after.database) == set(NAMES[:12])
        assert rebuilt.after.images.manifest().info["outcomes"] == {"success": 12}


def _is_downloading(process: Path, living: Living) -> bool:
    """Return True if the process is a Ray worker with a connection to the server."""
    try:
        if b"ray::" not in (process / "cmdline").read_bytes():
            return False
        sockets = {str(link.readlink()) for link in (process / "fd").iterdir() if link.is_symlink()}
        table = (process / "net" / "tcp").read_text().splitlines()[1:]
    except OSError:
        return False
    port = f":{living.server.port:04X}"
    inodes = {f"socket:[{line.split()[9]}]" for line in table if line.split()[2].endswith(port)}
    return bool(sockets & inodes)


def test_rebuild_after_lost_lease_registers_nothing(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:4])

    def steal_lease() -> Iterator[bytes]:
        for path in (living.root / "shapes" / "lease").glob("*.json"):
            path.rename(path.with_name(f"{int(path.stem) + 1:06d}.json"))
        yield BODY[NAMES[4]]

    living.server.replies[NAMES[4]] = Reply(body=steal_lease)
    with pytest.raises(StageError, match=r"the lease on .* was lost"):
        living.rebuild(urls=living.listed(*NAMES[:5]))
    assert len(living.versions()) == 1
    with pytest.raises(StageError), lease(str(living.root / "shapes"), holder="test"):
        raise AssertionError("another writer has the lease")


def test_build_after_lost_champion_files_keeps_takedowns(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:4])
    rebuilt = living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"))
    shutil.rmtree(rebuilt.after.database.uri)
    living.build(NAMES[:4])
    assert living.champion() == set(NAMES[:4]) - {NAMES[1]}


@pytest.mark.parametrize("lost", ["alias", "registry"])
def test_build_without_champion_keeps_takedowns(
    living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    living.start(NAMES[:4])
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"))
    if lost == "alias":
        Registry(living.settings)._client.delete_registered_model_alias("knn-database.shapes", "champion")
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{living.folder}/other.db")
        living.settings = Settings(root=str(living.root))
        assert living.versions() == []
    living.build(NAMES[:4])
    assert living.champion() == set(NAMES[:4]) - {NAMES[1]}


def test_rebuild_after_rollback_hides_all_takedowns_again(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:4])
    for name in NAMES[1:3]:
        living.rebuild(takedown=living.listed({"url": living.server.url(name)}, name="down.jsonl"), compact_above=1)
    Registry(living.settings)._client.set_registered_model_alias("knn-database.shapes", "champion", "1")
    assert living.champion() == set(NAMES[:4])
    living.server.replies[NAMES[5]] = Reply(status=503)
    with pytest.raises(StageError, match="none of the 1 URLs"):
        living.rebuild(urls=living.listed(NAMES[5]), compact_above=1)
    assert living.champion() == {NAMES[0], NAMES[3]}
    rebuilt = living.rebuild(urls=living.listed(*NAMES[:5]), compact_above=1)
    assert rebuilt.registered.alias_uri == "models:/knn-database.shapes@candidate"
    assert living.champion() == {NAMES[0], NAMES[3]}, "the rollback pinned the champion"
    living.call(promote_version, PromoteVersionConfig(name="shapes", root=str(living.root)))
    assert living.champion() == {NAMES[0], NAMES[3], NAMES[4]}
    assert living.rebuild(urls=living.listed(*NAMES[:5]), compact_above=1).after == rebuilt.after
    Registry(living.settings)._client.set_registered_model_alias("knn-database.shapes", "champion", "2")
    living.rebuild(compact_above=1)
    assert living.champion() == {NAMES[0], NAMES[3]}
