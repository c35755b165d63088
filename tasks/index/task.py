"""Index: embedding shards to an immutable database version, its recall measured before anyone relies on it.

    quantizer.faiss       trained once on a sample, frozen: the template of every index shard
    index/NNNNN.faiss     its shards (tasks.index.shards)
    rows-hidden, rows-true    what no search returns; held-out queries and their true neighbours
    recall.png            recall against latency

A version may grow from an earlier one: new rows are added with the frozen quantizer, and only they are looked at for
near-duplicates and for the truth, unless settings that decide these have changed. When the quantizer's error on the
new rows has drifted, or the database has outgrown it, everything is indexed anew.
"""

import dataclasses
from pathlib import Path
from typing import Any

from infra import artifacts, compute, logs
from infra.errors import StageError
from model.retrieval.faiss_index import MEMORY_BYTES, choose_index, require_factory
from tasks.index.hidden_rows import BaseVersion, find_hidden_rows
from tasks.index.quantizer import reusable_quantizer, train_quantizer
from tasks.index.shards import fill_shards
from tasks.index.tuning import tune_database
from tasks.references.database import QUANTIZER
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """Which index, and what it must reach."""

    index: str = "auto"  # or any FAISS factory string
    memory_bytes: int = MEMORY_BYTES  # what a searching process may hold of the index; decides what auto takes
    target_recall: float = 0.95  # at 10, image queries and text queries alike
    recall_queries: int = 256
    texts: tuple[str, ...] = ()  # text queries for the recall measurement
    shard_rows: int = 16_777_216  # most of an index shard (8 GB at 256 dimensions of float16); short ones cut cells
    near_duplicate_cosine: float = 0.995  # from which on two rows count as near-duplicates; 1 looks for none
    dedup: bool = False  # whether searches return only one of each group of near-duplicates
    max_drift: float = 0.25  # growth of the quantizer's error on new rows after which it is trained anew
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a target nobody can reach or measure."""
        if not 0 <= self.target_recall <= 1:
            raise ValueError("target_recall is a share, between 0 and 1")
        if self.recall_queries < 1 or self.shard_rows < 1 or self.memory_bytes < 1:
            raise ValueError("recall_queries, shard_rows and memory_bytes must be at least 1")
        if not 0 < self.near_duplicate_cosine <= 1 or self.max_drift < 0:
            raise ValueError("near_duplicate_cosine lies above 0 and at most at 1, max_drift at 0 or above")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IndexOverrides:
    """What a version's index is to have otherwise than the one before, or than by default; None: as there."""

    index: str | None = None
    memory_bytes: int | None = None
    target_recall: float | None = None
    dedup: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what an index cannot have before anything begins."""
        self.over(IndexConfig())

    def over(self, config: IndexConfig) -> IndexConfig:
        """``config`` with what is named here in the place of its own."""
        changes = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(config, **changes)


@stage_task(name="index")
def index(
    embeddings: EmbeddingShards,
    base: str,
    config: IndexConfig,
    *,
    cache: Path,
    previous: DatabaseVersion | None = None,
    takedown: Takedown | None = None,
    verify: bool = False,
) -> StageResult[DatabaseVersion]:
    """Index every row of ``embeddings`` into ``base/database/<key>``, in shards over neighbouring embedding shards.

    Args:
        embeddings: the rows.
        base: the domain's folder.
        config: which index.
        cache: local files by digest.
        previous: an earlier version of the same domain, to grow from where its quantizer still serves.
        takedown: what must not be returned.
        verify: whether to check the digests of a version that is there already; its damaged shards are built again.

    Raises:
        ModelError: an unusable factory string.
        StageError: recall below the target, by how much; the version is then not committed, unless all that it does
            is to hide more of the version before.
    """
    source = embeddings.manifest()
    encoder = encoder_of(source)
    if config.index != "auto":
        require_factory(config.index, encoder.dimension)
    kept = (
        None
        if previous is None
        else reusable_quantizer(previous, embeddings, config.index, config.max_drift, config.memory_bytes, cache)
    )
    inputs = {"embeddings": embeddings.as_input()}
    if takedown is not None:
        inputs["takedown"] = takedown.as_input()
    asked = config_to_dict(config)
    if previous is not None and kept is not None:
        asked["grown_from"] = previous.digest  # it decides quantizer and shards; they say where their files are
    stage = artifacts.ArtifactBuilder(base, DatabaseVersion.kind, inputs=inputs, config=asked)

    def make() -> artifacts.Manifest:
        if kept is None:
            factory = config.index
            if factory == "auto":
                factory = choose_index(source.rows, encoder.dimension, config.memory_bytes)
            template = stage.done().get(QUANTIZER) or compute.run(
                train_quantizer, embeddings, stage.uri, factory, config.seed, cache, previous, cpus=compute.cpus()
            )
        else:
            template, factory = kept, kept.info["factory"]
        before = previous if kept is not None else None
        done = fill_shards(stage, embeddings, template, config.shard_rows, before, cache)
        grown = None if previous is None or kept is None else _grown_from(previous, embeddings)
        indexed = [template, *done]
        hidden = find_hidden_rows(
            stage.uri, indexed, embeddings, cache,
            takedown=takedown, bound=config.near_duplicate_cosine, dedup=config.dedup, grown=grown,
        )  # fmt: skip
        truth, measured = compute.run(
            tune_database, stage.uri, indexed, hidden, embeddings, cache, config, grown, cpus=compute.cpus()
        )
        _require_recall(factory, measured, config, hides_only=_hides_only(embeddings, config, previous))
        taken_over = sum(shard.folder is not None for shard in done)
        info = {"factory": factory, **measured, **hidden.info, "shards_taken_over": taken_over}
        return stage.commit([*indexed, hidden, truth], identity=source.identity, info=info)

    return run_stage(stage, DatabaseVersion, make, note=_note, verify=verify, repairs=True)


def _grown_from(previous: DatabaseVersion, embeddings: EmbeddingShards) -> BaseVersion | None:
    """What ``previous`` knows of rows that are all still there, at their ids; None after a compaction."""
    before, now = embeddings_of(previous).manifest().shards, embeddings.manifest().shards
    same = [(one.name, one.file(".npy").sha256) for one in before]
    if same != [(one.name, one.file(".npy").sha256) for one in now[: len(before)]]:
        return None
    return BaseVersion(version=previous, shards=len(before), rows=sum(shard.rows for shard in before))


def _hides_only(embeddings: EmbeddingShards, config: IndexConfig, previous: DatabaseVersion | None) -> bool:
    """Whether rows and settings are those of the version before, so that only what is hidden differs."""
    if previous is None:
        return False
    before = previous.manifest()
    same_rows = before.inputs["embeddings"]["digest"] == embeddings.digest
    return same_rows and config == config_from_manifest(IndexConfig, before.config)


def _require_recall(factory: str, measured: dict[str, Any], config: IndexConfig, *, hides_only: bool) -> None:
    """Refuse a version that misses the target; what is taken down is hidden even so, and the miss told."""
    recalls = {name: measured[name] for name in ("recall_at_10_image", "recall_at_10_text")}
    missed = {name: value for name, value in recalls.items() if value is not None and value < config.target_recall}
    if not missed:
        return
    told = ", ".join(f"{name} {value:.3f}" for name, value in missed.items())
    mend = "name a finer index (--index), or auto"
    if config.index == "auto":
        mend = "raise memory_bytes (--memory) for a finer index"
    message = f"{factory} reaches {told}, the target is {config.target_recall}; {mend}"
    if not hides_only:
        raise StageError(message)
    logs.get("stage").warning("%-11s hides what was taken down all the same: %s", "index", message)


def _note(manifest: artifacts.Manifest) -> str:
    info = manifest.info
    image, text = info["recall_at_10_image"], info["recall_at_10_text"]
    recalls = [
        "no pictures to measure with" if image is None else f"recall@10 image {image:.3f}",
        "no texts to measure with" if text is None else f"text {text:.3f}",
    ]
    further = [f"{info[name]} {told}" for name, told in _LABELS.items() if info[name]]
    return ", ".join([info["factory"], *recalls, *further])


_LABELS = {"near_duplicates": "near-duplicates", "hidden": "hidden", "shards_taken_over": "index shards taken over"}
