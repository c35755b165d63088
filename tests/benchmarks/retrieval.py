"""Databases of seeded rows: the index that ``auto`` takes beside others', shards, swaps, and neighbours of all rows.

    make bench NAME=index       (ROWS=1000000 for one size; the 10 million take half an hour and 8 GB of disk)
    make bench NAME=shards | swap | neighbours

Rows are 256 wide, unit, in 1,000 seeded clusters. Databases are built by the real stage and kept below
``build/bench/retrieval``. Two others are measured where they are at hand, each in an environment of its own:

    python3.11 -m venv A && A/bin/pip install autofaiss==2.18.0 faiss-cpu==1.12.0 'numpy<2' pyarrow==25.0.1
    python3.11 -m venv H && H/bin/pip install hnswlib numpy
    AUTOFAISS_PYTHON=A/bin/python HNSWLIB_PYTHON=H/bin/python make bench NAME=index

autofaiss is given the memory that our index takes, and its index is searched by this FAISS at the least effort that has
our recall (or its best, where it never has). hnswlib (M 16, ef_construction 100) is searched likewise. What is timed of
ours is ``Database.search``, re-ranking and the neighbours' embeddings included; of theirs the bare search.
"""

import dataclasses
import json
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray
from other_indexes import ROUNDS, autofaiss, hnswlib, seconds

from infra import artifacts, compute, storage
from infra.shards import write_table
from model.encoder_identity import EncoderIdentity
from model.networks.dit import TransformerConfig, build_transformer
from model.pipeline import KNNDiffusionPipeline, new_pipeline
from model.retrieval.database import Database, SearchEffort, ShardFiles
from model.retrieval.factory import (
    FIRST_ID_SHIFT,
    choose_index,
    fill_shard,
    merge_shards,
    train_index,
    training_rows,
)
from model.retrieval.recall import Truth, find_truth, recall
from tasks.contracts import METADATA_SCHEMA, DatabaseVersion, EmbeddingShards
from tasks.databases import open_database
from tasks.index import IndexConfig, build_database
from tasks.neighbours import find_neighbours

WIDTH = 256
SHARD_ROWS = 100_000
FOLDER = Path("build/bench/retrieval")
IDENTITY = EncoderIdentity(name="seeded", weights_digest="0" * 64, preprocess_digest="0" * 64, dimension=WIDTH)
QUERIES = 1_000
SIZES = (100_000, 1_000_000, 10_000_000)
COMPARED_ROWS = 1_000_000  # beyond, the others take hours to build on two cores


