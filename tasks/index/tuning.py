"""Tune: how hard a new database must look to reach its recall, measured with held-out queries of both kinds."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import artifacts, storage
from model.retrieval.database import Database, SearchEffort
from model.retrieval.recall import GroundTruth, exact_neighbours
from model.retrieval.tuning import Point, tune
from tasks.index.hidden_rows import BaseVersion
from tasks.references.database import TRUTH, hidden_ids, open_shards
from tasks.references.types import EmbeddingShards, config_from_manifest

CURVE = "recall.png"
RECALL_AT = 10
_DECIDES_TRUTH = ("texts", "recall_queries", "seed", "dedup", "near_duplicate_cosine")
"""Settings without which queries and truth are others."""


def tune_database(
    folder_uri: str,
    indexed: Sequence[artifacts.Shard],
    hidden: artifacts.Shard,
    embeddings: EmbeddingShards,
    cache: Path,
    config: Any,
    grown: BaseVersion | None,
) -> tuple[artifacts.Shard, dict[str, Any]]:
    """The shard of queries with their true neighbours, and what the manifest tells of effort and recall.

    A database that ``grown`` describes keeps its queries, and only the new rows are looked at for the truth of these;
    image queries are drawn anew when too few are left of them, or when it has twice the rows that they were drawn from,
    and all when other settings ask for other ones.
    ``config`` is the :class:`tasks.index.task.IndexConfig`. The curve is drawn into the folder as ``recall.png``.
    """
    barred = hidden_ids(folder_uri, hidden, cache)
    database = open_shards(
        folder_uri, indexed, embeddings, cache, name="tuned", effort=SearchEffort(), hidden=barred, rows_at_once=False
    )
    kept, drawn_from = (
        ({}, database.stored) if grown is None else _reusable_queries(database, barred, grown, config, cache)
    )
    truths = {
        "image": kept["image"] if "image" in kept else _pictures(database, barred, config),
        "text": kept["text"] if "text" in kept else _texts(database, barred, config),
    }
    before = None if grown is None or kept.keys() != truths.keys() else _effort_before(grown, config.target_recall)
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
        return artifacts.commit_shard(folder_uri, TRUTH, folder, rows=0, info={"drawn_from": drawn_from}), info


def _pictures(database: Database, hidden: NDArray[np.int64], config: Any) -> GroundTruth:
    """Rows drawn by the config's seed as queries, and their truth."""
    wanted = _image_queries(database, config)
    picked = _choose_ids(database, hidden, wanted, np.random.default_rng(config.seed))
    own = database.rows(picked)
    return exact_neighbours(database.parts, own.astype(np.float32), own=picked, own_rows=own, hidden=hidden)


def _texts(database: Database, hidden: NDArray[np.int64], config: Any) -> GroundTruth:
    """Texts drawn by the config's seed as queries, and their truth."""
    texts = np.empty((0, database.encoder.dimension), dtype=np.float32)
    if config.texts:
        from model.encoder.clip import encoder_for  # only texts need the encoder, which takes seconds to import

        wanted = min(config.recall_queries, len(config.texts))
        chosen = np.random.default_rng(config.seed).choice(len(config.texts), wanted, replace=False)
        texts = encoder_for(database.encoder).embed_texts([config.texts[i] for i in chosen]).numpy()
    return exact_neighbours(database.parts, texts, hidden=hidden)


def _choose_ids(
    database: Database, hidden: NDArray[np.int64], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Ids (count,) of rows that a search may return, each at most once. ``hidden`` are sorted."""
    if 4 * count > len(database):
        return rng.choice(database.ids(), count, replace=False)
    # Of a billion rows the ids alone would take gigabytes: drawn from all, what is hidden or drawn before is left out.
    picked = np.zeros(0, dtype=np.int64)
    while len(picked) < count:
        picked = np.concatenate([picked, rng.integers(database.stored, size=2 * count)])
        _, firsts = np.unique(picked, return_index=True)
        picked = picked[np.sort(firsts)]
        picked = picked[np.searchsorted(hidden, picked, "left") == np.searchsorted(hidden, picked, "right")]
    return picked[:count]


def _image_queries(database: Database, config: Any) -> int:
    return int(min(config.recall_queries, len(database)))


def _reusable_queries(
    database: Database, hidden: NDArray[np.int64], grown: BaseVersion, config: Any, cache: Path
) -> tuple[dict[str, GroundTruth], int]:
    """The truth over all rows of those queries that still serve, and how many rows the pictures were drawn from."""
    before = grown.version.manifest()
    stored = config_from_manifest(type(config), before.config)
    if any(getattr(stored, name) != getattr(config, name) for name in _DECIDES_TRUTH):
        return {}, database.stored
    (shard,) = (shard for shard in before.shards if shard.name == TRUTH)
    truths, drawn_from = _read(grown, shard, cache), shard.info.get("drawn_from", grown.rows)
    left = len(truths["image"]) - int(np.isin(truths["image"].own, hidden).sum())
    if 2 * left < _image_queries(database, config) or database.stored >= 2 * drawn_from:
        del truths["image"]
        drawn_from = database.stored
    shown = np.setdiff1d(grown.array("hidden.npy", cache), hidden)
    return {kind: _grown(database, truth, grown.rows, hidden, shown) for kind, truth in truths.items()}, drawn_from


def _grown(
    database: Database, before: GroundTruth, rows: int, hidden: NDArray[np.int64], shown: NDArray[np.int64]
) -> GroundTruth:
    """The truth of the same queries over more rows, and over those ``shown`` again that were hidden before.

    Queries that were hidden meanwhile are left out.
    """
    before = before.only(~np.isin(before.own, hidden))
    own_rows = before.own_rows
    own = None if own_rows is None else before.own
    # Rows that were there before are known down to the last of those kept: below it, one of them may be nearer.
    lowest = np.where(before.ids >= 0, before.scores, np.inf).min(axis=1, keepdims=True)
    if len(shown):
        found = exact_neighbours([database.rows(shown)], before.queries, own_rows=own_rows)
        ids = np.where(found.ids >= 0, shown[found.ids], -1)
        before = dataclasses.replace(
            before,
            ids=np.concatenate([before.ids, ids], axis=1),
            scores=np.concatenate([before.scores, found.scores], axis=1),
        )
    truth = exact_neighbours(
        database.parts, before.queries, own=own, own_rows=own_rows, hidden=hidden, grown_from=(before, rows)
    )
    unknown = truth.scores < lowest
    truth.ids[unknown], truth.scores[unknown] = -1, -np.inf
    again = np.flatnonzero((truth.ids >= 0).sum(axis=1) < RECALL_AT)
    if len(again):
        some = exact_neighbours(
            database.parts,
            truth.queries[again],
            own=None if own is None else own[again],
            own_rows=None if own_rows is None else own_rows[again],
            hidden=hidden,
        )
        truth.ids[again], truth.scores[again] = some.ids, some.scores
    return truth


def _effort_before(grown: BaseVersion, target: float) -> SearchEffort | None:
    """What the version before needs for the same target."""
    manifest = grown.version.manifest()
    same = manifest.config["target_recall"] == target
    return SearchEffort(**manifest.info["effort"]) if same else None


def _read(grown: BaseVersion, shard: artifacts.Shard, cache: Path) -> dict[str, GroundTruth]:
    truths = {}
    for kind in ("image", "text"):
        with np.load(artifacts.fetch_shard(grown.version.uri, shard, f"{kind}.npz", cache)) as kept:
            truths[kind] = GroundTruth(**kept)
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
