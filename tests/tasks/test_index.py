"""The index stage on seeded rows: shards, growth from an earlier version, hidden rows, faults."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from fakes import Killed, WithoutRay
from numpy.typing import NDArray

import tasks.index
from infra import artifacts, compute, storage
from infra.errors import IntegrityError, StageError
from infra.registry import Registry
from infra.settings import Settings
from infra.shards import write_table
from model import clip
from model.errors import ModelError
from model.retrieval.recall import Truth, find_truth
from tasks import fill, hide, tune
from tasks.contracts import METADATA_SCHEMA, DatabaseVersion, EmbeddingShards, Takedown
from tasks.databases import HIDDEN, QUANTIZER, TRUTH, index_shards, open_database
from tasks.distribute import distributed_database
from tasks.index import IndexConfig, build_database
from tasks.neighbours import find_neighbours
from tasks.register import register_database
from tasks.takedown import Entries, commit_takedown

CONFIG = IndexConfig(index="IVF8,SQfp16", shard_rows=250, recall_queries=30, near_duplicate_cosine=0.9999)
Parts = Sequence[NDArray[np.float16]]


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[WithoutRay]:
    """Workers in this process, except for the tests that are about them."""
    fake = WithoutRay()
    if "on_ray" not in request.keywords:
        fake.install(monkeypatch)
    with compute.cluster(None, 2):
        yield fake


def stored(base: Path, parts: Parts, *, first: int = 0, previous: EmbeddingShards | None = None) -> EmbeddingShards:
    """Embedding shards of ``parts``, numbered from ``first``, behind those of ``previous``; urls tell row from row."""
    identity = {"encoder": dataclasses.asdict(tiny.identity())}
    total = sum(map(len, parts)) + (previous.rows if previous else 0)
    stage = artifacts.Stage(str(base), EmbeddingShards.kind, inputs={}, config={"rows": total, "first": first})
    done = [] if previous is None else [one.taken_over(previous.uri) for one in previous.manifest().shards]
    for number, rows in enumerate(parts, start=first):
        name = f"{number:05d}"
        with storage.scratch() as folder:
            (folder / "img_emb").mkdir()
            np.save(folder / "img_emb" / f"img_emb_{name}.npy", rows)
            urls = [{"row": n, "key": f"{name}{n:04d}", "url": f"http://{name}/{n}"} for n in range(len(rows))]
            write_table(urls, METADATA_SCHEMA, folder / "metadata" / f"metadata_{name}.parquet")
            done.append(artifacts.commit_shard(stage.uri, name, folder, rows=len(rows), info={}))
    return EmbeddingShards.of(stage.commit(done, identity=identity, info={}), stage.uri)


def build(embeddings: EmbeddingShards, base: Path, config: IndexConfig = CONFIG, **options: Any) -> DatabaseVersion:
    return build_database(embeddings, str(base), config, cache=base / "cache", **options).reference


def exact(queries: NDArray[Any], rows: NDArray[np.float16], k: int, without: set[int] = frozenset()) -> list[list[int]]:  # type: ignore[assignment]
    order = np.argsort(-(queries.astype(np.float64) @ rows.astype(np.float64).T), axis=1, kind="stable")
    return [[row for row in one if row not in without][:k] for one in order.tolist()]


def everything(version: DatabaseVersion, base: Path) -> Any:
    """The open version, visiting every cell."""
    database = open_database(version, base / "cache")
    return database.with_effort(dataclasses.replace(database.effort, nprobe=max(1, database.proposer.cells)))


def test_embedding_shards_are_gathered_into_index_shards(tmp_path: Path) -> None:
    rows = tiny.unit_rows(600)
    version = build(stored(tmp_path, np.split(rows, 6)), tmp_path)
    manifest = version.manifest()
    assert [shard.info["members"] for shard in index_shards(version)] == [
        ["00000", "00001"], ["00002", "00003"], ["00004", "00005"],
    ]  # fmt: skip
    assert (manifest.rows, manifest.info["factory"]) == (600, "IVF8,SQfp16")
    assert manifest.info["recall_at_10_image"] >= 0.95
    assert {"nprobe", "candidates", "recall_at_10_image", "latency_ms"} <= manifest.info["curve"][0].keys()
    assert storage.read_bytes(storage.join(version.uri, "recall.png")).startswith(b"\x89PNG")
    queries = tiny.unit_rows(9, seed=3)
    assert everything(version, tmp_path).search(queries, 5).ids.tolist() == exact(queries, rows, 5)


def test_a_version_grows_by_what_is_new_alone(tmp_path: Path) -> None:
    rows = tiny.unit_rows(700)
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
    queries = np.concatenate([tiny.unit_rows(9, seed=3), rows[650:652]])
    assert everything(second, tmp_path).search(queries, 5).ids.tolist() == exact(queries, rows, 5)
    again = build_database(after, str(tmp_path), CONFIG, cache=tmp_path / "cache", previous=first)
    assert (again.skipped, again.reference) == (True, second)


def test_a_shard_filled_in_parts_is_the_one_filled_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = stored(tmp_path, np.split(tiny.unit_rows(600), 6))
    config = dataclasses.replace(CONFIG, shard_rows=400)
    monkeypatch.setattr(fill, "PART_ROWS", 150)

    merged = build(embeddings, tmp_path / "parts", config)

    monkeypatch.setattr(fill, "PART_ROWS", 1000)
    whole = build(embeddings, tmp_path / "whole", config)
    assert merged.digest == whole.digest
    assert [len(shard.info["members"]) for shard in index_shards(merged)] == [4, 2]
    assert not list(Path(merged.uri).glob("parts*")), "parts are gone once they are merged"
    ours, theirs = (shard.info["error"] for version in (merged, whole) for shard in index_shards(version)[:1])
    assert ours == pytest.approx(theirs, rel=0.2)  # of other rows of the sample


def test_a_build_killed_between_parts_and_merge_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: WithoutRay
) -> None:
    embeddings = stored(tmp_path, np.split(tiny.unit_rows(600), 6))
    config = dataclasses.replace(CONFIG, shard_rows=600)
    monkeypatch.setattr(fill, "PART_ROWS", 150)
    merge = fill._Merge

    class KilledMerge(merge):
        def __call__(self, item: Any) -> Any:
            raise Killed

    monkeypatch.setattr(fill, "_Merge", KilledMerge)
    with pytest.raises(Killed):
        build(embeddings, tmp_path, config)
    asked = [name for _, (name, _) in alone.items]
    assert asked == ["00000", "00001", "00002", "00003", "00004", "00005", "00000"]
    monkeypatch.setattr(fill, "_Merge", merge)
    monkeypatch.setattr(fill, "_Fill", None)  # nothing is filled again

    version = build(embeddings, tmp_path, config)

    assert [shard.rows for shard in index_shards(version)] == [600]


def test_shards_that_rows_were_added_in_are_merged_as_they_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny.unit_rows(1300)
    config = dataclasses.replace(CONFIG, shard_rows=1000)
    embeddings = stored(tmp_path, np.split(rows[:800], 8))
    version = build(embeddings, tmp_path, config)
    seen = []
    for number in range(8, 13):
        more = rows[100 * number : 100 * (number + 1)]
        embeddings = stored(tmp_path, [more], first=number, previous=embeddings)
        version = build(embeddings, tmp_path, config, previous=version)
        seen.append([shard.rows for shard in index_shards(version)])
    # The first would be merged too when the others have 400 rows, were it not for shard_rows.
    assert seen == [[800, 100], [800, 200], [800, 300], [800, 300, 100], [800, 500]]
    queries = np.concatenate([tiny.unit_rows(9, seed=3), rows[[850, 1010, 1250]]])
    assert everything(version, tmp_path).search(queries, 5).ids.tolist() == exact(queries, rows, 5)


def test_growing_by_nothing_twice_changes_nothing(tmp_path: Path) -> None:
    rows = tiny.unit_rows(300)
    embeddings = stored(tmp_path, np.split(rows, 3))
    version = build(embeddings, tmp_path)
    for number in (3, 4):  # every new picture was a copy, or gone
        embeddings = stored(tmp_path, [rows[:0]], first=number, previous=embeddings)
        version = build(embeddings, tmp_path, previous=version)
    queries = tiny.unit_rows(9, seed=3)
    assert everything(version, tmp_path).search(queries, 5).ids.tolist() == exact(queries, rows, 5)


def test_an_index_that_cannot_be_merged_is_filled_anew_from_its_rows(tmp_path: Path) -> None:
    rows = tiny.unit_rows(500)
    config = dataclasses.replace(CONFIG, index="HNSW8", shard_rows=1000)
    before = stored(tmp_path, np.split(rows[:300], 3))
    first = build(before, tmp_path, config)
    after = stored(tmp_path, np.split(rows[300:], 2), first=3, previous=before)

    second = build(after, tmp_path, config, previous=first)

    assert [(shard.rows, shard.folder) for shard in index_shards(second)] == [(500, None)]
    assert second.manifest().info["recall_at_10_image"] >= 0.95


def test_rows_taken_down_and_near_duplicates_are_hidden(tmp_path: Path) -> None:
    rows = tiny.unit_rows(300)
    rows[250] = rows[20]
    embeddings = stored(tmp_path, np.split(rows, 3))
    takedown = commit_takedown(Entries(url=frozenset({"http://00001/7", "http://00002/99"})), str(tmp_path), info={})
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
    assert (counted["near_duplicates"], counted["hidden"]) == (1, 2), "counted, and returned, unless told otherwise"


def test_what_was_hidden_stays_hidden_in_what_grows_from_it(tmp_path: Path) -> None:
    rows = tiny.unit_rows(400)
    rows[350] = rows[30]
    before = stored(tmp_path, np.split(rows[:300], 3))
    config = dataclasses.replace(CONFIG, dedup=True)
    takedown = commit_takedown(Entries(url=frozenset({"http://00001/7"})), str(tmp_path), info={}).reference
    first = build(before, tmp_path, config, takedown=takedown)
    more = commit_takedown(
        Entries(url=frozenset({"http://00001/7", "http://00003/5"})), str(tmp_path), info={}
    ).reference
    after = stored(tmp_path, [rows[300:]], first=3, previous=before)
    for asked, hidden in ((takedown, {107, 350}), (more, {107, 305, 350})):
        version = build(after, tmp_path, config, previous=first, takedown=asked)
        assert hidden_in(version, tmp_path) == hidden


def test_of_a_group_of_near_duplicates_another_is_shown_when_the_first_is_taken_down(tmp_path: Path) -> None:
    rows = tiny.unit_rows(300)
    rows[[250, 270]] = rows[20]
    turned = tiny.unit(rows[[30]] + 0.1 * tiny.unit_rows(2, seed=5))  # 30 joins two that are no near-duplicates
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


def hidden_in(version: DatabaseVersion, base: Path) -> set[int]:
    """The rows that an open version does not show."""
    database = open_database(version, base / "cache")
    return set(np.setdiff1d(np.arange(database.stored), database.ids()).tolist())


def truth_of(version: DatabaseVersion, kind: str, base: Path) -> dict[str, NDArray[Any]]:
    """A version's queries of a kind and their true neighbours."""
    (shard,) = (shard for shard in version.manifest().shards if shard.name == TRUTH)
    return dict(np.load(artifacts.fetch_shard(version.uri, shard, f"{kind}.npz", base / "cache")))