def clustered(rows: int, seed: int) -> NDArray[np.float32]:
    """Unit rows (rows, WIDTH) around 1,000 seeded centres, as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((1000, WIDTH), dtype=np.float32)
    points = centres[rng.integers(1000, size=rows)] + 0.7 * rng.standard_normal((rows, WIDTH), dtype=np.float32)
    unit: NDArray[np.float32] = points / np.linalg.norm(points, axis=1, keepdims=True)
    return unit


def seeded_embeddings(rows: int) -> EmbeddingShards:
    """Committed embedding shards of so many seeded rows; made once. Their metadata has no rows: nobody asks for it."""
    stage = artifacts.Stage(str(FOLDER / str(rows)), EmbeddingShards.kind, inputs={}, config={"rows": rows})
    manifest = stage.committed()
    if manifest is None:
        done = []
        for number, start in enumerate(range(0, rows, SHARD_ROWS)):
            name = f"{number:05d}"
            with storage.scratch() as folder:
                (folder / "img_emb").mkdir()
                part = clustered(min(SHARD_ROWS, rows - start), seed=1 + number).astype(np.float16)
                np.save(folder / "img_emb" / f"img_emb_{name}.npy", part)
                write_table([], METADATA_SCHEMA, folder / "metadata" / f"metadata_{name}.parquet")
                done.append(artifacts.commit_shard(stage.uri, name, folder, rows=len(part), info={}))
        manifest = stage.commit(done, identity={"encoder": dataclasses.asdict(IDENTITY)}, info={})
    return EmbeddingShards.of(manifest, stage.uri)


def seeded_database(rows: int) -> tuple[DatabaseVersion, float]:
    """The version that the index stage builds of them, and the seconds that took; 0 when it was there."""
    config = IndexConfig(near_duplicate_cosine=1.0)  # random rows have no near-duplicates to look for
    with compute.cluster(None, None):
        outcome = build_database(seeded_embeddings(rows), str(FOLDER / str(rows)), config, cache=FOLDER / "cache")
    return outcome.reference, 0.0 if outcome.skipped else outcome.seconds


def bench_index() -> dict[str, Any]:
    """Build, memory, recall on held-out queries and queries/s of what ``auto`` takes, for each size.

    With ROWS it is that size beside those that were measured before.
    """
    before = Path("build/bench/index.json")
    asked = os.environ.get("ROWS")
    sizes = json.loads(before.read_text())["sizes"] if asked and before.exists() else {}
    for rows in [int(asked)] if asked else SIZES:
        sizes[f"{rows:,}"] = _index(rows)
    return {"dimension": WIDTH, "queries": QUERIES, "sizes": sizes}


def _index(rows: int) -> dict[str, Any]:
    with _peak_memory() as peak:
        version, took = seeded_database(rows)
    told = FOLDER / str(rows) / "built.json"
    if took:
        told.write_text(json.dumps({"build_seconds": took, "peak_mb": peak[0]}))
    database, manifest = open_database(version, FOLDER / "cache"), version.manifest()
    truth = _held_out(rows)
    bytes_ = sum(file.bytes for shard in manifest.shards if "members" in shard.info for file in shard.files)
    bytes_ += sum(file.bytes for shard in manifest.shards if shard.name == "quantizer" for file in shard.files)
    found = {
        "factory": manifest.info["factory"],
        **(json.loads(told.read_text()) if told.exists() else {}),
        "bytes_a_row": bytes_ / rows,
        "nprobe": database.effort.nprobe,
        "recall_at_10": recall(database, truth),
        "queries_s": QUERIES / seconds(lambda: database.search(truth.queries, 10)),
    }
    if rows <= COMPARED_ROWS:
        parts = [np.load(path, mmap_mode="r") for path in _row_files(rows)]
        flat = faiss.IndexFlatIP(WIDTH)
        for part in parts:
            flat.add(part.astype(np.float32))
        found["queries_s_flat"] = QUERIES / seconds(lambda: flat.search(truth.queries, 10), rounds=2)
        del flat
        folder = FOLDER / str(rows)
        found |= autofaiss(_row_files(rows), folder, bytes_, truth, found["recall_at_10"])
        found |= hnswlib(_row_files(rows), folder, truth, found["recall_at_10"])
        again = QUERIES / seconds(lambda: database.search(truth.queries, 10))
        found["queries_s"] = statistics.mean([found["queries_s"], again])  # before and after the others
        for other in ("flat", "autofaiss", "hnswlib"):
            if f"queries_s_{other}" in found:
                found[f"qps_ratio_{other}"] = found["queries_s"] / found[f"queries_s_{other}"]
    return found


def _held_out(rows: int) -> Truth:
    """Queries of the same clusters that are no rows, and their true neighbours; kept, for they take a while."""
    kept = FOLDER / str(rows) / "truth.npz"
    if not kept.exists():
        parts = [np.load(path, mmap_mode="r") for path in _row_files(rows)]
        truth = find_truth(parts, clustered(QUERIES, seed=10_000_019), depth=10)
        np.savez(kept, queries=truth.queries, own=truth.own, ids=truth.ids, scores=truth.scores)
    with np.load(kept) as found:
        return Truth(**found)


def _row_files(rows: int) -> list[Path]:
    embeddings = seeded_embeddings(rows)
    shards = embeddings.manifest().shards
    return [artifacts.fetch_shard(embeddings.uri, shard, ".npy", FOLDER / "cache") for shard in shards]


def bench_shards() -> dict[str, Any]:
    """Latency of a database in 16 shards against the same rows in one.

    ``overhead`` is of 16 as a build leaves them: full, 268 million rows in all. Those do not fit here: a million rows
    in a 256th of the cells stand for them, so that a cell is as long, and in as many pieces, in the code that ``auto``
    takes of 64 GB. All else is of a million rows in the cells that ``auto`` gives a million: ``overhead_small`` of 16
    shards as workers fill them, before they are merged; ``overhead_grown`` of 14 merged and two that were added since;
    ``overhead_merged`` of the 16 merged, the one file that a build leaves of so many. Queries come one by one;
    ``_batch`` is of 1,000 at once.
    """
    rows, full = int(os.environ.get("ROWS", 1_000_000)), 16 * IndexConfig().shard_rows
    factory = choose_index(full, WIDTH, memory_bytes=64 << 30)
    (cells,) = re.findall(r"IVF(\d+)", factory)
    fewer = re.sub(r"IVF\d+(_HNSW32)?", f"IVF{int(cells) * rows // full}", factory)
    large = Sixteenths(rows, "full", fewer, SearchEffort(nprobe=4, candidates=50))
    small = Sixteenths(rows, "shards", choose_index(rows, WIDTH), SearchEffort(nprobe=4))
    told: dict[str, Any] = {"rows": rows, "shards": 16, "stands_for": full, "stands_for_index": factory}
    told["recall_at_10"] = recall(large.opened("apart"), _held_out(rows))
    queries, same = clustered(QUERIES, seed=10_000_019), []
    for name, database, reference in (
        ("overhead", large.opened("apart"), large.opened("one")),
        ("overhead_small", small.opened("apart"), small.opened("one")),
        ("overhead_grown", small.opened("grown"), small.opened("one")),
        ("overhead_merged", small.opened("merged"), small.opened("one")),
    ):
        both = (database, reference)
        single = [(lambda d=each: [d.search(query[None], 10) for query in queries[:200]]) for each in both]
        batch = [(lambda d=each: d.search(queries, 10)) for each in both]
        for suffix, pair in (("", single), ("_batch", batch)):
            ours, theirs = _paired(*pair)
            told[name + suffix] = ours / theirs
        same.append(np.array_equal(database.search(queries, 10).ids, reference.search(queries, 10).ids))
    return told | {"same_neighbours": all(same)}


class Sixteenths:
    """The same rows in index files cut in several ways."""

    def __init__(self, rows: int, name: str, factory: str, effort: SearchEffort) -> None:
        """Fill one of all rows, 16 of a sixteenth each, and merge these."""
        self._folder, self._effort = FOLDER / str(rows) / name, effort
        self._folder.mkdir(parents=True, exist_ok=True)
        whole = np.concatenate([np.load(path, mmap_mode="r") for path in _row_files(rows)])
        sample = whole[:: max(1, rows // training_rows(factory, rows))].astype(np.float32)
        self._template = self._folder / "quantizer.faiss"
        faiss.write_index(train_index(factory, WIDTH, sample), str(self._template))
        first, parts = 0, []
        for number, part in enumerate(np.array_split(whole, 16)):
            np.save(self._folder / f"{number}.npy", part)
            fill_shard(self._template, [part], self._index(number), ordinal=number)
            parts.append((self._index(number), first - (number << FIRST_ID_SHIFT)))
            first += len(part)
        fill_shard(self._template, [whole], self._index("one"))
        merge_shards(parts, self._index("merged"))
        merge_shards(parts[:14], self._index("most"))

    def opened(self, cut: Literal["apart", "grown", "merged", "one"]) -> Database:
        """The rows in 16, in 14 merged and two, in 16 merged, or filled at once."""
        apart = [(self._index(number), range(number, number + 1)) for number in range(16)]
        cuts = {"apart": apart, "grown": [(self._index("most"), range(14)), *apart[14:]]}
        files = [
            ShardFiles(index=index, embeddings=tuple(self._folder / f"{n}.npy" for n in held), ordinal=held.start)
            for index, held in cuts.get(cut, [(self._index(cut), range(16))])
        ]
        return Database(files, encoder=IDENTITY, quantizer=self._template, effort=self._effort)

    def _index(self, name: str | int) -> Path:
        return self._folder / f"{name}.faiss"


def bench_swap() -> dict[str, Any]:
    """Seconds until a running pipeline draws from another database, and requests lost meanwhile."""
    sizes = (10_000, 100_000, 1_000_000)
    versions = {rows: seeded_database(rows)[0] for rows in sizes}
    network = build_transformer(
        TransformerConfig(image_size=8, patch_size=4, layers=1, heads=1, head_width=16),
        embedding_dimension=WIDTH,
        seed=0,
    )
    pipeline = new_pipeline(network, IDENTITY)
    for version in versions.values():
        open_database(version, FOLDER / "cache")  # warm: files verified once
    pipeline.swap_database(open_database(versions[10_000], FOLDER / "cache"))
    swaps: dict[str, float] = {}
    with _requests(pipeline) as counts:
        for rows, version in versions.items():
            times = []
            for _ in range(ROUNDS):
                pipeline.swap_database(open_database(versions[10_000], FOLDER / "cache"))
                started = time.perf_counter()
                pipeline.swap_database(open_database(version, FOLDER / "cache"))
                times.append(time.perf_counter() - started)
                time.sleep(0.5)  # requests go on from the new one
            swaps[f"{rows:,}"] = statistics.median(times)
    return {"swap_s": swaps, "requests": counts["answered"] + counts["lost"], "lost": counts["lost"]}


@contextmanager
def _requests(pipeline: KNNDiffusionPipeline) -> Iterator[dict[str, int]]:
    """Requests all the time from a second thread, each for the tokens of eight queries."""
    import torch

    counts, ended = {"answered": 0, "lost": 0}, threading.Event()
    queries = torch.from_numpy(clustered(8, seed=3))

    def ask() -> None:
        while not ended.is_set():
            try:
                tokens, _, hits = pipeline.condition(queries, 10)
                whole = hits is not None and bool((hits.ids >= 0).all()) and bool(tokens.isfinite().all())
            except Exception:
                whole = False
            counts["answered" if whole else "lost"] += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield counts
    finally:
        ended.set()
        thread.join()


def bench_neighbours() -> dict[str, Any]:
    """Rows/s of the job that finds every row's neighbours against FAISS's own search of the same index."""
    rows, k = int(os.environ.get("ROWS", 1_000_000)), 10
    version, _ = seeded_database(rows)
    embeddings, cache = seeded_embeddings(rows), FOLDER / "cache"
    database = open_database(version, cache)
    parts = [np.load(path, mmap_mode="r") for path in _row_files(rows)]

    def faiss_alone() -> None:
        for part in parts:
            for start in range(0, len(part), 1024):
                queries = part[start : start + 1024].astype(np.float32)
                database.proposer.propose(queries, k + 1, database.effort.nprobe)

    times: dict[str, list[float]] = {"ours": [], "faiss": []}
    with compute.cluster(None, None):
        for number in range(2):
            started = time.perf_counter()
            base = FOLDER / str(rows) / f"run-{os.getpid()}-{number}"
            find_neighbours(embeddings, version, str(base), k, cache=cache)
            times["ours"].append(time.perf_counter() - started)
            storage.remove(str(base))
            started = time.perf_counter()
            faiss_alone()
            times["faiss"].append(time.perf_counter() - started)
    ours, theirs = min(times["ours"]), min(times["faiss"])
    return {"rows": rows, "k": k, "nprobe": database.effort.nprobe, "ratio_faiss": theirs / ours}


def _paired(ours: Callable[[], object], reference: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of both, run in turn, so that a drifting machine drifts for both."""
    ours(), reference()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(2 * ROUNDS + 1):
        for function, kept in zip((ours, reference), times, strict=True):
            started = time.perf_counter()
            function()
            kept.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


@contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Most MB that this process and all below it (Ray's own among them) held at once, mapped files not counted."""
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            peak[0] = max(peak[0], sum(map(_anonymous_mb, _family(os.getpid()))))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _family(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def _anonymous_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Anonymous:")), 0.0)
