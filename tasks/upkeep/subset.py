"""Subset of a database: the rows that match a filter, without downloading or embedding anything."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infra import artifacts, storage
from infra.errors import InputError
from infra.formats import tables
from tasks.references.domain_folder import DomainFolder
from tasks.references.filter_expression import parse_where, referenced_columns
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.takedown import Matcher, inherited_takedown
from tasks.references.types import (
    DatabaseVersion,
    EmbeddingShards,
    ImageShards,
    StageResult,
)
from tasks.references.url_history import Hashes, hash_digests, hash_urls, write_seen
from tasks.references.user_columns import UserColumns
from tasks.stage import run_shards, run_stage, stage_task, sum_outcomes
from tasks.upkeep.merge import CombinedInputs
from tasks.upkeep.rewrite_embeddings import KeepRows
from tasks.upkeep.takedown import commit_takedown

_COLUMNS = ["key", "url", "sha256", "width", "height"]


@stage_task(name="subset")
def subset(database: DatabaseVersion, where: str, folder: DomainFolder) -> CombinedInputs:
    """Select the rows of ``database`` that match the filter and were not taken down.

    Raises:
        InputError: the filter is invalid or matches no row.
    """
    wanted = referenced_columns(where)
    embeddings, entries = embeddings_of(database), inherited_takedown(database, folder.cache)
    source = embeddings.manifest()
    user = UserColumns(images_of(embeddings), folder.cache) if wanted else None
    types = user.types() if user is not None else {}
    row_filter = parse_where(where, types)
    matcher = Matcher(entries)

    def select(shard: artifacts.Shard) -> tuple[NDArray[np.bool_], Hashes]:
        path = artifacts.fetch_shard(embeddings.uri, shard, ".parquet", folder.cache)
        table = tables.read_table(path, _COLUMNS)
        rows = table
        if user is not None:
            own = user.table(shard.name, table["key"].to_pylist(), types)
            rows = pa.table([*table.columns, *own.columns], names=[*table.column_names, *own.column_names])
        mask = row_filter.mask(rows) & ~matcher.mask(table)
        selected = table.filter(mask)
        none = np.empty(0, np.uint64)
        digests = [digest for digest in selected["sha256"].to_pylist() if digest]
        return mask, Hashes(hash_urls(selected["url"]), none, hash_digests(digests))

    selected_rows = storage.read_all(select, source.shards)
    found = dict(zip((shard.name for shard in source.shards), selected_rows, strict=True))
    masks = {name: mask for name, (mask, _) in found.items() if mask.any()}
    if not masks:
        raise InputError(f"no row of {database.uri} matches the filter {where!r}; use a less restrictive filter")
    selection = {"where": where, "of": database.digest}
    images = _subset_images(images_of(embeddings), masks, [hashes for _, hashes in found.values()], selection, folder)
    rows = _subset_embeddings(embeddings, images.reference, masks, selection, folder)
    takedown = commit_takedown(entries, folder, info={"of": database.uri}).reference if len(entries) else None
    return CombinedInputs(embeddings=rows, takedown=takedown)


def _subset_images(
    images: ImageShards,
    masks: Mapping[str, Any],
    seen: Sequence[Hashes],
    selection: Mapping[str, str],
    folder: DomainFolder,
) -> StageResult[ImageShards]:
    """Reuse the shards with a matching image. Other images are not in the URL history, so they may be added again.

    Two filters may match images of the same shards. ``selection`` distinguishes the resulting artifacts.
    """
    source = images.manifest()
    stage = artifacts.ArtifactBuilder(folder.uri, ImageShards.kind, inputs={}, config={**source.config, **selection})

    def build() -> artifacts.Manifest:
        shards = [shard.reused_from(images.uri) for shard in source.shards if shard.name in masks]
        info = {
            "requested": sum(int(mask.sum()) for mask in masks.values()),
            "outcomes": sum_outcomes(shards),
            "seen": [write_seen(stage.uri, Hashes.joined(seen))],
        }
        return stage.commit(shards, identity=selection, info=info)

    return run_stage(stage, ImageShards, build, note=lambda manifest: f"shards that match {selection['where']}")


def _subset_embeddings(
    embeddings: EmbeddingShards,
    images: ImageShards,
    masks: Mapping[str, NDArray[np.bool_]],
    selection: Mapping[str, str],
    folder: DomainFolder,
) -> StageResult[EmbeddingShards]:
    source = embeddings.manifest()
    config = {**source.config, **selection}
    stage = artifacts.ArtifactBuilder(
        folder.uri, EmbeddingShards.kind, inputs={"images": images.as_input()}, config=config
    )

    def build() -> artifacts.Manifest:
        tars = {shard.name: shard.file(".tar").sha256 for shard in images.manifest().shards}
        wanted = [shard for shard in source.shards if shard.name in masks]
        items = [
            (shard.name, (shard, masks[shard.name], tars[shard.name]))
            for shard in wanted
            if not masks[shard.name].all()
        ]
        done, _ = run_shards(stage, items, KeepRows, (embeddings.uri, stage.uri, folder.cache, True))
        rewritten = {shard.name: shard for shard in done}
        shards = [rewritten.get(shard.name) or shard.reused_from(embeddings.uri) for shard in wanted]
        return stage.commit(
            shards, identity=source.identity, info={"outcomes": sum_outcomes(shards), "lost_shards": {}}
        )

    return run_stage(stage, EmbeddingShards, build, note=lambda manifest: selection["where"])
