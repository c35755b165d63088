"""Union of databases and subset of a database, without downloading or embedding anything.

Shards are reused in place. In a union they get new names, since names are numbers. Only embedding shards of which some
rows are dropped are written again. An image is therefore still found by its shard and key, but two images of a union
can have the same key.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from infra import artifacts
from infra.download.downloader import SHARDS
from infra.errors import InputError
from infra.formats import tables
from tasks.references.domain_folder import DomainFolder
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.types import (
    DatabaseVersion,
    EmbeddingShards,
    ImageShards,
    StageResult,
    Takedown,
    require_same_encoder,
)
from tasks.references.url_history import Hashes, UrlHistory, hash_digests, hash_texts, write_seen
from tasks.stage import run_shards, run_stage, stage_task, sum_outcomes
from tasks.upkeep.filter_expression import parse_where
from tasks.upkeep.rewrite_embeddings import KeepRows
from tasks.upkeep.takedown import Entries, Matcher, commit_takedown, inherited_takedown, with_image_hashes

_READERS = 8
_COLUMNS = ["key", "url", "sha256", "width", "height"]
Source = TypeVar("Source", ImageShards, EmbeddingShards)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CombinedInputs:
    """Embeddings and takedown that the combined database is built from."""

    embeddings: StageResult[EmbeddingShards]
    takedown: Takedown | None


@stage_task(name="merge")
def merge(databases: Mapping[str, DatabaseVersion], folder: DomainFolder) -> CombinedInputs:
    """Concatenate the embeddings of ``databases`` (by name) and merge their takedowns.

    Raises:
        EncoderMismatchError: two databases were built with different encoders; the message names both.
        InputError: there are fewer than two databases, or one is given twice.
    """
    if len({database.digest for database in databases.values()}) < max(2, len(databases)):
        raise InputError(f"cannot merge {', '.join(databases)}; give two or more different databases")
    require_same_encoder(**{name: database.manifest() for name, database in databases.items()})
    parts = [embeddings_of(database) for database in databases.values()]
    sources = [images_of(part) for part in parts]
    images = merged_images(sources, folder)
    names = [shard.name for part in sources for shard in part.manifest().shards]
    embeddings = _merged_embeddings(parts, sources, names, images.reference, folder)
    entries = Entries()
    for database in databases.values():
        entries |= inherited_takedown(database, folder.cache)
    entries = with_image_hashes(entries, images.reference, folder.cache)
    takedown = commit_takedown(entries, folder, info={"of": ", ".join(databases)}).reference if len(entries) else None
    return CombinedInputs(embeddings=embeddings, takedown=takedown)


def is_combined(images: ImageShards) -> bool:
    """Return True if all images come from :func:`merge` or :func:`subset`, without later downloads."""
    return bool({"merged", "where"} & images.manifest().config.keys())


def merged_images(parts: Sequence[ImageShards], folder: DomainFolder) -> StageResult[ImageShards]:
    """Combine all shards of ``parts`` under new numbers in ``<folder>/images/<key>``.

    Later downloads into the union use the first part's config.
    """
    sources = [part.manifest() for part in parts]
    # The parts are not inputs, because the shards themselves reference the files that are needed.
    config = {**sources[0].config, "merged": [part.digest for part in parts]}
    stage = artifacts.ArtifactBuilder(folder.uri, ImageShards.kind, inputs={}, config=config)

    def build() -> artifacts.Manifest:
        all_shards = [
            shard.reused_from(part.uri) for part, source in zip(parts, sources, strict=True) for shard in source.shards
        ]
        if len(all_shards) > SHARDS:
            raise InputError(
                f"too many shards in the union: {len(all_shards)}, at most {SHARDS}; download larger shards"
            )
        outcomes: Counter[str] = Counter()
        for source in sources:
            outcomes.update(source.info["outcomes"])
        seen = [
            file
            for number, part in enumerate(parts)
            for file in UrlHistory.of(part, folder.cache).kept(f"{stage.uri}/{number}")
        ]
        requested = sum(source.info.get("requested", source.rows) for source in sources)
        info = {"requested": requested, "outcomes": dict(outcomes), "seen": seen}
        identities = [source.identity for source in sources]  # not empty for a part that is a subset
        return stage.commit(_renumbered(all_shards), identity={"of": identities} if any(identities) else {}, info=info)

    return run_stage(stage, ImageShards, build, note=lambda manifest: f"{len(parts)} databases merged")


def _merged_embeddings(
    parts: Sequence[EmbeddingShards],
    part_images: Sequence[ImageShards],
    names: Sequence[str],
    images: ImageShards,
    folder: DomainFolder,
) -> StageResult[EmbeddingShards]:
    """Combine all embedding shards, each named after its image shard in the union."""
    sources = [part.manifest() for part in parts]
    # The same images can have other embeddings, e.g. from other weights of one name, or after failed shards.
    config = {**sources[0].config, "merged": [part.digest for part in parts]}
    stage = artifacts.ArtifactBuilder(
        folder.uri, EmbeddingShards.kind, inputs={"images": images.as_input()}, config=config
    )

    def build() -> artifacts.Manifest:
        all_shards, first = [], 0
        for part, source, tars in zip(parts, sources, part_images, strict=True):
            numbers = {shard.name: first + n for n, shard in enumerate(tars.manifest().shards)}
            first += len(numbers)
            all_shards += [
                dataclasses.replace(shard.reused_from(part.uri), name=f"{numbers[shard.name]:05d}")
                for shard in source.shards
            ]
        return stage.commit(
            all_shards, identity=sources[0].identity, info={"outcomes": sum_outcomes(all_shards), "lost_shards": {}}
        )

    return run_stage(stage, EmbeddingShards, build, note=lambda manifest: "embeddings reused")


def _renumbered(all_shards: Sequence[artifacts.Shard]) -> list[artifacts.Shard]:
    return [dataclasses.replace(shard, name=f"{number:05d}") for number, shard in enumerate(all_shards)]


@stage_task(name="subset")
def subset(database: DatabaseVersion, where: str, folder: DomainFolder) -> CombinedInputs:
    """Select the rows of ``database`` that match the filter and were not taken down.

    Raises:
        InputError: the filter is invalid or matches no row.
    """
    row_filter = parse_where(where)
    embeddings, entries = embeddings_of(database), inherited_takedown(database, folder.cache)
    source = embeddings.manifest()
    matcher = Matcher(entries)

    def select(shard: artifacts.Shard) -> tuple[NDArray[np.bool_], Hashes]:
        path = artifacts.fetch_shard(embeddings.uri, shard, ".parquet", folder.cache)
        table = tables.read_table(path, _COLUMNS)
        mask = row_filter.mask(table) & ~matcher.mask(table)
        selected = table.filter(mask)
        none = np.empty(0, np.uint64)
        digests = [digest for digest in selected["sha256"].to_pylist() if digest]
        return mask, Hashes(hash_texts(selected["url"].to_pylist()), none, hash_digests(digests))

    with ThreadPoolExecutor(_READERS) as pool:
        found = dict(zip((shard.name for shard in source.shards), pool.map(select, source.shards), strict=True))
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
