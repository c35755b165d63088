"""Garbage collection deletes only unreferenced files, even if files are lost or moved, or other flows run."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.changing_domain import BODY, FIRST, NAMES, Living
from support.fakes import WithoutRay

from infra import artifacts, storage
from infra.errors import InputError, IntegrityError, NotFoundError, StageError
from infra.registry import Registry
from infra.settings import Settings
from tasks.references.database import open_database


def test_collect_keeps_files_of_aliases_and_other_domains(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:FIRST])
    first = living.state().database
    part = living.subset("part", "shapes", 'url like "%circle%"')
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[0])}, name="down.jsonl"), compact=True)
    registry = Registry(living.settings)
    registry._client.set_registered_model_alias("knn-database.shapes", "kept", "1")
    (nothing,) = living.collect(dry_run=False)
    assert living.found(first) == set(NAMES[:FIRST])
    assert not [uri for uri, _ in nothing.files if "/images/" in uri or "/embeddings/" in uri]
    registry._client.delete_registered_model_alias("knn-database.shapes", "kept")
    living.collect(dry_run=False)
    with pytest.raises(NotFoundError, match="not a committed artifact"):
        open_database(first, living.folder / "cache")
    circles = {name for name in NAMES[:FIRST] if "circle" in name}
    assert living.found(part.database.reference) == circles  # its shards are in the folders of "shapes"
    from tasks.references.images import fetch_images

    assert len(fetch_images(part.database.reference, [0, 1], living.folder / "cache")) == 2


def test_collect_keeps_young_and_unfinished_folders(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:4])
    half = living.root / "shapes" / "embeddings" / ("0" * 16) / "shards"
    half.mkdir(parents=True)
    (half / "00000.json").write_text("{}")
    (young,) = living.collect(dry_run=False, grace_s=3600)
    assert (young.files, half.exists()) == ((), True)
    (old,) = living.collect(dry_run=False)
    assert [uri.rsplit("/", 1)[-1] for uri, _ in old.files] == ["00000.json"]
    assert not half.parent.exists()


def test_collect_with_unknown_registry_fails(living: Living, ray: WithoutRay, tmp_path: Path) -> None:
    from tasks.upkeep.garbage import collect

    living.start(NAMES[:4])
    other = Settings(root=str(living.root), tracking=f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(StageError, match=r"no version of shapes is registered at .*other\.db"):
        collect("shapes", other, dry_run=False, grace_s=0)
    with pytest.raises(ValueError, match=r"keep_versions, .* out of range: 0"):
        living.collect(keep_versions=0)


def test_collect_with_damaged_manifest_fails(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:4])
    path = Path(living.state().images.uri) / "manifest.json"
    path.write_text(path.read_text()[:-20])
    files = living.files()
    with pytest.raises(IntegrityError, match="garbage collection is blocked until then"):
        living.collect(dry_run=False)
    assert living.files() == files


@pytest.mark.parametrize("spelled", ["link", "above", "slash", "disk"])
def test_collect_with_any_spelling_of_the_root_keeps_the_champion(
    living: Living, ray: WithoutRay, spelled: str
) -> None:
    living.start(NAMES[:4])
    built = living.state()
    link = living.root.with_name("link")
    link.symlink_to(living.root)
    other = {"link": link, "above": f"{living.root}/../{living.root.name}", "slash": f"{living.root}/"}
    root = other.get(spelled, living.root)
    if spelled == "disk":  # images on a larger disk
        images = living.root / "shapes" / "images"
        images.symlink_to(images.rename(living.root.with_name("larger")))
    files = living.files()
    (nothing,) = living.collect(root=str(root), dry_run=False)
    assert (nothing.files, living.files()) == ((), files)
    assert living.found(built.database) == set(NAMES[:4])


def test_collect_in_moved_root_fails(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:4])
    files = living.files()
    moved = living.root.rename(living.root.with_name("moved"))
    with pytest.raises(InputError, match=r"/moved was moved or copied from .*/data, .* run knn-diffusion relocate"):
        living.collect(root=str(moved), dry_run=False)
    moved.rename(living.root)
    assert living.files() == files


@pytest.mark.parametrize("linked", [False, True])
def test_collect_in_copied_root_fails(living: Living, ray: WithoutRay, linked: bool) -> None:
    living.start(NAMES[:4])
    living.rebuild(urls=living.listed(*NAMES[:5]))
    copy = living.root.with_name("copy")
    shutil.copytree(living.root, copy)  # the registry is below the root and is copied with it
    root = copy.with_name("link") if linked else copy
    if linked:
        root.symlink_to(copy)
    living.root = copy
    files = living.files()
    message = rf"{root} was moved or copied from .*/data, .* run knn-diffusion relocate {root}"
    with pytest.raises(InputError, match=message) as caught:
        living.collect(root=str(root), dry_run=False)
    assert "\n" not in str(caught.value)
    assert living.files() == files


def test_collect_with_generator_registered_outside_root_fails(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:4])
    living.rebuild(urls=living.listed(*NAMES[:5]))
    elsewhere = f"{living.folder}/elsewhere/shapes/generator/{'0' * 16}"
    client = Registry(living.settings)._client
    client.create_registered_model("knn-diffusion")
    client.create_model_version("knn-diffusion", elsewhere, tags={"uri": elsewhere})
    files = living.files()
    with pytest.raises(IntegrityError, match=rf"knn-diffusion version 1 was registered at {elsewhere}, outside"):
        living.collect(dry_run=False)
    assert living.files() == files
    client.set_model_version_tag("knn-diffusion", "1", "uri", elsewhere.replace("/shapes/", "/others/"))
    assert living.collect(dry_run=False)[0].files


def test_collect_with_versions_without_folder_fails(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:4])
    Registry(living.settings)._client.delete_model_version_tag("knn-database.shapes", "1", "uri")
    files = living.files()
    message = r"no version of shapes registered at .* refers to a folder of .*/shapes, so all"
    with pytest.raises(StageError, match=message):
        living.collect(dry_run=False)
    assert living.files() == files


@pytest.mark.parametrize("kind", ["database", "embeddings", "images"])
def test_collect_with_lost_manifest_fails(living: Living, ray: WithoutRay, kind: str) -> None:
    living.start(NAMES[:4])
    (manifest,) = (living.root / "shapes" / kind).glob("*/manifest.json")
    manifest.unlink()
    files = living.files()
    with pytest.raises(
        IntegrityError, match=r"manifest\.json.*restore it.*garbage collection is blocked until then"
    ) as caught:
        living.collect(dry_run=False)
    assert "\n" not in str(caught.value)
    assert living.files() == files


def test_collect_during_merge_keeps_the_inputs_of_the_merge(
    living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.combine_databases as module

    living.start({"shapes": NAMES[:4], "others": NAMES[4:6]})
    register = module.register_database

    def collect_first(*arguments: Any) -> Any:
        down = living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl")
        living.rebuild(takedown=down, compact=True)
        for path in (living.root / "shapes").rglob("*"):
            os.utime(path, (0, 0))
        assert living.collect(grace_s=3600, dry_run=False)[0].files
        return register(*arguments)

    monkeypatch.setattr(module, "register_database", collect_first)
    merged = living.merge("both", "shapes", "others").database.reference
    assert living.found(merged) == set(NAMES[:6])
    from tasks.references.images import fetch_images

    assert len(fetch_images(merged, list(range(6)), living.folder / "cache")) == 6


def test_collect_with_one_failing_domain_collects_the_others(living: Living, ray: WithoutRay) -> None:
    unregistered = living.garbage_beside_what_is_refused()
    before = living.files()
    with pytest.raises(StageError, match="1 of 2 domains were not collected; aa: no version of aa is registered"):
        living.collect(domain=None, dry_run=False)
    assert len(living.files()) < len(before)
    assert unregistered.exists()


def test_collect_of_unknown_domain_fails_and_writes_nothing(living: Living, ray: WithoutRay) -> None:
    with pytest.raises(NotFoundError, match=r"domain does not exist in .*: shapes; use one of: none"):
        living.collect()
    assert not living.root.exists()


def test_collect_after_lost_lease_deletes_nothing(
    living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    living.start(NAMES[:4])
    for name in NAMES[4:6]:
        living.rebuild(urls=living.listed(*NAMES[:4], name))
    assert living.collect()[0].files
    before = living.files()

    def lost(self: Any) -> None:
        raise StageError("the lease was lost")

    monkeypatch.setattr("infra.storage.lease.Lease.check", lost)
    with pytest.raises(StageError, match="the lease was lost"):
        living.collect(dry_run=False)
    assert living.files() == before


def test_collect_after_interruption_resumes_and_does_not_block_other_domains(
    living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.upkeep.garbage import DAY_S, collect

    living.start({"shapes": NAMES[:4], "others": NAMES[4:6]})
    first = living.state().database
    base = f"{living.root}/shapes"
    artifacts.ArtifactBuilder(base, "neighbours", inputs={"database": first.as_input()}, config={}).commit([], info={})
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), compact=True)
    remove, removed = storage.remove, list[str]()

    def fails_after_one(uri: str) -> None:
        if removed:
            raise NotFoundError("the store is locked")
        removed.append(uri)
        remove(uri)

    before = living.files()
    garbage = collect("shapes", living.settings, keep_versions=1, grace_s=0).files
    manifests = sum(uri.endswith("/manifest.json") for uri, _ in garbage)
    assert manifests >= 4
    for _ in range(manifests + 1):
        removed.clear()
        with monkeypatch.context() as patch:
            patch.setattr(storage, "remove", fails_after_one)
            with pytest.raises(NotFoundError, match="the store is locked"):
                collect("shapes", living.settings, keep_versions=1, grace_s=0, dry_run=False)
        collect("others", living.settings, keep_versions=2, grace_s=0)
        for grace_s in (0, DAY_S):
            collect("shapes", living.settings, keep_versions=2, grace_s=grace_s)
    assert len(living.collect(dry_run=False)[0].files) == len(garbage) - manifests - 1
    assert len(living.files()) == len(before) - len(garbage)
    assert [bool(version.get("collected")) for version in living.versions()] == [False, True, True, False]
    assert living.champion() == {NAMES[0], *NAMES[2:4]}


def test_collect_ignores_the_collected_tag_of_a_champion(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:4])
    built = living.state()
    Registry(living.settings).tag("knn-database.shapes", 1, "collected", "2020-01-01")  # and was built again since
    assert living.collect(dry_run=False)[0].files == ()
    (Path(built.database.uri) / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match=r"knn-database.shapes version 1 was registered at .* restore it"):
        living.collect(dry_run=False)


def test_interrupted_takedown_applies_after_a_collection(
    living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    living.start(NAMES[:4])
    with monkeypatch.context() as patch:
        patch.setattr("flows.rebuild_index.register_database", killed)
        with pytest.raises(KeyboardInterrupt):
            living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"))
    assert len(living.versions()) == 1
    assert living.collect(dry_run=False)[0].files  # the version that would have hidden it
    living.rebuild(urls=living.listed(*NAMES[:5]))
    assert living.champion() == {NAMES[0], *NAMES[2:5]}


def test_collect_deletes_takedowns_that_a_later_one_contains(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:6])
    for number in (1, 2, 3):
        living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[number])}, name="down.jsonl"))
    lists = f"{living.root}/shapes/takedown"
    assert len(storage.list_names(lists)) == 3
    living.collect(dry_run=False)
    assert len(storage.list_names(lists)) == 1
    living.rebuild(urls=living.listed(*NAMES[:7]))
    assert living.champion() == {NAMES[0], *NAMES[4:7]}


def test_collect_keeps_unreadable_takedowns(living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:6])
    for number in (1, 2):
        living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[number])}, name="down.jsonl"))
    lists = Path(living.root, "shapes", "takedown")
    for path in lists.glob("*/takedown.parquet"):
        path.write_bytes(b"damaged")
    assert living.collect(dry_run=False)[0].files
    assert len(list(lists.glob("*/takedown.parquet"))) == 2


def test_collect_with_read_only_cache_deletes_and_warns(
    living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        logging.getLogger("knn_diffusion"), "handlers", [caplog.handler]
    )  # Prefect replaces those of the root logger
    living.start(NAMES[:4])
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), compact=True)

    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("infra.storage.eviction.purge", refused)
    monkeypatch.setattr("infra.storage.eviction.has_pending_purges", lambda _: True)
    assert living.collect(dry_run=False)[0].files
    assert living.collect()[0].files == ()
    assert (
        f"cannot purge deleted files from the cache {living.settings.cache_folder}: Permission denied; delete"
        in caplog.text
    )


def test_collect_purges_derived_files_that_were_in_use_later(
    living: Living, ray: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNN_DIFFUSION_CACHE", str(living.folder / "cache"))
    living.start(NAMES[:4])
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), compact=True)
    pixels = living.folder / "cache" / "pixels" / "00000.npy"
    pixels.parent.mkdir(parents=True, exist_ok=True)
    pixels.write_bytes(BODY[NAMES[1]])
    (first,) = living.collect(dry_run=False)
    assert first.files and pixels.exists()
    os.utime(pixels, (0, 0))
    assert living.collect()[0].files == ()
    assert pixels.exists()
    assert living.collect(dry_run=False)[0].files == ()
    assert not pixels.exists()
