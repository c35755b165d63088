"""Tune nprobe and re-ranking depth to reach the target recall on held-out images, and on texts if they are given."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import artifacts, storage
from model.retrieval.database import Database
from model.retrieval.ranked_search import SearchEffort
from model.retrieval.recall import GroundTruth, exact_neighbours
from model.retrieval.tuning import Point, tune
from tasks.index.config import IndexConfig
from tasks.index.hidden_rows import BaseVersion
from tasks.references.database import TRUTH, hidden_ids, open_shards
from tasks.references.types import EmbeddingShards, config_from_manifest

CURVE = "recall.png"
RECALL_AT = 10
_TRUTH_SETTINGS = ("texts", "recall_queries", "seed", "dedup", "near_duplicate_cosine")
"""Settings that determine the queries and their true neighbours."""


def tune_database(
    folder_uri: str,
    indexed: Sequence[artifacts.Shard],
    hidden: artifacts.Shard,
    embeddings: EmbeddingShards,
    cache: Path,
    config: IndexConfig,
    grown: BaseVersion | None,
) -> tuple[artifacts.Shard, dict[str, Any]]:
    """Commit the shard of queries with their true neighbours, and return it with effort and recall for the manifest.

    A database that grew from ``grown`` keeps its queries, and only new rows are searched for their true neighbours.
    Image queries are chosen again if too few remain, or if the database has twice the rows they were chosen from.
    All queries are chosen again if the settings that determine them have changed. The recall curve is saved in the
    folder as ``recall.png``.
    """
    excluded = hidden_ids(folder_uri, hidden, cache)
    database = open_shards(
        folder_uri, indexed, embeddings, cache, name="tuned", effort=SearchEffort(), hidden=excluded, rows_at_once=False
    )
    reused, chosen_from = (
        ({}, database.stored) if grown is None else _reusable_queries(database, excluded, grown, config, cache)
    )
    truths = {
        "image": reused["image"] if "image" in reused else _image_truth(database, excluded, config),
        "text": reused["text"] if "text" in reused else _text_truth(database, excluded, config),
    }
    before = None if grown is None or reused.keys() != truths.keys() else _previous_effort(grown, config.target_recall)
    best, measured = tune(database, truths, config.target_recall, before=before)
    storage.write_bytes(storage.join(folder_uri, CURVE), _render_curve(measured, best, config.target_recall))
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
        return artifacts.commit_shard(folder_uri, TRUTH, folder, rows=0, info={"drawn_from": chosen_from}), info


def _image_truth(database: Database, hidden: NDArray[np.int64], config: IndexConfig) -> GroundTruth:
    """Choose rows as image queries by the config's seed, and find their true neighbours."""
    count = _image_query_count(database, config)
    chosen = _choose_ids(database, hidden, count, np.random.default_rng(config.seed))
    own = database.rows(chosen)
    return exact_neighbours(database.parts, own.astype(np.float32), own=chosen, own_rows=own, hidden=hidden)


def _text_truth(database: Database, hidden: NDArray[np.int64], config: IndexConfig) -> GroundTruth:
    """Choose text queries by the config's seed, and find their true neighbours."""
    texts = np.empty((0, database.encoder.dimension), dtype=np.float32)
    if config.texts:
        from model.encoder.clip import encoder_for  # only texts need the encoder, which takes seconds to import

        count = min(config.recall_queries, len(config.texts))
        chosen = np.random.default_rng(config.seed).choice(len(config.texts), count, replace=False)
        texts = encoder_for(database.encoder).embed_texts([config.texts[i] for i in chosen]).numpy()
    return exact_neighbours(database.parts, texts, hidden=hidden)


