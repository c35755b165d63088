"""Quantize: the trained, empty index that all shards of a database share, and whether it still serves."""

from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from infra import artifacts, logs, storage
from infra.formats.arrays import require_finite
from model.retrieval.faiss_index import (
    FLAT_ROWS,
    choose_index,
    code_type,
    is_stackable,
    memory_needed,
    quantization_error,
    train_index,
    training_rows,
)
from tasks.references.database import QUANTIZER
from tasks.references.lineage import embeddings_of
from tasks.references.rows import stored_rows
from tasks.references.types import DatabaseVersion, EmbeddingShards, encoder_of

RETRAIN_GROWTH = 4
"""A quantizer is trained anew when the database has so many times the rows that it had then."""
_DRIFT_ROWS = 4_096


def reusable_quantizer(
    previous: DatabaseVersion,
    embeddings: EmbeddingShards,
    factory_asked: str,
    max_drift: float,
    memory_bytes: int,
    cache: Path,
) -> artifacts.Shard | None:
    """The quantizer of ``previous`` if it serves the new rows too, else None, and why in the log.

    Raises:
        ModelError: no index of so many rows fits into ``memory_bytes``.
    """
    before, source = previous.manifest(), embeddings.manifest()
    (shard,) = (shard for shard in before.shards if shard.name == QUANTIZER)
    factory, trained_for = shard.info["factory"], shard.info["database_rows"]
    why = None
    if not encoder_of(before).same_space(encoder_of(source)):
        why = "another encoder"
    elif factory_asked not in ("auto", factory):
        why = f"{factory_asked} is asked for"
    elif (
        factory_asked == "auto"
        and before.config["index"] != "auto"
        and factory != (better := choose_index(source.rows, encoder_of(source).dimension, memory_bytes))
    ):
        why = f"auto is asked for, and takes {better} for {source.rows} rows, not {factory}"
    elif factory_asked == "auto" and (
        source.rows > FLAT_ROWS if factory == "Flat" else source.rows > RETRAIN_GROWTH * trained_for
    ):
        why = f"{source.rows} rows have outgrown the {factory} of {trained_for}"
    elif factory_asked == "auto" and (told := _memory_mismatch(before, factory, source, memory_bytes)):
        why = told
    else:
        drift = _drift(shard.reused_from(previous.uri), embeddings, previous, cache)
        if drift > max_drift:
            why = f"its error on new rows grew by {drift:.0%}, beyond max_drift {max_drift:.0%}"
    if why is None:
        return shard.reused_from(previous.uri)
    logs.get("stage").info("%-11s the quantizer is trained anew: %s", DatabaseVersion.kind, why)
    return None


def _memory_mismatch(
    before: artifacts.Manifest, factory: str, source: artifacts.Manifest, memory_bytes: int
) -> str | None:
    """Why ``factory`` is not what ``memory_bytes`` should hold; None where it is."""
    if factory == "Flat":
        return None
    needed = memory_needed(factory, source.rows, encoder_of(source).dimension)
    if needed > memory_bytes:
        return f"{source.rows} rows in {factory} take {needed / 2**20:.0f} MiB, beyond memory_bytes {memory_bytes}"
    if memory_bytes != before.config["memory_bytes"]:
        better = choose_index(source.rows, encoder_of(source).dimension, memory_bytes)
        if code_type(better) != code_type(factory):
            return f"memory_bytes {memory_bytes} is for {better}, not {factory}"
    return None


def _drift(quantizer: artifacts.Shard, embeddings: EmbeddingShards, previous: DatabaseVersion, cache: Path) -> float:
    """Growth of the quantizer's error from what was accepted to the rows new since ``previous``; 0 without cells."""
    accepted = float(quantizer.info["error"])
    if not accepted:
        return 0.0
    index = faiss.read_index(str(artifacts.fetch_shard("", quantizer, ".faiss", cache)))
    return quantization_error(index, _new_rows(embeddings, previous, cache)) / accepted - 1


def train_quantizer(
    embeddings: EmbeddingShards,
    folder_uri: str,
    factory: str,
    seed: int,
    cache: Path,
    previous: DatabaseVersion | None = None,
) -> artifacts.Shard:
    """Train the template on a random sample over all shards and commit it as a shard without rows.

    The error it is accepted with is the sample's, or that of the rows new since ``previous`` where it is larger: some
    rows no cells describe well, and measured against the sample, more of their kind would have it trained each time.
    """
    source = embeddings.manifest()
    wanted = training_rows(factory, source.rows)
    chosen = np.sort(np.random.default_rng(seed).choice(source.rows, wanted, replace=False))
    sample = _gather_rows(embeddings, source.shards, chosen, cache)
    index = train_index(factory, encoder_of(source).dimension, sample)
    errors = [quantization_error(index, sample[:: max(1, len(sample) // _DRIFT_ROWS)])]
    if previous is not None:
        errors.append(quantization_error(index, _new_rows(embeddings, previous, cache)))
    info = {
        "factory": factory,
        "trained_on": len(sample),
        "database_rows": source.rows,
        "mergeable": is_stackable(index),
        "error": max(errors),
    }
    with storage.scratch() as folder:
        faiss.write_index(index, str(folder / f"{QUANTIZER}.faiss"))
        return artifacts.commit_shard(folder_uri, QUANTIZER, folder, rows=0, info=info)


def _new_rows(embeddings: EmbeddingShards, previous: DatabaseVersion, cache: Path) -> NDArray[np.float32]:
    """A sample (n, D) of the rows in shards that ``previous`` has not."""
    known = {file.sha256 for file in embeddings_of(previous).manifest().files}
    new = [shard for shard in embeddings.manifest().shards if shard.file(".npy").sha256 not in known]
    total = sum(shard.rows for shard in new)
    chosen = np.sort(np.random.default_rng(0).choice(total, min(total, _DRIFT_ROWS), replace=False))
    return _gather_rows(embeddings, new, chosen, cache)


def _gather_rows(
    embeddings: EmbeddingShards, shards: Sequence[artifacts.Shard], chosen: NDArray[np.int64], cache: Path
) -> NDArray[np.float32]:
    """Chosen rows (n, D), ascending, counted over ``shards`` of the embeddings."""
    picked = [np.zeros((0, encoder_of(embeddings.manifest()).dimension), np.float32)]
    offset = 0
    for shard in shards:
        here = chosen[(chosen >= offset) & (chosen < offset + shard.rows)] - offset
        offset += shard.rows
        if len(here):
            rows = stored_rows(embeddings.uri, shard, cache)[here]
            require_finite(rows, f"shard {shard.name} of {embeddings.uri}")
            picked.append(rows.astype(np.float32))
    return np.concatenate(picked)
