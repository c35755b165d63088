"""Index: embedding shards to an immutable database version, its recall measured before anyone relies on it."""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import artifacts, compute, shards, storage
from infra.errors import InputError, StageError
from model.clip import encoder_for
from model.retrieval.database import Database, ShardFiles
from model.retrieval.factory import choose_index, fill_shard, train_index, training_rows
from model.retrieval.recall import recall_at_k
from tasks.contracts import DatabaseVersion, EmbeddingShards, Outcome, config_of, encoder_of
from tasks.stage import map_stage, skip_or_make, stage_task

QUANTIZER = "quantizer"
"""The pseudo-shard that keeps the trained, empty index: the template of every other."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """Which index, and what it must reach."""

    index: str = "auto"  # or any FAISS factory string
    target_recall: float = 0.95  # at 10, image queries and text queries alike
    recall_queries: int = 256
    texts: tuple[str, ...] = ()  # text queries for the recall measurement
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a target nobody can reach or measure."""
        if not 0 <= self.target_recall <= 1:
            raise ValueError("target_recall is a share, between 0 and 1")
        if self.recall_queries < 1:
            raise ValueError("recall_queries must be at least 1")


def build_database(
    embeddings: EmbeddingShards, base: str, config: IndexConfig, *, cache: Path
) -> Outcome[DatabaseVersion]:
    """Index every row of ``embeddings`` into ``base/database/<key>``, one FAISS file for each shard.

    Raises:
        ModelError: an unusable factory string.
        StageError: recall below the target, by how much; the version is then not committed.
    """
    inputs = {"embeddings": embeddings.as_input()}
    stage = artifacts.Stage(base, DatabaseVersion.kind, inputs=inputs, config=config_of(config))

    def make() -> artifacts.Manifest:
        source = embeddings.manifest()
        encoder = encoder_of(source)
        factory = choose_index(source.rows, encoder.dimension) if config.index == "auto" else config.index
        template = stage.done().get(QUANTIZER) or compute.run(
            _train_quantizer, embeddings, stage.uri, factory, config.seed, cache
        )
        items = [(shard.name, shard) for shard in source.shards]
        done, _ = map_stage(stage, items, _Fill, (embeddings.uri, stage.uri, template, cache))
        measured = compute.run(_tune, embeddings, stage.uri, done, config, cache, cpus=compute.cpus())
        recalls = {name: measured[name] for name in ("recall_at_10_image", "recall_at_10_text")}
        missed = {name: value for name, value in recalls.items() if value is not None and value < config.target_recall}
        if missed:
            told = ", ".join(f"{name} {value:.3f}" for name, value in missed.items())
            raise StageError(f"{factory} reaches {told}, the target is {config.target_recall}; take a finer index")
        info = {"factory": factory, "exact": factory == "Flat", **measured}
        return stage.commit([template, *done], identity=source.identity, info=info)

    return skip_or_make(stage, DatabaseVersion, make, note=_note)


def open_database(version: DatabaseVersion, cache: Path, *, name: str | None = None) -> Database:
    """Open a version for searching: every file verified against its digest, then memory-mapped.

    Raises:
        IntegrityError: an index or embedding file differs from what was committed.
    """
    manifest = version.manifest()
    embeddings = EmbeddingShards.open(manifest.inputs["embeddings"]["uri"])
    source = embeddings.manifest()
    if source.digest != manifest.inputs["embeddings"]["digest"]:
        raise InputError(f"{embeddings.uri} is not what {version.uri} was built from; rebuild the database")
    indexes = {shard.name: shard.files[0] for shard in manifest.shards if shard.name != QUANTIZER}
    files = [
        ShardFiles(
            index=artifacts.fetch_file(version.uri, indexes[shard.name], cache),
            embeddings=artifacts.fetch_file(embeddings.uri, _embedding_file(shard), cache),
        )
        for shard in source.shards
    ]
    lookup = Metadata(embeddings.uri, source, cache)
    return Database(
        files,
        encoder=encoder_of(manifest),
        name=name or storage.join(version.uri).rsplit("/", 3)[-3],
        nprobe=manifest.info["nprobe"],
        describe=lookup,
    )


