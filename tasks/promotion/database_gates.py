"""Gates of a database: recall and failed downloads; lost rows and drift in comparison with the champion."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infra import artifacts
from infra.errors import KNNDiffusionError
from infra.formats import tables
from infra.promotions import GateResult
from tasks.promotion.config import DatabaseGates
from tasks.references.lineage import embeddings_of, images_of, takedown_of
from tasks.references.takedown import Entries, Matcher, read_entries
from tasks.references.types import DatabaseVersion, EmbeddingShards

_COLUMNS = ["key", "url", "sha256"]
_DRIFT_SHARDS = 32  # most shards that are read to measure the drift
_DOWNLOADED = frozenset({"success"})


def measure_database(
    version: DatabaseVersion, champion: DatabaseVersion | None, gates: DatabaseGates, cache: Path
) -> tuple[GateResult, ...]:
    """Measure every enabled gate. Without a champion only recall and failed downloads are measured."""
    info, results = version.manifest().info, []
    for query, least in (("image", gates.recall_image), ("text", gates.recall_text)):
        recall = info[f"recall_at_10_{query}"]
        if least is not None and recall is not None:
            results.append(GateResult(gate=f"recall_{query}", passed=recall >= least, value=float(recall), limit=least))
    if gates.failed_downloads is not None:
        results.append(_failed_downloads(version, gates.failed_downloads))
    if champion is None:
        return tuple(results)
    if gates.lost_rows is not None:
        results.append(_lost_rows(version, champion, gates.lost_rows, cache))
    if gates.drift is not None:
        drift = _distance(_mean(embeddings_of(version), cache), _mean(embeddings_of(champion), cache))
        results.append(GateResult(gate="drift", passed=drift <= gates.drift, value=drift, limit=gates.drift))
    return tuple(results)


def only_hides(version: DatabaseVersion, champion: DatabaseVersion | None, cache: Path) -> bool:
    """Return True if the version has the embeddings of the champion, and takes down more than the champion does."""
    if champion is None:
        return False
    new, old = version.manifest().inputs, champion.manifest().inputs
    if new["embeddings"]["digest"] != old["embeddings"]["digest"]:
        return False
    hidden, before = _taken_down(version, cache), _taken_down(champion, cache)
    return bool(hidden - before) and not before - hidden


def _taken_down(version: DatabaseVersion, cache: Path) -> Entries:
    takedown = takedown_of(version)
    return Entries() if takedown is None else read_entries(takedown, cache)


def failed_share(version: DatabaseVersion) -> float | None:
    """Return the share of listed images that could not be downloaded; None if no downloads are recorded."""
    failed, listed = _downloads(version)
    return failed / listed if listed else None


def _downloads(version: DatabaseVersion) -> tuple[int, int]:
    """Return the numbers of failed and of listed images; both are 0 if no downloads are recorded."""
    try:
        outcomes = images_of(embeddings_of(version)).manifest().info.get("outcomes", {})
    except KNNDiffusionError:  # the image shards of a pushed database are not copied
        outcomes = {}
    failed = sum(count for name, count in outcomes.items() if name not in _DOWNLOADED)
    return failed, sum(outcomes.values())


def _failed_downloads(version: DatabaseVersion, limit: float) -> GateResult:
    failed, listed = _downloads(version)
    if not listed:
        return GateResult(gate="failed_downloads", passed=True, value=None, limit=limit, detail="no downloads")
    share, detail = failed / listed, f"{failed} of {listed}"
    return GateResult(gate="failed_downloads", passed=share <= limit, value=share, limit=limit, detail=detail)


def _lost_rows(version: DatabaseVersion, champion: DatabaseVersion, limit: float, cache: Path) -> GateResult:
    """Measure the share of the champion's images that the version neither has nor has taken down.

    Images are compared by their sha256, or by their URL if it is not recorded.
    """
    new, old = embeddings_of(version), embeddings_of(champion)
    present = {identity for table in _rows(new, cache) for identity in _identities(table)}
    taken_down = Matcher(_taken_down(version, cache))
    lost = total = 0
    for table in _rows(old, cache):
        absent = np.array([identity not in present for identity in _identities(table)], dtype=np.bool_)
        lost += int((absent & ~taken_down.mask(table)).sum())
        total += table.num_rows
    share = lost / total if total else 0.0
    detail = f"{lost} of {total}"
    return GateResult(gate="lost_rows", passed=share <= limit, value=share, limit=limit, detail=detail)


def _identities(table: pa.Table) -> list[str | None]:
    """Return the sha256 of each row, or its URL if the sha256 is missing."""
    rows = zip(table["sha256"].to_pylist(), table["url"].to_pylist(), strict=True)
    return [sha256 or url for sha256, url in rows]


def _rows(embeddings: EmbeddingShards, cache: Path) -> Iterator[pa.Table]:
    for shard in embeddings.manifest().shards:
        yield tables.read_table(artifacts.fetch_shard(embeddings.uri, shard, ".parquet", cache), _COLUMNS)


def _mean(embeddings: EmbeddingShards, cache: Path) -> NDArray[np.float64]:
    """Return the mean embedding (D,) of evenly spaced shards."""
    shards = embeddings.manifest().shards
    chosen = shards[:: -(-len(shards) // _DRIFT_SHARDS) or 1]
    arrays = [np.load(artifacts.fetch_shard(embeddings.uri, one, ".npy", cache), mmap_mode="r") for one in chosen]
    total = np.sum([rows.sum(axis=0, dtype=np.float64) for rows in arrays], axis=0)
    return np.asarray(total / max(1, sum(len(rows) for rows in arrays)), dtype=np.float64)


def _distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return the cosine distance. It is 2 if the widths differ, because the encoders then differ too."""
    if first.shape != second.shape:
        return 2.0
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    return float(1 - first @ second / norms) if norms else 0.0
