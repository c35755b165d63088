"""Index stage: build an immutable database version from embedding shards, and measure its recall before commit.

    quantizer.faiss       trained once on a sample, then frozen: the template of every index shard
    index/NNNNN.faiss     index shards (tasks.index.shards)
    rows-hidden, rows-true    rows that no search returns; held-out queries and their true neighbours
    recall.png            recall against latency

A version may grow from an earlier one. New rows are then added with the frozen quantizer. Near-duplicates and true
neighbours are searched among the new rows only, unless the settings for these have changed. All rows are indexed again
if the quantization error on new rows has grown too much, or if the database has outgrown the quantizer.
"""

from typing import Any

from infra import artifacts, compute, logs
from infra.errors import StageError
from model.retrieval.faiss_index import choose_index, require_factory
from tasks.index.config import IndexConfig
from tasks.index.hidden_rows import BaseVersion, find_hidden_rows
from tasks.index.quantizer import reusable_quantizer, train_quantizer
from tasks.index.shards import fill_shards
from tasks.index.tuning import tune_database
from tasks.references.database import QUANTIZER
from tasks.references.domain_folder import DomainFolder
from tasks.references.lineage import embeddings_of
from tasks.references.types import (
    DatabaseVersion,
    EmbeddingShards,
    StageResult,
    Takedown,
    config_from_manifest,
    config_to_dict,
    encoder_of,
)
from tasks.stage import run_stage, stage_task


@stage_task(name="index")
def index(
    embeddings: EmbeddingShards,
    folder: DomainFolder,
    config: IndexConfig,
    *,
    previous: DatabaseVersion | None = None,
    takedown: Takedown | None = None,
    verify: bool = False,
) -> StageResult[DatabaseVersion]:
    """Index every row of ``embeddings`` into ``<folder>/database/<key>``, in shards over adjacent embedding shards.

    Args:
        embeddings: Rows to index.
        folder: Folder of the domain.
        config: Index type, limits and recall target.
        previous: Earlier version of the same domain, to grow from if its quantizer can be reused. Default: None.
        takedown: Images that no search may return. Default: None.
        verify: Check the digests of a version that exists already, and rebuild its damaged shards. Default: False.

    Raises:
        ModelError: The factory string is invalid or not supported.
        StageError: Recall is below the target. The version is then not committed, unless it differs from the
            previous version only in its hidden rows.
    """
    source, cache = embeddings.manifest(), folder.cache
    encoder = encoder_of(source)
    if config.index != "auto":
        require_factory(config.index, encoder.dimension)
    reused = (
        None
        if previous is None
        else reusable_quantizer(previous, embeddings, config.index, config.max_drift, config.memory_bytes, cache)
    )
    inputs = {"embeddings": embeddings.as_input()}
    if takedown is not None:
        inputs["takedown"] = takedown.as_input()
    artifact_config = config_to_dict(config)
    if previous is not None and reused is not None:
        # The previous version determines quantizer and shards, whose locations are in the manifest.
        artifact_config["grown_from"] = previous.digest
    stage = artifacts.ArtifactBuilder(folder.uri, DatabaseVersion.kind, inputs=inputs, config=artifact_config)

    def build() -> artifacts.Manifest:
        if reused is None:
            factory = config.index
            if factory == "auto":
                factory = choose_index(source.rows, encoder.dimension, config.memory_bytes)
            template = stage.committed_shards().get(QUANTIZER) or compute.run(
                train_quantizer, embeddings, stage.uri, factory, config.seed, cache, previous, cpus=compute.cpus()
            )
        else:
            template, factory = reused, reused.info["factory"]
        before = previous if reused is not None else None
        done = fill_shards(stage, embeddings, template, config.shard_rows, before, cache)
        grown = None if previous is None or reused is None else _grown_from(previous, embeddings)
        indexed = [template, *done]
        hidden = find_hidden_rows(
            stage.uri, indexed, embeddings, cache,
            takedown=takedown, bound=config.near_duplicate_cosine, dedup=config.dedup, grown=grown,
        )  # fmt: skip
        truth, measured = compute.run(
            tune_database, stage.uri, indexed, hidden, embeddings, cache, config, grown, cpus=compute.cpus()
        )
        _require_recall(factory, measured, config, hides_only=_hides_only(embeddings, config, previous))
        reused_shards = sum(shard.folder is not None for shard in done)
        info = {"factory": factory, **measured, **hidden.info, "shards_taken_over": reused_shards}
        return stage.commit([*indexed, hidden, truth], identity=source.identity, info=info)

    return run_stage(stage, DatabaseVersion, build, note=_note, verify=verify, repairs=True)


def _grown_from(previous: DatabaseVersion, embeddings: EmbeddingShards) -> BaseVersion | None:
    """Return ``previous`` as base version if its rows have the same ids in ``embeddings``; None after a compaction."""
    before, now = embeddings_of(previous).manifest().shards, embeddings.manifest().shards
    same = [(one.name, one.file(".npy").sha256) for one in before]
    if same != [(one.name, one.file(".npy").sha256) for one in now[: len(before)]]:
        return None
    return BaseVersion(version=previous, shards=len(before), rows=sum(shard.rows for shard in before))


def _hides_only(embeddings: EmbeddingShards, config: IndexConfig, previous: DatabaseVersion | None) -> bool:
    """Return True if rows and settings equal those of the previous version, so that only hidden rows differ."""
    if previous is None:
        return False
    before = previous.manifest()
    same_rows = before.inputs["embeddings"]["digest"] == embeddings.digest
    return same_rows and config == config_from_manifest(IndexConfig, before.config)


def _require_recall(factory: str, measured: dict[str, Any], config: IndexConfig, *, hides_only: bool) -> None:
    """Raise ``StageError`` if recall is below the target. With ``hides_only``, log a warning instead."""
    recalls = {name: measured[name] for name in ("recall_at_10_image", "recall_at_10_text")}
    missed = {name: value for name, value in recalls.items() if value is not None and value < config.target_recall}
    if not missed:
        return
    reached = ", ".join(f"{name} {value:.3f}" for name, value in missed.items())
    fix = "choose a finer index (--index), or auto"
    if config.index == "auto":
        fix = "increase memory_bytes (--memory) for a finer index"
    message = f"recall of {factory} is below the target {config.target_recall}: {reached}; {fix}"
    if not hides_only:
        raise StageError(message)
    logs.get("stage").warning("%-11s takedowns are applied although %s", "index", message)


def _note(manifest: artifacts.Manifest) -> str:
    info = manifest.info
    image, text = info["recall_at_10_image"], info["recall_at_10_text"]
    recalls = [
        "no image queries" if image is None else f"recall@10 image {image:.3f}",
        "no text queries" if text is None else f"text {text:.3f}",
    ]
    further = [f"{info[name]} {label}" for name, label in _LABELS.items() if info[name]]
    return ", ".join([info["factory"], *recalls, *further])


_LABELS = {"near_duplicates": "near-duplicates", "hidden": "hidden", "shards_taken_over": "index shards reused"}
