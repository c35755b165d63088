"""Seeded rows and their databases for the retrieval benchmarks, stored in ``build/bench/retrieval``.

Rows are unit vectors of width 256 in 1,000 seeded clusters, in files of the largest shard size. Databases are built by
the index stage.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import artifacts, compute, storage
from infra.download.downloader import SHARD_ROWS
from infra.formats.tables import write_table
from model.encoder.identity import EncoderIdentity
from model.retrieval.recall import GroundTruth, exact_neighbours
from tasks.index.config import IndexConfig
from tasks.index.task import index
from tasks.references.domain_folder import DomainFolder
from tasks.references.types import METADATA_SCHEMA, DatabaseVersion, EmbeddingShards

WIDTH = 256
ROWS_PER_SEED = 100_000  # rows of one seed
FOLDER = Path("build/bench/retrieval")
IDENTITY = EncoderIdentity(name="seeded", weights_digest="0" * 64, preprocess_digest="0" * 64, dimension=WIDTH)
QUERIES = 1_000


def clustered(rows: int, seed: int) -> NDArray[np.float32]:
    """Return unit rows (rows, WIDTH) around 1,000 seeded centres, clustered like embeddings."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((1000, WIDTH), dtype=np.float32)
    points = centres[rng.integers(1000, size=rows)] + 0.7 * rng.standard_normal((rows, WIDTH), dtype=np.float32)
    unit: NDArray[np.float32] = points / np.linalg.norm(points, axis=1, keepdims=True)
    return unit


def seeded_embeddings(rows: int) -> EmbeddingShards:
    """Commit embedding shards of seeded rows once. Their metadata is empty, because it is not used."""
    config = {"rows": rows, "shard_rows": SHARD_ROWS}
    stage = artifacts.ArtifactBuilder(str(FOLDER / str(rows)), EmbeddingShards.kind, inputs={}, config=config)
    manifest = stage.committed_manifest()
    if manifest is None:
        done = [_commit(stage, f"{number:05d}", part) for number, part in enumerate(_parts(rows))]
        manifest = stage.commit(done, identity={"encoder": dataclasses.asdict(IDENTITY)}, info={})
    return EmbeddingShards.of(manifest, stage.uri)


def _parts(rows: int) -> Iterator[NDArray[np.float16]]:
    for seed, start in enumerate(range(0, rows, ROWS_PER_SEED), 1):
        generated = clustered(min(ROWS_PER_SEED, rows - start), seed).astype(np.float16)
        yield from np.split(generated, range(SHARD_ROWS, len(generated), SHARD_ROWS))


def _commit(stage: artifacts.ArtifactBuilder, name: str, part: NDArray[np.float16]) -> artifacts.Shard:
    with storage.scratch() as folder:
        (folder / "img_emb").mkdir()
        np.save(folder / "img_emb" / f"img_emb_{name}.npy", part)
        write_table([], METADATA_SCHEMA, folder / "metadata" / f"metadata_{name}.parquet")
        return artifacts.commit_shard(stage.uri, name, folder, rows=len(part), info={})


def seeded_database(rows: int, **config: Any) -> tuple[DatabaseVersion, float]:
    """Return the version that the index stage builds, and its seconds; 0 if it existed."""
    embeddings, base = seeded_embeddings(rows), str(FOLDER / str(rows))
    with compute.cluster(None, None):
        outcome = index(embeddings, DomainFolder(uri=base, cache=FOLDER / "cache"), IndexConfig(**config))
    return outcome.reference, 0.0 if outcome.skipped else outcome.seconds


def held_out(rows: int) -> GroundTruth:
    """Return held-out queries from the same clusters, and their exact neighbours; cached, because they take long."""
    path = FOLDER / str(rows) / "truth.npz"
    if not path.exists():
        parts = [np.load(path, mmap_mode="r") for path in row_files(rows)]
        truth = exact_neighbours(parts, clustered(QUERIES, seed=10_000_019), depth=10)
        np.savez(path, queries=truth.queries, own=truth.own, ids=truth.ids, scores=truth.scores)
    with np.load(path) as found:
        return GroundTruth(**found)


def row_files(rows: int) -> list[Path]:
    embeddings = seeded_embeddings(rows)
    shards = embeddings.manifest().shards
    return [artifacts.fetch_shard(embeddings.uri, shard, ".npy", FOLDER / "cache") for shard in shards]