def queries_of(version: DatabaseVersion, base: Path) -> NDArray[np.int64]:
    """The rows that are a version's image queries."""
    return truth_of(version, "image", base)["own"]


def without(rows: NDArray[np.int64], base: Path) -> Takedown:
    """A takedown of some of :func:`stored`'s rows, in parts of 100."""
    urls = frozenset(f"http://{row // 100:05d}/{row % 100}" for row in rows.tolist())
    return commit_takedown(Entries(url=urls), str(base), info={}).reference


@pytest.mark.parametrize(("gone", "drawn_anew"), [(15, False), (16, True), (30, True)])
def test_queries_that_were_taken_down_are_replaced_when_few_are_left(
    tmp_path: Path, gone: int, drawn_anew: bool
) -> None:
    embeddings = stored(tmp_path, np.split(tiny.unit_rows(300), 3))
    first = build(embeddings, tmp_path)
    queries = queries_of(first, tmp_path)
    assert len(queries) == 30

    second = build(embeddings, tmp_path, previous=first, takedown=without(queries[:gone], tmp_path))

    assert second.manifest().info["image_queries"] == (30 if drawn_anew else 30 - gone)
    assert second.manifest().info["recall_at_10_image"] >= 0.95
    assert not np.isin(queries[:gone], queries_of(second, tmp_path)).any()


