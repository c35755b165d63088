"""Quantizer: the trained, empty index that all shards of a database share, and the decision to reuse or retrain it."""

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
"""The quantizer is retrained when the database has more than this many times the rows it was trained for."""
_DRIFT_ROWS = 4_096


def reusable_quantizer(
    previous: DatabaseVersion,
    embeddings: EmbeddingShards,
    requested: str,
    max_drift: float,
    memory_bytes: int,
    cache: Path,
) -> artifacts.Shard | None:
    """Return the quantizer of ``previous`` if it also fits the new rows. Otherwise log the reason and return None.

    Args:
        previous: Version whose quantizer may be reused.
        embeddings: Rows of the new version.
        requested: Factory string, or "auto".
        max_drift: Maximum relative growth of the quantization error on the new rows.
        memory_bytes: Memory limit for the index, which determines the choice of "auto".
        cache: Folder for copies of remote files.

    Raises:
        ModelError: No index with this number of rows fits into ``memory_bytes``.
    """
    before, source = previous.manifest(), embeddings.manifest()
    (shard,) = (shard for shard in before.shards if shard.name == QUANTIZER)
    factory, trained_for = shard.info["factory"], shard.info["database_rows"]
    reason = None
    if not encoder_of(before).same_space(encoder_of(source)):
        reason = "the encoder differs"
    elif requested not in ("auto", factory):
        reason = f"the requested index is {requested}, not {factory}"
    elif (
        requested == "auto"
        and before.config["index"] != "auto"
        and factory != (better := choose_index(source.rows, encoder_of(source).dimension, memory_bytes))
    ):
        reason = f"auto chooses {better} for {source.rows} rows, not {factory}"
    elif requested == "auto" and (
        source.rows > FLAT_ROWS if factory == "Flat" else source.rows > RETRAIN_GROWTH * trained_for
    ):
        reason = f"{source.rows} rows have outgrown {factory}, which was trained for {trained_for}"
    elif requested == "auto" and (mismatch := _memory_mismatch(before, factory, source, memory_bytes)):
        reason = mismatch
    else:
        drift = _drift(shard.reused_from(previous.uri), embeddings, previous, cache)
        if drift > max_drift:
            reason = f"its error on new rows grew by {drift:.0%}, more than max_drift {max_drift:.0%}"
    if reason is None:
        return shard.reused_from(previous.uri)
    logs.get("stage").info("%-11s retraining the quantizer: %s", DatabaseVersion.kind, reason)
    return None


def _memory_mismatch(
    before: artifacts.Manifest, factory: str, source: artifacts.Manifest, memory_bytes: int
) -> str | None:
    """Return the reason why ``factory`` does not fit ``memory_bytes``, or None if it does."""
    if factory == "Flat":
        return None
    needed = memory_needed(factory, source.rows, encoder_of(source).dimension)
    if needed > memory_bytes:
        return f"{source.rows} rows in {factory} need {needed / 2**20:.0f} MiB, more than memory_bytes {memory_bytes}"
    if memory_bytes != before.config["memory_bytes"]:
        better = choose_index(source.rows, encoder_of(source).dimension, memory_bytes)
        if code_type(better) != code_type(factory):
            return f"memory_bytes {memory_bytes} allows {better}, not {factory}"
    return None


def _drift(quantizer: artifacts.Shard, embeddings: EmbeddingShards, previous: DatabaseVersion, cache: Path) -> float:
    """Return the relative growth of the quantization error on the rows added since ``previous``; 0 without cells."""
    reference_error = float(quantizer.info["error"])
    if not reference_error:
        return 0.0
    index = faiss.read_index(str(artifacts.fetch_shard("", quantizer, ".faiss", cache)))
    return quantization_error(index, _new_rows(embeddings, previous, cache)) / reference_error - 1


def train_quantizer(
    embeddings: EmbeddingShards,
    folder_uri: str,
    factory: str,
    seed: int,
    cache: Path,
    previous: DatabaseVersion | None = None,
) -> artifacts.Shard:
    """Train the template on a random sample of all shards and commit it as a shard without rows.

    Its reference error is the larger of two: that on the sample, and that on the rows added since ``previous``. Some
    new rows are far from every centroid. With the error on the sample alone, such rows would trigger a retraining in
    every version.
    """
    source = embeddings.manifest()
    count = training_rows(factory, source.rows)
    chosen = np.sort(np.random.default_rng(seed).choice(source.rows, count, replace=False))
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
    """Sample rows (n, D) of the shards that ``previous`` does not have."""
    known = {file.sha256 for file in embeddings_of(previous).manifest().files}
    new = [shard for shard in embeddings.manifest().shards if shard.file(".npy").sha256 not in known]
    total = sum(shard.rows for shard in new)
    chosen = np.sort(np.random.default_rng(0).choice(total, min(total, _DRIFT_ROWS), replace=False))
    return _gather_rows(embeddings, new, chosen, cache)


def _gather_rows(
    embeddings: EmbeddingShards, shards: Sequence[artifacts.Shard], chosen: NDArray[np.int64], cache: Path
) -> NDArray[np.float32]:
    """Read rows (n, D) float32 by ascending positions ``chosen`` in the concatenation of ``shards``."""
    gathered = [np.zeros((0, encoder_of(embeddings.manifest()).dimension), np.float32)]
    offset = 0
    for shard in shards:
        positions = chosen[(chosen >= offset) & (chosen < offset + shard.rows)] - offset
        offset += shard.rows
        if len(positions):
            rows = stored_rows(embeddings.uri, shard, cache)[positions]
            require_finite(rows, f"shard {shard.name} of {embeddings.uri}")
            gathered.append(rows.astype(np.float32))
    return np.concatenate(gathered)