def _choose_ids(
    database: Database, hidden: NDArray[np.int64], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Choose distinct ids (count,) of rows that a search may return. ``hidden`` must be sorted."""
    if 4 * count > len(database):
        return rng.choice(database.ids(), count, replace=False)
    # The ids of a billion rows would take gigabytes: sample from the whole range, then drop hidden ids and repetitions.
    chosen = np.zeros(0, dtype=np.int64)
    while len(chosen) < count:
        chosen = np.concatenate([chosen, rng.integers(database.stored, size=2 * count)])
        _, firsts = np.unique(chosen, return_index=True)
        chosen = chosen[np.sort(firsts)]
        chosen = chosen[np.searchsorted(hidden, chosen, "left") == np.searchsorted(hidden, chosen, "right")]
    return chosen[:count]


def _image_query_count(database: Database, config: IndexConfig) -> int:
    return int(min(config.recall_queries, len(database)))


def _reusable_queries(
    database: Database, hidden: NDArray[np.int64], grown: BaseVersion, config: IndexConfig, cache: Path
) -> tuple[dict[str, GroundTruth], int]:
    """Return the reusable queries with their true neighbours, and the number of rows the images were chosen from."""
    before = grown.version.manifest()
    stored = config_from_manifest(type(config), before.config)
    if any(getattr(stored, name) != getattr(config, name) for name in _TRUTH_SETTINGS):
        return {}, database.stored
    (shard,) = (shard for shard in before.shards if shard.name == TRUTH)
    truths, chosen_from = _read_truths(grown, shard, cache), shard.info.get("drawn_from", grown.rows)
    remaining = len(truths["image"]) - int(np.isin(truths["image"].own, hidden).sum())
    if 2 * remaining < _image_query_count(database, config) or database.stored >= 2 * chosen_from:
        del truths["image"]
        chosen_from = database.stored
    revealed = np.setdiff1d(grown.array("hidden.npy", cache), hidden)
    return {
        kind: _extend_truth(database, truth, grown.rows, hidden, revealed) for kind, truth in truths.items()
    }, chosen_from


def _extend_truth(
    database: Database, before: GroundTruth, rows: int, hidden: NDArray[np.int64], revealed: NDArray[np.int64]
) -> GroundTruth:
    """Extend true neighbours from the first ``rows`` rows to all rows of the database.

    Args:
        database: The database.
        before: Queries and their true neighbours among the first ``rows`` rows. Queries hidden now are dropped.
        rows: Number of rows before.
        hidden: Sorted ids of the rows that are hidden now.
        revealed: Sorted ids of rows that were hidden before and no longer are.
    """
    before = before.select(~np.isin(before.own, hidden))
    own_rows = before.own_rows
    own = None if own_rows is None else before.own
    # Old rows with a score below the last stored neighbour were not stored, so results below it are unreliable.
    lowest = np.where(before.ids >= 0, before.scores, np.inf).min(axis=1, keepdims=True)
    if len(revealed):
        found = exact_neighbours([database.rows(revealed)], before.queries, own_rows=own_rows)
        ids = np.where(found.ids >= 0, revealed[found.ids], -1)
        before = dataclasses.replace(
            before,
            ids=np.concatenate([before.ids, ids], axis=1),
            scores=np.concatenate([before.scores, found.scores], axis=1),
        )
    truth = exact_neighbours(
        database.parts, before.queries, own=own, own_rows=own_rows, hidden=hidden, grown_from=(before, rows)
    )
    unreliable = truth.scores < lowest
    truth.ids[unreliable], truth.scores[unreliable] = -1, -np.inf
    incomplete = np.flatnonzero((truth.ids >= 0).sum(axis=1) < RECALL_AT)
    if len(incomplete):
        complete = exact_neighbours(
            database.parts,
            truth.queries[incomplete],
            own=None if own is None else own[incomplete],
            own_rows=None if own_rows is None else own_rows[incomplete],
            hidden=hidden,
        )
        truth.ids[incomplete], truth.scores[incomplete] = complete.ids, complete.scores
    return truth


def _previous_effort(grown: BaseVersion, target: float) -> SearchEffort | None:
    """Return the search effort of the previous version if its target recall is the same, else None."""
    manifest = grown.version.manifest()
    same = manifest.config["target_recall"] == target
    return SearchEffort(**manifest.info["effort"]) if same else None


def _read_truths(grown: BaseVersion, shard: artifacts.Shard, cache: Path) -> dict[str, GroundTruth]:
    truths = {}
    for kind in ("image", "text"):
        with np.load(artifacts.fetch_shard(grown.version.uri, shard, f"{kind}.npz", cache)) as arrays:
            truths[kind] = GroundTruth(**arrays)
    return truths


def _render_curve(points: Sequence[Point], best: Point, target: float) -> bytes:
    """Render the curve of recall against latency as PNG."""
    from matplotlib.figure import Figure  # imported here because the other workers of this stage do not plot

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
    effort = f"nprobe {best.effort.nprobe}, candidates {best.effort.candidates}"
    axes.set(xlabel="search latency per query (ids only), ms", ylabel="recall@10", title=f"chosen: {effort}")
    axes.legend(frameon=False)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    return encoded.getvalue()
