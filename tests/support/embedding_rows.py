"""Embedding shards of given rows without images, databases of them, and the contents of a version."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support import tiny_models

from infra import artifacts, storage
from infra.formats.tables import write_table
from tasks.index.config import IndexConfig
from tasks.index.task import index
from tasks.references.database import TRUTH, open_database
from tasks.references.domain_folder import DomainFolder
from tasks.references.takedown import Entries
from tasks.references.types import METADATA_SCHEMA, DatabaseVersion, EmbeddingShards, Takedown
from tasks.upkeep.takedown import commit_takedown

CONFIG = IndexConfig(index="IVF8,SQfp16", shard_rows=250, recall_queries=30, near_duplicate_cosine=0.9999)
Parts = Sequence[NDArray[np.float16]]


def stored(base: Path, parts: Parts, *, first: int = 0, previous: EmbeddingShards | None = None) -> EmbeddingShards:
    """Commit embedding shards of ``parts``, numbered from ``first``, after those of ``previous``. URLs are unique."""
    identity = {"encoder": dataclasses.asdict(tiny_models.identity())}
    total = sum(map(len, parts)) + (previous.rows if previous else 0)
    stage = artifacts.ArtifactBuilder(
        str(base), EmbeddingShards.kind, inputs={}, config={"rows": total, "first": first}
    )
    done = [] if previous is None else [one.reused_from(previous.uri) for one in previous.manifest().shards]
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
    return index(embeddings, DomainFolder(uri=str(base), cache=base / "cache"), config, **options).reference


def exact(queries: NDArray[Any], rows: NDArray[np.float16], k: int, without: set[int] = frozenset()) -> list[list[int]]:  # type: ignore[assignment]
    order = np.argsort(-(queries.astype(np.float64) @ rows.astype(np.float64).T), axis=1, kind="stable")
    return [[row for row in one if row not in without][:k] for one in order.tolist()]


def everything(version: DatabaseVersion, base: Path) -> Any:
    """Open a version so that searches visit every inverted list."""
    database = open_database(version, base / "cache")
    return database.with_effort(dataclasses.replace(database.effort, nprobe=max(1, database.candidate_search.cells)))


def hidden_in(version: DatabaseVersion, base: Path) -> set[int]:
    """Return the ids of the hidden rows of a version."""
    database = open_database(version, base / "cache")
    return set(np.setdiff1d(np.arange(database.stored), database.ids()).tolist())


def truth_of(version: DatabaseVersion, kind: str, base: Path) -> dict[str, NDArray[Any]]:
    """Return the queries of a kind of a version, and their exact neighbours."""
    (shard,) = (shard for shard in version.manifest().shards if shard.name == TRUTH)
    return dict(np.load(artifacts.fetch_shard(version.uri, shard, f"{kind}.npz", base / "cache")))


def queries_of(version: DatabaseVersion, base: Path) -> NDArray[np.int64]:
    """Return the row ids of the image queries of a version."""
    return truth_of(version, "image", base)["own"]


def without(rows: NDArray[np.int64], base: Path) -> Takedown:
    """Commit a takedown of rows of :func:`stored` in parts of 100."""
    urls = frozenset(f"http://{row // 100:05d}/{row % 100}" for row in rows.tolist())
    return commit_takedown(Entries(url=urls), DomainFolder(uri=str(base)), info={}).reference