def test_queries_are_drawn_anew_from_twice_the_rows(tmp_path: Path) -> None:
    rows, config = tiny.unit_rows(200), dataclasses.replace(CONFIG, max_drift=1e9)
    embeddings = stored(tmp_path, [rows[:100]])
    version = build(embeddings, tmp_path, config)
    drawn = [queries_of(version, tmp_path)]
    for number, more in enumerate((rows[100:150], rows[150:]), start=1):
        embeddings = stored(tmp_path, [more], first=number, previous=embeddings)
        version = build(embeddings, tmp_path, config, previous=version)
        drawn.append(queries_of(version, tmp_path))
    np.testing.assert_array_equal(drawn[1], drawn[0])
    assert len(drawn[2]) == 30
    assert drawn[2].max() >= 150, "the first new rows were half as many, these are as many as there were"


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
def test_changed_settings_hold_in_what_grows_as_in_what_is_built_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(clip, "encoder_for", lambda identity: Words())
    rows = tiny.unit_rows(400)
    rows[150:180] = rows[10:40]
    before = stored(tmp_path, np.split(rows[:300], 3))
    config = dataclasses.replace(CONFIG, dedup=True, texts=("one", "two"), max_drift=1e9)
    first = build(before, tmp_path, config)
    after = stored(tmp_path, [rows[300:]], first=3, previous=before)
    changed = dataclasses.replace(config, **changes)

    grown = build(after, tmp_path, changed, previous=first)

    anew = build(after, tmp_path / "anew", changed)
    assert grown.manifest().info["shards_taken_over"] > 0
    assert hidden_in(grown, tmp_path) == hidden_in(anew, tmp_path)
    for name in ("near_duplicates", "image_queries", "text_queries"):
        assert grown.manifest().info[name] == anew.manifest().info[name]
    for kind in ("image", "text"):
        ours, theirs = (truth_of(version, kind, tmp_path) for version in (grown, anew))
        np.testing.assert_array_equal(ours["queries"], theirs["queries"])
        np.testing.assert_array_equal(ours["ids"], theirs["ids"])


