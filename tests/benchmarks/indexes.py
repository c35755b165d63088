"""The index that ``auto`` chooses, compared with FAISS Flat, the choice of autofaiss, and hnswlib.

    make bench NAME=index       (ROWS=1000000 for one size; 10 million: hours, 20 GB of memory, 40 GB of disk)

Two others are measured if they are installed, each in its own environment:

    python3.11 -m venv A && A/bin/pip install autofaiss==2.18.0 faiss-cpu==1.12.0 'numpy<2' pyarrow==25.0.1
    python3.11 -m venv H && H/bin/pip install hnswlib numpy
    AUTOFAISS_PYTHON=A/bin/python HNSWLIB_PYTHON=H/bin/python make bench NAME=index

Each of them is searched with the least effort that reaches our recall, or its best recall if it never does. Ours is
then searched with the least effort that reaches theirs. ``qps_ratio`` compares these two, so our recall is not below
theirs. For ours the time is of ``Database.search``, including re-ranking and the neighbours' embeddings; for theirs it
is of the bare search. hnswlib has M 16 and ef_construction 100.

autofaiss is given the memory of our index, and uses a third of it; ``in_its_memory`` is the database that ``auto``
builds with that memory. autofaiss is skipped at 10 million rows: its clustering would take two cores more than a day.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from other_indexes import autofaiss, hnswlib, seconds
from seeded import FOLDER, QUERIES, WIDTH, held_out, row_files, seeded_database

from infra.artifacts import Manifest
from model.retrieval.database import Database
from model.retrieval.ranked_search import SearchEffort
from model.retrieval.recall import GroundTruth, recall
from tasks.references.database import open_database

SIZES = (100_000, 1_000_000, 10_000_000)
AUTOFAISS_ROWS = 1_000_000


def bench_index() -> dict[str, Any]:
    """Return build time, memory, recall on held-out queries and queries/s of the index of ``auto``, for each size.

    With ROWS only that size is measured, and added to earlier results.
    """
    before = Path("build/bench/index.json")
    only = os.environ.get("ROWS")
    sizes = json.loads(before.read_text())["sizes"] if only and before.exists() else {}
    for rows in [int(only)] if only else SIZES:
        sizes[f"{rows:,}"] = _index(rows)
    return {"dimension": WIDTH, "queries": QUERIES, "sizes": sizes}


def _index(rows: int) -> dict[str, Any]:
    with _peak_memory() as peak:
        version, took = seeded_database(rows)
    build_file = FOLDER / str(rows) / "built.json"
    if took:
        build_file.write_text(json.dumps({"build_seconds": took, "peak_mb": peak[0]}))
    database, manifest, truth = open_database(version, FOLDER / "cache"), version.manifest(), held_out(rows)
    found = {
        "factory": manifest.info["factory"],
        **(json.loads(build_file.read_text()) if build_file.exists() else {}),
        "bytes_a_row": _bytes(manifest) / rows,
        **_searched(database, truth),
    }
    found |= _beside("flat", {"queries_s_flat": _flat(rows, truth)}, database, truth, found["recall_at_10"])
    folder, files = FOLDER / str(rows), row_files(rows)
    if rows <= AUTOFAISS_ROWS and (theirs := autofaiss(files, folder, _bytes(manifest), truth, found["recall_at_10"])):
        found |= _beside("autofaiss", theirs, database, truth, theirs["recall_at_10_autofaiss"])
        found["in_its_memory"] = _in_its_memory(rows, theirs, truth)
    if theirs := hnswlib(files, folder, truth, found["recall_at_10"]):
        found |= _beside("hnswlib", theirs, database, truth, theirs["recall_at_10_hnswlib"])
    return found


def _searched(database: Database, truth: GroundTruth) -> dict[str, Any]:
    """Return effort, recall and queries/s of a database."""
    taken = seconds(lambda: database.search(truth.queries, 10))
    return {
        "nprobe": database.effort.nprobe,
        "recall_at_10": recall(database, truth),
        "queries_s": len(truth) / taken,
    }


def _beside(
    other: str, theirs: dict[str, Any], database: Database, truth: GroundTruth, wanted: float
) -> dict[str, Any]:
    """Return the results of another index, and of ours with the least effort that reaches the recall ``wanted``."""
    for nprobe in sorted({*(1 << power for power in range(12)), *(3 << power for power in range(10))}):
        harder = database.with_effort(SearchEffort(nprobe=nprobe, candidates=database.effort.candidates))
        if recall(harder, truth) >= wanted:
            break
    ours = {f"{name}_beside_{other}": value for name, value in _searched(harder, truth).items()}
    return {**theirs, **ours, f"qps_ratio_{other}": ours[f"queries_s_beside_{other}"] / theirs[f"queries_s_{other}"]}


def _in_its_memory(rows: int, theirs: dict[str, Any], truth: GroundTruth) -> dict[str, Any]:
    """Return the results of ``auto`` with the memory of autofaiss's index."""
    version, _ = seeded_database(rows, memory_bytes=int(rows * theirs["bytes_a_row_autofaiss"]))
    database, manifest = open_database(version, FOLDER / "cache"), version.manifest()
    measured = {
        "factory": manifest.info["factory"],
        "bytes_a_row": _bytes(manifest) / rows,
        "candidates": database.effort.candidates,
        **_searched(database, truth),
    }
    return measured | {"qps_ratio_autofaiss": measured["queries_s"] / theirs["queries_s_autofaiss"]}


def _flat(rows: int, truth: GroundTruth) -> float:
    """Return queries/s of FAISS's exact search."""
    flat = faiss.IndexFlatIP(WIDTH)
    for path in row_files(rows):
        flat.add(np.load(path, mmap_mode="r").astype(np.float32))
    return len(truth) / seconds(lambda: flat.search(truth.queries, 10), rounds=2 if rows <= 1_000_000 else 1)


def _bytes(manifest: Manifest) -> int:
    """Return the size of the index: its shards and the shared quantizer."""
    parts = [shard for shard in manifest.shards if "members" in shard.info or shard.name == "quantizer"]
    return sum(file.bytes for shard in parts for file in shard.files)


@contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Measure the peak memory in MB of this process and its descendants, including Ray, without mapped files."""
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
