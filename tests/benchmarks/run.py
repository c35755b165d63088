"""Performance as ratios, each measured in one run against a named reference: ``make bench``, or one by NAME=search.

Writes one JSON for each benchmark below ``build/bench`` and prints what it holds.
"""

import io
import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from PIL import Image

from infra.artifacts import Shard, commit_shard
from infra.shards import write_table
from model.clip import Encoder, EncoderIdentity
from model.retrieval.database import Database, ShardFiles
from model.retrieval.factory import fill_shard, train_index
from tasks.contracts import METADATA_SCHEMA
from tasks.embed import EmbedConfig, _Embed

OUT = Path("build/bench")
WIDTH = 256
ROUNDS = 5


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
    """Images/s from a tar to stored rows, decoding and writing included, against the bare forward pass; one thread."""
    torch.set_num_threads(1)
    count, rng = 512, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = []
        with tarfile.open(folder / "00000.tar", "w") as archive:
            for number in range(count):
                pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).resize((72, 72)).save(buffer, "PNG")
                entry = tarfile.TarInfo(f"{number:09d}.png")
                entry.size = len(buffer.getvalue())
                archive.addfile(entry, io.BytesIO(buffer.getvalue()))
                records.append({"row": number, "key": f"{number:09d}", "status": "success"})
        write_table(records, METADATA_SCHEMA, folder / "00000.parquet")
        source: Shard = commit_shard(str(folder / "images"), "00000", folder, rows=count, info={})
        worker = _Embed(str(folder / "images"), str(folder / "out"), EmbedConfig(), folder)
        encoder = Encoder()
        batch = torch.randn(128, 3, 64, 64)
        ours, bare = paired(
            lambda: worker(("00000", source)), lambda: [encoder.embed_preprocessed(batch) for _ in range(count // 128)]
        )
    return {"images": count, "ratio_bare_forward": bare / ours}


BENCHMARKS = {"search": bench_search, "embed": bench_embed}


def main() -> int:
    """Run what the first argument names, or all."""
    chosen = sys.argv[1:] or list(BENCHMARKS)
    unknown = set(chosen) - set(BENCHMARKS)
    if unknown:
        print(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "faiss": faiss.__version__}
    for name in chosen:
        result = BENCHMARKS[name]()
        (OUT / f"{name}.json").write_text(json.dumps({**result, "machine": machine, "versions": versions}, indent=1))
        print(name)
        for key, value in result.items():
            print(f"  {key:24} {value:.3f}" if isinstance(value, float) else f"  {key:24} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