class Words:
    """An encoder of texts."""

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([tiny.unit_rows(1, seed=len(text)) for text in texts])).float()


def test_auto_takes_its_own_choice_where_another_index_was_asked_for_before(tmp_path: Path) -> None:
    embeddings = stored(tmp_path, np.split(tiny.unit_rows(600), 6))
    first = build(embeddings, tmp_path)
    auto = dataclasses.replace(CONFIG, index="auto")
    second = build(embeddings, tmp_path, auto, previous=first)
    assert second.manifest().info["factory"] == "Flat"
    flat = build(embeddings, tmp_path / "flat", dataclasses.replace(CONFIG, index="Flat"))
    same = build(embeddings, tmp_path / "flat", auto, previous=flat)
    assert same.manifest().info["shards_taken_over"] == 3, "what it would take itself is kept"


def test_a_version_without_pictures_to_measure_with_is_told_of_registered_and_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = stored(tmp_path, np.split(tiny.unit_rows(300), 3))

    def none_left(database: Any, *_: Any) -> Truth:
        return find_truth(database.parts, np.empty((0, tiny.WIDTH), np.float32))

    with monkeypatch.context() as patch:
        patch.setattr(tune, "_pictures", none_left)
        built = build_database(embeddings, str(tmp_path), CONFIG, cache=tmp_path / "cache")
    assert built.note.startswith("IVF8,SQfp16, no pictures to measure with, no texts to measure with")
    settings = Settings(root=str(tmp_path / "data"))
    register_database("shapes", built.reference, settings)
    (listed,) = Registry(settings).versions("database")
    assert listed["index"] == "IVF8,SQfp16"
    assert "recall_at_10_image" not in listed
    takedown = without(np.arange(3), tmp_path)
    after = build(embeddings, tmp_path, previous=built.reference, takedown=takedown)
    assert after.manifest().info["image_queries"] == 30


def test_a_quantizer_that_no_longer_fits_is_trained_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    near = tiny.unit(np.eye(tiny.WIDTH)[0] + 0.2 * np.random.default_rng(0).normal(size=(600, tiny.WIDTH)))
    before = stored(tmp_path, np.split(near.astype(np.float16), 6))
    first = build(before, tmp_path)
    after = stored(tmp_path, [-near[:50].astype(np.float16)], first=6, previous=before)
    with caplog.at_level(logging.INFO):
        logging.getLogger("knn_diffusion").addHandler(caplog.handler)
        second = build(after, tmp_path, previous=first)
        logging.getLogger("knn_diffusion").removeHandler(caplog.handler)
    assert {shard.folder for shard in second.manifest().shards} == {None}
    assert "trained anew: its error on new rows grew by" in caplog.text
    unmoved = dataclasses.replace(CONFIG, max_drift=1e9)
    kept = build(after, tmp_path, unmoved, previous=first)
    assert kept.manifest().info["shards_taken_over"] == 3


