"""Databases of seeded rows: index shards, database swaps, and neighbours of all rows.

make bench NAME=shards | swap | neighbours
"""

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
from other_indexes import ROUNDS
from seeded import FOLDER, IDENTITY, QUERIES, WIDTH, clustered, held_out, row_files, seeded_database, seeded_embeddings

from infra import compute, storage
from model.configs import TransformerConfig
from model.networks.dit import build_transformer
from model.pipeline import KNNDiffusionPipeline, new_pipeline
from model.retrieval.database import Database, ShardFiles
from model.retrieval.faiss_index import choose_index, train_index, training_rows
from model.retrieval.index_files import FIRST_ID_SHIFT, fill_shard, merge_shards
from model.retrieval.ranked_search import SearchEffort
from model.retrieval.recall import recall
from tasks.index.config import IndexConfig
from tasks.neighbours import find_neighbours
from tasks.references.database import open_database
from tasks.references.domain_folder import DomainFolder


def bench_shards() -> dict[str, Any]:
    """Return the latency of a database in 16 shards relative to the same rows in one.

    With a million rows, and the inverted lists that ``auto`` chooses for them:

    - ``overhead``: 16 shards of a sixteenth each, as workers fill them before they are merged.
    - ``overhead_grown``: 14 merged shards, and two that were added later.
    - ``overhead_merged``: the 16 shards merged, the one file of a build of this size.
    - ``overhead_full``: 16 full shards of a build, 268 million rows in all. They are simulated by a million rows in a
      256th of the inverted lists, so that a list is as long and has as many parts, with the code that ``auto`` chooses
      for 64 GB.

    Queries are single; ``_batch`` has 1,000 at once.
    """
    rows, full = int(os.environ.get("ROWS", 1_000_000)), 16 * IndexConfig().shard_rows
    factory = choose_index(full, WIDTH, memory_bytes=64 << 30)
    (cells,) = re.findall(r"IVF(\d+)", factory)
    fewer = re.sub(r"IVF\d+(_HNSW32)?", f"IVF{int(cells) * rows // full}", factory)
    large = Sixteenths(rows, "full", fewer, SearchEffort(nprobe=4, candidates=50))
    small = Sixteenths(rows, "shards", choose_index(rows, WIDTH), SearchEffort(nprobe=4))
    measured: dict[str, Any] = {"rows": rows, "shards": 16, "full_stands_for": full, "full_stands_for_index": factory}
    measured["recall_at_10_full"] = recall(large.opened("apart"), held_out(rows))
    queries, same = clustered(QUERIES, seed=10_000_019), []
    for name, database, reference in (
        ("overhead", small.opened("apart"), small.opened("one")),
        ("overhead_grown", small.opened("grown"), small.opened("one")),
        ("overhead_merged", small.opened("merged"), small.opened("one")),
        ("overhead_full", large.opened("apart"), large.opened("one")),
    ):
        both = (database, reference)
        single = [(lambda d=each: [d.search(query[None], 10) for query in queries[:200]]) for each in both]
        batch = [(lambda d=each: d.search(queries, 10)) for each in both]
        for suffix, pair in (("", single), ("_batch", batch)):
            ours, theirs = _paired(*pair)
            measured[name + suffix] = ours / theirs
        same.append(np.array_equal(database.search(queries, 10).ids, reference.search(queries, 10).ids))
    return measured | {"same_neighbours": all(same)}


class Sixteenths:
    """The same rows in index files of several partitions."""

    def __init__(self, rows: int, name: str, factory: str, effort: SearchEffort) -> None:
        """Fill one file with all rows and 16 with a sixteenth each, and merge these."""
        self._folder, self._effort = FOLDER / str(rows) / name, effort
        self._folder.mkdir(parents=True, exist_ok=True)
        whole = np.concatenate([np.load(path, mmap_mode="r") for path in row_files(rows)])
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
        """Open the rows as 16 files, 14 merged and two, 16 merged, or one file."""
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
    """Return the seconds until a running pipeline uses another database, and the number of failed requests."""
    sizes = (10_000, 100_000, 1_000_000)
    versions = {rows: seeded_database(rows)[0] for rows in sizes}
    network = build_transformer(
        TransformerConfig(image_size=8, patch_size=4, layers=1, heads=1, head_width=16),
        embedding_dimension=WIDTH,
        seed=0,
    )
    pipeline = new_pipeline(network, IDENTITY)
    for version in versions.values():
        open_database(version, FOLDER / "cache")  # verify the files once
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
                time.sleep(0.5)  # let requests use the new database
            swaps[f"{rows:,}"] = statistics.median(times)
    return {"swap_s": swaps, "requests": counts["answered"] + counts["lost"], "lost": counts["lost"]}


@contextmanager
def _requests(pipeline: KNNDiffusionPipeline) -> Iterator[dict[str, int]]:
    """Send continuous requests from a second thread, each for the tokens of eight queries."""
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
    """Return rows/s of the neighbours stage relative to FAISS's search of the same index."""
    rows, k = int(os.environ.get("ROWS", 1_000_000)), 10
    version, _ = seeded_database(rows)
    embeddings, cache = seeded_embeddings(rows), FOLDER / "cache"
    database = open_database(version, cache)
    parts = [np.load(path, mmap_mode="r") for path in row_files(rows)]

    index = database.candidate_search.index  # the FAISS index over the same memory-mapped lists
    effort: Any = faiss.SearchParametersIVF(nprobe=database.effort.nprobe)

    def faiss_alone() -> None:
        for part in parts:
            for start in range(0, len(part), 1024):
                index.search(part[start : start + 1024].astype(np.float32), k + 1, params=effort)

    times: dict[str, list[float]] = {"ours": [], "faiss": []}
    with compute.cluster(None, None):
        for number in range(2):
            started = time.perf_counter()
            base = FOLDER / str(rows) / f"run-{os.getpid()}-{number}"
            find_neighbours(embeddings, version, DomainFolder(uri=str(base), cache=cache), k)
            times["ours"].append(time.perf_counter() - started)
            storage.remove(str(base))
            started = time.perf_counter()
            faiss_alone()
            times["faiss"].append(time.perf_counter() - started)
    ours, theirs = min(times["ours"]), min(times["faiss"])
    return {"rows": rows, "k": k, "nprobe": database.effort.nprobe, "ratio_faiss": theirs / ours}


def _paired(ours: Callable[[], object], reference: Callable[[], object]) -> tuple[float, float]:
    """Return the median seconds of both, run alternately, so that a drift of the machine affects both."""
    ours(), reference()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(2 * ROUNDS + 1):
        for function, function_times in zip((ours, reference), times, strict=True):
            started = time.perf_counter()
            function()
            function_times.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])