class Metadata:
    """Metadata of global rows, a shard's parquet read when first asked for."""

    def __init__(self, uri: str, manifest: artifacts.Manifest, cache: Path) -> None:
        """Look rows of the embedding shards at ``uri`` up."""
        self._uri, self._shards, self._cache = uri, manifest.shards, cache
        self._offsets = [0, *itertools.accumulate(shard.rows for shard in manifest.shards)]
        self._tables: dict[int, list[dict[str, Any]]] = {}

    def __call__(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Key, url, sha256, width and height of each row."""
        return [self.row(int(row)) for row in ids]

    def shard(self, row: int) -> str:
        """The name of the shard that holds ``row``."""
        return self._shards[self._number(row)].name

    def row(self, row: int) -> dict[str, Any]:
        """What is known of ``row``."""
        number = self._number(row)
        if number not in self._tables:
            (file,) = (file for file in self._shards[number].files if file.name.endswith(".parquet"))
            path = artifacts.fetch_file(self._uri, file, self._cache)
            self._tables[number] = shards.read_table(path).to_pylist()
        known = self._tables[number][row - self._offsets[number]]
        return {name: known[name] for name in ("key", "url", "sha256", "width", "height")}

    def _number(self, row: int) -> int:
        return bisect.bisect_right(self._offsets, row) - 1


class _Fill:
    """One shard of the index, on a worker."""

    def __init__(self, embeddings_uri: str, folder_uri: str, template: artifacts.Shard, cache: Path) -> None:
        self._embeddings_uri, self._folder_uri, self._cache = embeddings_uri, folder_uri, cache
        self._template = artifacts.fetch_file(folder_uri, template.files[0], cache)

    def __call__(self, item: tuple[str, artifacts.Shard]) -> artifacts.Shard:
        name, source = item
        rows = np.load(artifacts.fetch_file(self._embeddings_uri, _embedding_file(source), self._cache), mmap_mode="r")
        with storage.scratch() as folder:
            fill_shard(self._template, rows, folder / "index" / f"{name}.faiss")
            return artifacts.commit_shard(self._folder_uri, name, folder, rows=len(rows), info={})


def _train_quantizer(
    embeddings: EmbeddingShards, folder_uri: str, factory: str, seed: int, cache: Path
) -> artifacts.Shard:
    """Train the template on a random sample over all shards and commit it as a shard without rows."""
    import faiss

    source = embeddings.manifest()
    dimension = encoder_of(source).dimension
    wanted = training_rows(factory, source.rows)
    sample = np.empty((0, dimension), dtype=np.float32)
    if wanted:
        chosen = np.sort(np.random.default_rng(seed).choice(source.rows, wanted, replace=False))
        sample = np.concatenate([rows[pick].astype(np.float32) for rows, pick in _pick(embeddings, chosen, cache)])
    index = train_index(factory, dimension, sample)
    with storage.scratch() as folder:
        faiss.write_index(index, str(folder / f"{QUANTIZER}.faiss"))
        return artifacts.commit_shard(folder_uri, QUANTIZER, folder, rows=0, info={"trained_on": len(sample)})


def _tune(
    embeddings: EmbeddingShards, folder_uri: str, done: list[artifacts.Shard], config: IndexConfig, cache: Path
) -> dict[str, Any]:
    """Recall@10 of both kinds of query at the smallest nprobe that reaches the target for both."""
    source = embeddings.manifest()
    encoder = encoder_of(source)
    indexes = {shard.name: artifacts.fetch_file(folder_uri, shard.files[0], cache) for shard in done}
    paths = [artifacts.fetch_file(embeddings.uri, _embedding_file(shard), cache) for shard in source.shards]
    files = [ShardFiles(index=indexes[s.name], embeddings=path) for s, path in zip(source.shards, paths, strict=True)]
    rows = np.concatenate([np.load(path, mmap_mode="r") for path in paths])
    rng = np.random.default_rng(config.seed)
    picked = rng.choice(len(rows), min(config.recall_queries, len(rows)), replace=False)
    texts = np.empty((0, encoder.dimension), dtype=np.float32)
    if config.texts:
        chosen = rng.choice(len(config.texts), min(config.recall_queries, len(config.texts)), replace=False)
        texts = encoder_for(encoder).embed_texts([config.texts[i] for i in chosen]).numpy()
    measured: dict[str, Any] = {}
    for nprobe in (1 << power for power in range(11)):
        database = Database(files, encoder=encoder, nprobe=nprobe)
        image = recall_at_k(database, rows, rows[picked].astype(np.float32), exclude=picked)
        text = recall_at_k(database, rows, texts) if config.texts else None
        measured = {"nprobe": nprobe, "recall_at_10_image": image, "recall_at_10_text": text}
        if not database.nprobe_matters or min(image, 1.0 if text is None else text) >= config.target_recall:
            break
    return {**measured, "image_queries": len(picked), "text_queries": len(texts)}


def _pick(
    embeddings: EmbeddingShards, chosen: NDArray[np.int64], cache: Path
) -> list[tuple[NDArray[np.float16], NDArray[np.int64]]]:
    """For each shard, its memory-mapped rows and which of them are chosen."""
    picked, offset = [], 0
    for shard in embeddings.manifest().shards:
        path = artifacts.fetch_file(embeddings.uri, _embedding_file(shard), cache)
        here = chosen[(chosen >= offset) & (chosen < offset + shard.rows)] - offset
        picked.append((np.load(path, mmap_mode="r"), here))
        offset += shard.rows
    return picked


def _embedding_file(shard: artifacts.Shard) -> artifacts.File:
    (file,) = (file for file in shard.files if file.name.endswith(".npy"))
    return file


def _note(manifest: artifacts.Manifest) -> str:
    info = manifest.info
    text = "no texts to measure with" if info["recall_at_10_text"] is None else f"text {info['recall_at_10_text']:.3f}"
    return f"{info['factory']}, recall@10 image {info['recall_at_10_image']:.3f}, {text}"


@stage_task(name="index")
def index(embeddings: EmbeddingShards, base: str, config: IndexConfig, cache: Path) -> Outcome[DatabaseVersion]:
    """Task of :func:`build_database`."""
    return build_database(embeddings, base, config, cache=cache)