def test_rows_that_no_cells_describe_well_have_the_quantizer_trained_once(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    near = tiny.unit(np.eye(tiny.WIDTH)[0] + 0.2 * random.normal(size=(600, tiny.WIDTH)))
    hard = random.normal(size=(400, tiny.WIDTH))
    hard[:, [0, -1]] = 0
    embeddings = stored(tmp_path, np.split(near.astype(np.float16), 6))
    version, trained = build(embeddings, tmp_path), []
    nights = [*np.split(tiny.unit(hard), 4), -near[:50]]  # the last are harder still
    for number, rows in enumerate(nights, start=6):
        embeddings = stored(tmp_path, [rows.astype(np.float16)], first=number, previous=embeddings)
        version = build(embeddings, tmp_path, previous=version)
        (quantizer,) = (shard for shard in version.manifest().shards if shard.name == QUANTIZER)
        trained.append(quantizer.folder is None)
    assert trained == [True, False, False, False, True]


def test_after_compaction_only_the_shards_that_changed_are_filled(tmp_path: Path) -> None:
    rows = tiny.unit_rows(600)
    parts = np.split(rows, 6)
    before = stored(tmp_path, parts)
    first = build(before, tmp_path)
    smaller = stored(tmp_path / "smaller", [*parts[:2], parts[2][10:], *parts[3:]])

    second = build(smaller, tmp_path, previous=first)

    assert [shard.folder is None for shard in index_shards(second)] == [False, True, False]
    kept = np.delete(rows, np.arange(200, 210), axis=0)
    queries = tiny.unit_rows(9, seed=3)
    assert everything(second, tmp_path).search(queries, 5).ids.tolist() == exact(queries, kept, 5)


def test_another_target_is_tuned_for_anew_and_not_from_what_the_last_one_needed(tmp_path: Path) -> None:
    embeddings = stored(tmp_path, np.split(tiny.unit_rows(600), 6))
    strict = build(embeddings, tmp_path, dataclasses.replace(CONFIG, target_recall=0.99))
    assert strict.manifest().info["effort"]["nprobe"] >= 4, "else the next line shows nothing"
    lax = build(embeddings, tmp_path, dataclasses.replace(CONFIG, target_recall=0.1), previous=strict)
    assert lax.manifest().info["effort"]["nprobe"] == 1


def test_a_recall_below_the_target_is_not_committed(tmp_path: Path) -> None:
    embeddings = stored(tmp_path, [tiny.unit_rows(3_000)])
    config = dataclasses.replace(CONFIG, index="PQ1x4", target_recall=1.0)
    with pytest.raises(StageError, match=r"PQ1x4 reaches recall_at_10_image 0\.\d+, the target is 1\.0; name a finer"):
        build(embeddings, tmp_path, config)
    folders = list((tmp_path / "database").iterdir())
    assert not any((folder / "manifest.json").exists() for folder in folders)


def test_what_is_taken_down_is_hidden_though_recall_then_misses_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tiny.unit_rows(400)
    embeddings = stored(tmp_path, np.split(rows[:300], 3))
    first = build(embeddings, tmp_path)
    down = commit_takedown(Entries(url=frozenset({"http://00001/7"})), str(tmp_path), info={}).reference
    tuned = tasks.index.tune_database

    def just_below(*arguments: Any) -> Any:
        shard, measured = tuned(*arguments)
        return shard, {**measured, "recall_at_10_image": 0.9473}

    monkeypatch.setattr("tasks.index.tune_database", just_below)
    more = stored(tmp_path, [rows[300:]], first=3, previous=embeddings)
    finer = dataclasses.replace(CONFIG, recall_queries=29)
    for other in (
        lambda: build(embeddings, tmp_path, takedown=down),
        lambda: build(more, tmp_path, previous=first, takedown=down),
        lambda: build(embeddings, tmp_path, finer, previous=first, takedown=down),
    ):
        with pytest.raises(StageError, match=r"reaches recall_at_10_image 0\.947, the target is 0\.95"):
            other()
    with caplog.at_level("WARNING"):
        version = build(embeddings, tmp_path, previous=first, takedown=down)
    assert version.manifest().info["taken_down"] == 1
    assert "hides what was taken down all the same: IVF8,SQfp16 reaches recall_at_10_image 0.947" in caplog.text


@pytest.mark.parametrize("which", ["00002.faiss", "quantizer.faiss"])
def test_a_flipped_byte_in_an_index_is_found(tmp_path: Path, which: str) -> None:
    version = build(stored(tmp_path, np.split(tiny.unit_rows(600), 6)), tmp_path)
    (path,) = Path(version.uri).rglob(which)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match=rf"{which} differs from its committed digest"):
        open_database(version, tmp_path / "cache")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    version = build(stored(tmp_path, np.split(tiny.unit_rows(600), 6)), tmp_path)
    (path,) = Path(version.uri).rglob("00002.faiss")
    path.unlink()
    with pytest.raises(IntegrityError, match=r"00002\.faiss is missing though it was committed"):
        open_database(version, tmp_path / "cache")


