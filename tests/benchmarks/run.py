"""Performance as ratios, each measured in one run against a named reference: ``make bench``, or one by NAME=search.

Writes one JSON for each benchmark below ``build/bench`` and prints what it holds. What is committed under ``results``
was copied from there by hand. A GPU is used by what draws pictures (generator) where there is one.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from model.clip import EncoderIdentity
from model.retrieval.database import Database, ShardFiles
from model.retrieval.factory import fill_shard, train_index

OUT = Path("build/bench")
WIDTH = 256
ROUNDS = 5
FULL_SAMPLES, FEW_SAMPLES = 2000, 64


def clustered(rows: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Unit rows (rows, WIDTH) around 1,000 seeded centres, as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((1000, WIDTH), dtype=np.float32)
    points = centres[rng.integers(1000, size=rows)] + 0.7 * rng.standard_normal((rows, WIDTH), dtype=np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def paired(ours: Callable[[], object], reference: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of both, run in turn after one warm-up each, so that a drifting machine drifts for both."""
    ours(), reference()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for function, kept in zip((ours, reference), times, strict=True):
            started = time.perf_counter()
            function()
            kept.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def opened(folder: Path, rows: np.ndarray[Any, Any], shards: int) -> Database:
    """A database of ``rows`` in equal shards."""
    template = folder / "template.faiss"
    faiss.write_index(train_index("Flat", WIDTH, rows[:1]), str(template))
    files = []
    for number, part in enumerate(np.array_split(rows.astype(np.float16), shards)):
        files.append(
            ShardFiles(index=folder / f"{shards}-{number}.faiss", embeddings=folder / f"{shards}-{number}.npy")
        )
        np.save(files[-1].embeddings, part)
        fill_shard(template, part, files[-1].index)
    identity = EncoderIdentity(name="seeded", weights_digest="", preprocess_digest="", dimension=WIDTH)
    return Database(files, encoder=identity)


def bench_search() -> dict[str, Any]:
    """Search with exact re-rank against FAISS's own search of the same rows; 8 shards against one."""
    rows, queries = clustered(100_000, 1), clustered(256, 2)
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(rows)
    with tempfile.TemporaryDirectory() as folder:
        one, eight = opened(Path(folder), rows, 1), opened(Path(folder), rows, 8)
        ours, faiss_s = paired(lambda: one.search(queries, 10), lambda: flat.search(queries, 10))
        sharded, whole = paired(lambda: eight.search(queries, 10), lambda: one.search(queries, 10))
    return {
        "rows": len(rows),
        "queries": len(queries),
        "ratio_faiss": faiss_s / ours,
        "shards_8_overhead": sharded / whole,
    }


def bench_embed() -> dict[str, Any]:
    """Embedding against the bare model and clip-retrieval, see embed.py."""
    from embed import bench_embed as bench

    return bench()


def bench_download() -> dict[str, Any]:
    """The guarded download against plain img2dataset, see download.py."""
    from download import bench_download as bench

    return bench()


def bench_generator(samples: int | None, named: bool) -> dict[str, Any]:
    """The embedded generator with neighbours and without, see generator.py; drawn in full only when asked for."""
    from generator import bench_generator as bench

    if samples is None:
        samples = FULL_SAMPLES if named else FEW_SAMPLES
        print(
            f"generator: {samples} samples; SAMPLES=… for another number. Its figures are stated for {FULL_SAMPLES}, "
            "hours on a CPU; a killed run goes on where it was"
        )
    return bench(samples, _device())


def main() -> int:
    """Run what is named, or all."""
    benchmarks = ("search", "embed", "download", "generator")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(benchmarks)}; all unless told")
    parser.add_argument("--samples", type=int, help=f"of the generator: {FULL_SAMPLES}, or {FEW_SAMPLES} without NAME")
    options = parser.parse_args()
    unknown = set(options.names) - set(benchmarks)
    if unknown:
        print(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(benchmarks)}", file=sys.stderr)
        return 2
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "search": bench_search,
        "embed": bench_embed,
        "download": bench_download,
        "generator": lambda: bench_generator(options.samples, named=bool(options.names)),
    }
    OUT.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "faiss": faiss.__version__}
    for name in options.names or benchmarks:
        torch.set_num_threads(_cores())
        result = run[name]()
        machine = _machine(result.get("device", "cpu"))
        (OUT / f"{name}.json").write_text(json.dumps({**result, "machine": machine, "versions": versions}, indent=1))
        print(name)
        show(result)
    return 0


def show(values: dict[str, Any], indent: str = "  ") -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{key:26} {value:.3f}" if isinstance(value, float) else f"{indent}{key:26} {value}")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _machine(device: str) -> dict[str, Any]:
    """What was measured on; the GPU where one was used."""
    machine: dict[str, Any] = {"processor": platform.processor() or platform.machine(), "cores": _cores()}
    return machine | ({"gpu": torch.cuda.get_device_name()} if device.startswith("cuda") else {})


if __name__ == "__main__":
    sys.exit(main())
