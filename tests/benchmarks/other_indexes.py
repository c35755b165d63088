"""Other index libraries on the same rows, each in its own environment; see indexes.py."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from model.retrieval.recall import GroundTruth

ROUNDS = 5
"""Rounds; the median counts."""


def autofaiss(files: Sequence[Path], folder: Path, bytes_: int, truth: GroundTruth, wanted: float) -> dict[str, Any]:
    python = os.environ.get("AUTOFAISS_PYTHON")
    if not python:
        print("index: AUTOFAISS_PYTHON is not set: skipping autofaiss; indexes.py describes its installation")
        return {}
    path = folder / "autofaiss.index"
    if not path.exists():
        script = (
            "import sys; from autofaiss import build_index; "
            "build_index(embeddings=sys.argv[1], index_path=sys.argv[2], "
            "index_infos_path=sys.argv[2] + '.json', metric_type='ip', max_index_memory_usage=sys.argv[3], "
            "current_memory_available='8G', save_on_disk=True)"
        )
        memory = f"{bytes_ / 2**20:.0f}MB"
        started = time.monotonic()
        subprocess.run([python, "-c", script, str(files[0].parent), str(path), memory], check=True, capture_output=True)
        path.with_suffix(".seconds").write_text(str(time.monotonic() - started))
    index = faiss.read_index(str(path))
    infos = json.loads(Path(f"{path}.json").read_text())
    knob = "nprobe" if faiss.try_extract_index_ivf(index) is not None else "efSearch"
    best = (0.0, 0.0)
    for value in (1 << power for power in range(12)):
        faiss.ParameterSpace().set_index_parameter(index, knob, value)
        got = recall_of(index.search(truth.queries, 10)[1], truth)
        if got > best[0] + 1e-3:
            best = got, len(truth) / seconds(lambda: index.search(truth.queries, 10))
        if got >= min(wanted, 0.999):
            break
    return {
        "autofaiss": infos.get("index_key", ""),
        "recall_at_10_autofaiss": best[0],
        "queries_s_autofaiss": best[1],
        "bytes_a_row_autofaiss": path.stat().st_size / index.ntotal,
        "build_seconds_autofaiss": float(path.with_suffix(".seconds").read_text()),
    }


_HNSWLIB = """
import json, sys, time, os
import hnswlib, numpy as np
files, queries, truth, wanted, kept = json.loads(sys.argv[1]), np.load(sys.argv[2]), np.load(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
threads, rows = len(os.sched_getaffinity(0)), sum(len(np.load(f, mmap_mode="r")) for f in files)
index = hnswlib.Index(space="ip", dim=queries.shape[1]); started = time.monotonic()
if os.path.exists(kept):
    index.load_index(kept, max_elements=rows); seconds = float(open(kept + ".seconds").read())
else:
    index.init_index(max_elements=rows, M=16, ef_construction=100)
    first = 0
    for f in files:
        part = np.load(f).astype(np.float32); index.add_items(part, np.arange(first, first + len(part)), num_threads=threads); first += len(part)
    seconds = time.monotonic() - started; index.save_index(kept); open(kept + ".seconds", "w").write(str(seconds))
for ef in (10, 15, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480, 640):
    index.set_ef(ef); times = []
    for _ in range(5):
        begun = time.perf_counter(); ids, _ = index.knn_query(queries, k=10, num_threads=threads); times.append(time.perf_counter() - begun)
    recall = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), truth.tolist())]))
    if recall >= wanted: break
print(json.dumps({"hnswlib": f"M 16, ef {ef}", "recall_at_10_hnswlib": recall, "queries_s_hnswlib": len(queries) / sorted(times)[2], "bytes_a_row_hnswlib": os.path.getsize(kept) / rows, "build_seconds_hnswlib": seconds}))
"""  # noqa: E501


def hnswlib(files: Sequence[Path], folder: Path, truth: GroundTruth, wanted: float) -> dict[str, Any]:
    python = os.environ.get("HNSWLIB_PYTHON")
    if not python:
        print("index: HNSWLIB_PYTHON is not set: skipping hnswlib; indexes.py describes its installation")
        return {}
    np.save(folder / "queries.npy", truth.queries)
    np.save(folder / "true.npy", truth.ids[:, :10])
    listed = json.dumps([str(path) for path in files])
    arguments = [listed, folder / "queries.npy", folder / "true.npy", str(wanted), folder / "hnswlib.index"]
    done = subprocess.run([python, "-c", _HNSWLIB, *map(str, arguments)], check=True, capture_output=True, text=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def recall_of(ids: NDArray[np.int64], truth: GroundTruth) -> float:
    return float(
        np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), truth.ids[:, :10].tolist(), strict=True)])
    )


def seconds(function: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return median seconds after a warm-up."""
    function()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