@pytest.mark.on_ray
def test_a_database_on_actors_answers_as_one(tmp_path: Path) -> None:
    rows = tiny.unit_rows(600)
    rows[500] = rows[3]
    takedown = commit_takedown(Entries(url=frozenset({"http://00004/9"})), str(tmp_path), info={}).reference
    version = build(stored(tmp_path, np.split(rows, 6)), tmp_path, takedown=takedown)
    whole = open_database(version, tmp_path / "cache")
    queries, own = rows[[3, 5, 409]], np.array([3, 5, 409])
    with distributed_database(version, tmp_path / "cache", actors=2, cpus_each=0.5) as spread:
        assert len(spread) == len(whole) == 599
        for options in ({}, {"exclude": own}):
            ours, theirs = spread.search(queries, 7, **options), whole.search(queries, 7, **options)
            np.testing.assert_array_equal(ours.ids, theirs.ids)
            np.testing.assert_array_equal(ours.embeddings, theirs.embeddings)
        pipeline = tiny.pipeline(None)
        pipeline.swap_database(spread)
        asked = torch.from_numpy(queries).float()
        conditioned = pipeline.condition(asked, 3)
        assert torch.equal(conditioned.tokens, pipeline.condition(asked, 3, database=whole).tokens)
        np.testing.assert_array_equal(spread.rows(np.array([[0, 599], [300, 1]])), rows[[[0, 599], [300, 1]]])
        assert spread.describe([407])[0]["url"] == "http://00004/7"
        with pytest.raises(ModelError, match="k is 0"):
            spread.search(queries, 0)
        with pytest.raises(ModelError, match="has no row 600; its ids go from 0 to 599"):
            spread.describe([600])
    all_of_a_part = commit_takedown(
        Entries(url=frozenset(f"http://{shard:05d}/{n}" for shard in (4, 5) for n in range(100))),
        str(tmp_path),
        info={},
    ).reference
    version = build(stored(tmp_path, np.split(rows, 6)), tmp_path, takedown=all_of_a_part)
    whole = open_database(version, tmp_path / "cache")
    version = dataclasses.replace(version, uri=f"{version.uri}/")  # as somebody may type it
    with distributed_database(version, tmp_path / "cache", actors=3, cpus_each=0.5) as spread:
        assert spread.name == whole.name == tmp_path.name
        for options in ({}, {"exclude": own}):
            ours, theirs = spread.nearest(queries, 7, **options), whole.nearest(queries, 7, **options)
            np.testing.assert_array_equal(ours.ids, theirs.ids)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"near_duplicate_cosine": 0.0}, "near_duplicate_cosine lies above 0"),
        ({"shard_rows": 0}, "must be at least 1"),
        ({"target_recall": 1.5}, "between 0 and 1"),
        ({"max_drift": -1.0}, "max_drift at 0 or above"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        IndexConfig(**changes)


def test_hidden_rows_are_files_of_the_version(tmp_path: Path) -> None:
    version = build(stored(tmp_path, np.split(tiny.unit_rows(300), 3)), tmp_path)
    (hidden,) = (shard for shard in version.manifest().shards if shard.name == HIDDEN)
    assert {file.name for file in hidden.files} == {"hidden.npy", "pairs.npy", "taken.npy"}


def test_a_version_that_outgrows_its_memory_is_coded_anew_in_fewer_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.retrieval.factory.FLAT_ROWS", 100)
    monkeypatch.setattr("tasks.quantize.FLAT_ROWS", 100)
    rows = tiny.unit_rows(1200)
    auto = dataclasses.replace(CONFIG, index="auto", memory_bytes=1200 * (tiny.WIDTH + 8))
    first = stored(tmp_path, np.split(rows[:600], 6))
    small = build(first, tmp_path, auto)
    assert small.manifest().info["factory"].endswith("SQfp16")
    more = stored(tmp_path, np.split(rows[600:], 6), first=6, previous=first)
    assert build(more, tmp_path, auto, previous=small).manifest().info["factory"].endswith("SQ8")
    with pytest.raises(ModelError, match="memory_bytes allows 0; raise it"):
        build(more, tmp_path, dataclasses.replace(auto, memory_bytes=1200 * 8), previous=small)


def test_more_memory_is_used_by_the_next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.retrieval.factory.FLAT_ROWS", 100)
    monkeypatch.setattr("tasks.quantize.FLAT_ROWS", 100)
    embeddings = stored(tmp_path, np.split(tiny.unit_rows(600), 6))
    tight = dataclasses.replace(CONFIG, index="auto", memory_bytes=600 * (tiny.WIDTH + 8))
    small = build(embeddings, tmp_path, tight)
    assert small.manifest().info["factory"].endswith("SQ8")
    wide = dataclasses.replace(tight, memory_bytes=600 * (2 * tiny.WIDTH + 8))
    assert build(embeddings, tmp_path, wide, previous=small).manifest().info["factory"].endswith("SQfp16")


@pytest.mark.parametrize("factory", ["IDMap,Flat", "NSG16", "LSH", "IVFoops", ""])
def test_a_factory_string_that_no_shards_can_be_made_of_is_refused_before_anything_is_written(
    factory: str, tmp_path: Path
) -> None:
    embeddings = stored(tmp_path, [tiny.unit_rows(50)])
    with pytest.raises(ModelError, match="take auto, or") as raised:
        build(embeddings, tmp_path, dataclasses.replace(CONFIG, index=factory))
    assert "faiss::" not in str(raised.value)
    assert not list(tmp_path.glob("database/*"))


def test_a_row_is_not_its_own_neighbour_wherever_the_database_has_it_from(tmp_path: Path) -> None:
    rows = tiny.unit_rows(600)
    ours = stored(tmp_path / "ours", np.split(rows[:300], 3))
    elsewhere = np.concatenate([rows[300:], rows[100:200][::-1]])
    database = build(stored(tmp_path / "theirs", np.split(elsewhere, 4)), tmp_path / "theirs")
    found = find_neighbours(ours, database, str(tmp_path / "ours"), 5, cache=tmp_path / "cache").reference
    for shard, theirs in zip(found.manifest().shards, np.split(rows[:300], 3), strict=True):
        neighbours = elsewhere[np.load(artifacts.fetch_shard(found.uri, shard, ".npy", tmp_path / "cache"))]
        assert neighbours.shape == (100, 5, tiny.WIDTH)
        assert not (neighbours == theirs[:, None]).all(axis=2).any()


def test_near_duplicates_of_many_shards_are_looked_for_in_groups(
    tmp_path: Path, alone: WithoutRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny.unit_rows(600)
    rows[[29, 30, 599]] = rows[[580, 3, 31]]
    monkeypatch.setattr(hide, "_GROUP_ROWS", 100)
    version = build(stored(tmp_path, np.split(rows, 20)), tmp_path)
    groups = [item for what, item in alone.items if what == "near-duplicates"]
    assert [[first for _, first in group] for group in groups] == [
        [0, 30, 60], [90, 120, 150], [180, 210, 240], [270, 300, 330], [360, 390, 420], [450, 480, 510], [540, 570],
    ]  # fmt: skip
    (hidden,) = (shard for shard in version.manifest().shards if shard.name == HIDDEN)
    pairs = np.load(artifacts.fetch_shard(version.uri, hidden, "pairs.npy", tmp_path / "cache"))
    unit = tiny.unit(rows.astype(np.float64))
    cosines = np.triu(unit @ unit.T, 1)
    assert pairs.tolist() == np.argwhere(cosines >= CONFIG.near_duplicate_cosine).tolist()
    assert {(3, 30), (29, 580), (31, 599)} <= set(map(tuple, pairs.tolist()))
