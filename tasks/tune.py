"""Tune: how hard a new database must look to reach its recall, measured with held-out queries of both kinds."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import artifacts, storage
from model.retrieval.database import Database, SearchEffort
from model.retrieval.recall import Truth, find_truth
from model.retrieval.tuning import Point, tune
from tasks.contracts import EmbeddingShards, encoder_of
from tasks.databases import TRUTH, open_shards
from tasks.hide import Grown

CURVE = "recall.png"
RECALL_AT = 10


def tune_database(
    folder_uri: str,
    indexed: Sequence[artifacts.Shard],
    hidden: artifacts.Shard,
    embeddings: EmbeddingShards,
    cache: Path,
    config: Any,
    grown: Grown | None,
) -> tuple[artifacts.Shard, dict[str, Any]]:
    """The shard of queries with their true neighbours, and what the manifest tells of effort and recall.

    A database that ``grown`` describes keeps its queries: of these only the new rows are looked at for the truth.
    ``config`` is the :class:`tasks.index.IndexConfig`. The curve is drawn into the folder as ``recall.png``.
    """
    barred = np.load(artifacts.fetch_shard(folder_uri, hidden, "hidden.npy", cache))
    database = open_shards(
        folder_uri, indexed, embeddings, cache, name="tuned", effort=SearchEffort(), hidden=barred, rows_at_once=False
    )
    if grown is not None:
        truths = {kind: _grown(database, truth, grown.rows, barred) for kind, truth in _read(grown, cache).items()}
    else:
        truths = _chosen(database, barred, embeddings, config)
    before = None if grown is None else _effort_before(grown, config.target_recall)
    best, measured = tune(database, truths, config.target_recall, before=before)
    storage.write_bytes(storage.join(folder_uri, CURVE), _drawn(measured, best, config.target_recall))
    recalls = {f"recall_at_10_{kind}": best.recalls[kind] if len(truth) else None for kind, truth in truths.items()}
    info = {
        **recalls,
        "effort": {"nprobe": best.effort.nprobe, "candidates": best.effort.candidates},
        "exact": database.exact,
        "curve": [point.as_row() for point in measured],
        **{f"{kind}_queries": len(truth) for kind, truth in truths.items()},
    }
    with storage.scratch() as folder:
        for kind, truth in truths.items():
            np.savez(
                folder / f"{kind}.npz",
                queries=truth.queries,
                own=truth.own,
                ids=truth.ids,
                scores=truth.scores.round(6),
            )
        return artifacts.commit_shard(folder_uri, TRUTH, folder, rows=0, info={}), info


def _chosen(
    database: Database,
    hidden: NDArray[np.int64],
    embeddings: EmbeddingShards,
    config: Any,
) -> dict[str, Truth]:
    """Queries drawn by the config's seed, and their truth."""
    encoder = encoder_of(embeddings.manifest())
    rng = np.random.default_rng(config.seed)
    picked = rng.choice(database.ids(), min(config.recall_queries, len(database)), replace=False)
    texts = np.empty((0, encoder.dimension), dtype=np.float32)
    if config.texts:
        from model.clip import encoder_for  # only texts need the encoder, which takes seconds to import

        chosen = rng.choice(len(config.texts), min(config.recall_queries, len(config.texts)), replace=False)
        texts = encoder_for(encoder).embed_texts([config.texts[i] for i in chosen]).numpy()
    own = database.rows(picked)
    return {
        "image": find_truth(database.parts, own.astype(np.float32), own=picked, own_rows=own, hidden=hidden),
        "text": find_truth(database.parts, texts, hidden=hidden),
    }


def _grown(database: Database, before: Truth, rows: int, hidden: NDArray[np.int64]) -> Truth:
    """The truth of the same queries over more rows; queries that were hidden meanwhile are left out."""
    before = before.only(~np.isin(before.own, hidden))
    own_rows = before.own_rows
    own = None if own_rows is None else before.own
    # Rows that were there before are known down to the last of those kept: below it, one of them may be nearer.
    lowest = np.where(before.ids >= 0, before.scores, np.inf).min(axis=1, keepdims=True)
    truth = find_truth(
        database.parts, before.queries, own=own, own_rows=own_rows, hidden=hidden, grown_from=(before, rows)
    )
    unknown = truth.scores < lowest
    truth.ids[unknown], truth.scores[unknown] = -1, -np.inf
    again = np.flatnonzero((truth.ids >= 0).sum(axis=1) < RECALL_AT)
    if len(again):
        some = find_truth(
            database.parts,
            truth.queries[again],
            own=None if own is None else own[again],
            own_rows=None if own_rows is None else own_rows[again],
            hidden=hidden,
        )
        truth.ids[again], truth.scores[again] = some.ids, some.scores
    return truth


def _effort_before(grown: Grown, target: float) -> SearchEffort | None:
    """What the version before needs for the same target."""
    manifest = grown.version.manifest()
    same = manifest.config["target_recall"] == target
    return SearchEffort(**manifest.info["effort"]) if same else None


def _read(grown: Grown, cache: Path) -> dict[str, Truth]:
    (shard,) = (shard for shard in grown.version.manifest().shards if shard.name == TRUTH)
    truths = {}
    for kind in ("image", "text"):
        with np.load(artifacts.fetch_shard(grown.version.uri, shard, f"{kind}.npz", cache)) as kept:
            truths[kind] = Truth(**kept)
    return truths


def _drawn(points: Sequence[Point], best: Point, target: float) -> bytes:
    """The recall/latency curve as PNG."""
    from matplotlib.figure import Figure  # the stage's many other workers draw nothing

    figure = Figure(figsize=(6, 4), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for kind, colour in (("image", "#1b6ca8"), ("text", "#e08e45")):
        if kind in best.recalls:
            values = sorted((point.latency_ms, point.recalls[kind]) for point in points)
            axes.plot(
                *zip(*values, strict=True), "o-", color=colour, markersize=3, linewidth=1, label=f"{kind} queries"
            )
    axes.axhline(target, color="#6e747d", linewidth=0.8, linestyle="--", label=f"target {target}")
    axes.axvline(best.latency_ms, color="#4a8f5b", linewidth=0.8)
    told = f"nprobe {best.effort.nprobe}, candidates {best.effort.candidates}"
    axes.set(xlabel="to find the ids of one query's neighbours, ms", ylabel="recall@10", title=f"chosen: {told}")
    axes.legend(frameon=False)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    return encoded.getvalue()
