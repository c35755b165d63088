"""Combine: the union of databases and a part of one, without downloading or embedding anything.

Shards are taken over from where they are; in a union they get new names, since names are numbers. Only embedding shards
of which a part is wanted are written anew. So a picture is still found by its shard and key, but two pictures of a
union may bear the same key.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from infra import artifacts
from infra.download.downloader import SHARDS
from infra.errors import InputError
from infra.formats import tables
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
    """What a database of the new domain is built from."""

    embeddings: StageResult[EmbeddingShards]
    takedown: Takedown | None


@stage_task(name="merge")
def merge(databases: Mapping[str, DatabaseVersion], base: str, *, cache: Path) -> CombinedInputs:
    """The embeddings of all ``databases``, by name, one after the other, and what any of them has taken down.

    Raises:
        EncoderMismatchError: two of them were made by different encoders; both are named.
        InputError: fewer than two, or one that is named twice.
    """
    if len({database.digest for database in databases.values()}) < max(2, len(databases)):
        raise InputError(f"a union is of two databases or more, each named once; {', '.join(databases)} was given")
    require_same_encoder(**{name: database.manifest() for name, database in databases.items()})
    parts = [embeddings_of(database) for database in databases.values()]
    pictures = [images_of(part) for part in parts]
    images = merged_images(pictures, base, cache=cache)
    names = [shard.name for part in pictures for shard in part.manifest().shards]
    embeddings = _merged_embeddings(parts, pictures, names, images.reference, base)
    entries = Entries()
    for database in databases.values():
        entries |= inherited_takedown(database, cache)
    entries = with_image_hashes(entries, images.reference, cache)
    together = commit_takedown(entries, base, info={"of": ", ".join(databases)}).reference if len(entries) else None
    return CombinedInputs(embeddings=embeddings, takedown=together)


def is_combined(images: ImageShards) -> bool:
    """Whether they were taken over from other databases, as :func:`merge` and :func:`subset` do, and nothing since."""
    return bool({"merged", "where"} & images.manifest().config.keys())


def merged_images(parts: Sequence[ImageShards], base: str, *, cache: Path) -> StageResult[ImageShards]:
    """All shards of ``parts`` under new numbers, in ``base/images/<key>``; later downloads go on as the first's did."""
    sources = [part.manifest() for part in parts]
    # The parts are no inputs: what is needed of them the shards refer to.
    config = {**sources[0].config, "merged": [part.digest for part in parts]}
    stage = artifacts.ArtifactBuilder(base, ImageShards.kind, inputs={}, config=config)

    def make() -> artifacts.Manifest:
        every = [
            shard.reused_from(part.uri) for part, source in zip(parts, sources, strict=True) for shard in source.shards
        ]
        if len(every) > SHARDS:
            raise InputError(f"together they have {len(every)} shards, names have five digits; download larger shards")
        outcomes: Counter[str] = Counter()
        for source in sources:
            outcomes.update(source.info["outcomes"])
        seen = [
            file
            for number, part in enumerate(parts)
            for file in UrlHistory.of(part, cache).kept(f"{stage.uri}/{number}")
        ]
        requested = sum(source.info.get("requested", source.rows) for source in sources)
        info = {"requested": requested, "outcomes": dict(outcomes), "seen": seen}
        chosen = [source.identity for source in sources]  # of a part that is a subset, which it is
        return stage.commit(_renumbered(every), identity={"of": chosen} if any(chosen) else {}, info=info)

    return run_stage(stage, ImageShards, make, note=lambda manifest: f"{len(parts)} databases joined")


def _merged_embeddings(
    parts: Sequence[EmbeddingShards],
    pictures: Sequence[ImageShards],
    names: Sequence[str],
    images: ImageShards,
    base: str,
) -> StageResult[EmbeddingShards]:
    """All embedding shards, each under the name that its image shard has now."""
    sources = [part.manifest() for part in parts]
    # Of the same pictures there may be other rows: of other weights under one name, or of shards lost at first.
    config = {**sources[0].config, "merged": [part.digest for part in parts]}
    stage = artifacts.ArtifactBuilder(base, EmbeddingShards.kind, inputs={"images": images.as_input()}, config=config)

    def make() -> artifacts.Manifest:
        every, first = [], 0
        for part, source, tars in zip(parts, sources, pictures, strict=True):
            numbers = {shard.name: first + n for n, shard in enumerate(tars.manifest().shards)}
            first += len(numbers)
            every += [
                dataclasses.replace(shard.reused_from(part.uri), name=f"{numbers[shard.name]:05d}")
                for shard in source.shards
            ]
        return stage.commit(
            every, identity=sources[0].identity, info={"outcomes": sum_outcomes(every), "lost_shards": {}}
        )

    return run_stage(stage, EmbeddingShards, make, note=lambda manifest: "nothing embedded")


def _renumbered(every: Sequence[artifacts.Shard]) -> list[artifacts.Shard]:
    return [dataclasses.replace(shard, name=f"{number:05d}") for number, shard in enumerate(every)]


@stage_task(name="subset")
def subset(database: DatabaseVersion, where: str, base: str, *, cache: Path) -> CombinedInputs:
    """Select the rows of ``database`` that match the filter and were not taken down.

    Raises:
        InputError: the filter cannot be read, or takes nothing.
    """
    row_filter = parse_where(where)
    embeddings, entries = embeddings_of(database), inherited_takedown(database, cache)
    source = embeddings.manifest()
    matcher = Matcher(entries)

    def chosen(shard: artifacts.Shard) -> tuple[NDArray[np.bool_], Hashes]:
        path = artifacts.fetch_shard(embeddings.uri, shard, ".parquet", cache)
        table = tables.read_table(path, _COLUMNS)
        stays = row_filter.mask(table) & ~matcher.mask(table)
        kept = table.filter(stays)
        none = np.empty(0, np.uint64)
        digests = [digest for digest in kept["sha256"].to_pylist() if digest]
        return stays, Hashes(hash_texts(kept["url"].to_pylist()), none, hash_digests(digests))

    with ThreadPoolExecutor(_READERS) as pool:
        found = dict(zip((shard.name for shard in source.shards), pool.map(chosen, source.shards), strict=True))
    masks = {name: stays for name, (stays, _) in found.items() if stays.any()}
    if not masks:
        raise InputError(f"no row of {database.uri} is taken by the filter {where!r}; make it wider")
    selection = {"where": where, "of": database.digest}
    images = _subset_images(images_of(embeddings), masks, [hashes for _, hashes in found.values()], selection, base)
    rows = _subset_embeddings(embeddings, images.reference, masks, selection, base, cache)
    listed = commit_takedown(entries, base, info={"of": database.uri}).reference if len(entries) else None
    return CombinedInputs(embeddings=rows, takedown=listed)


def _subset_images(
    images: ImageShards, masks: Mapping[str, Any], seen: Sequence[Hashes], selection: Mapping[str, str], base: str
) -> StageResult[ImageShards]:
    """The shards that hold a wanted picture. What is left out counts as never asked for: it may be added again.

    Two filters may want pictures of the same shards: ``selection`` tells them apart, and what is made from them.
    """
    source = images.manifest()
    stage = artifacts.ArtifactBuilder(base, ImageShards.kind, inputs={}, config={**source.config, **selection})

    def make() -> artifacts.Manifest:
        kept = [shard.reused_from(images.uri) for shard in source.shards if shard.name in masks]
        info = {
            "requested": sum(int(stays.sum()) for stays in masks.values()),
            "outcomes": sum_outcomes(kept),
            "seen": [write_seen(stage.uri, Hashes.joined(seen))],
        }
        return stage.commit(kept, identity=selection, info=info)

    return run_stage(stage, ImageShards, make, note=lambda manifest: f"those that hold {selection['where']}")


def _subset_embeddings(
    embeddings: EmbeddingShards,
    images: ImageShards,
    masks: Mapping[str, NDArray[np.bool_]],
    selection: Mapping[str, str],
    base: str,
    cache: Path,
) -> StageResult[EmbeddingShards]:
    source = embeddings.manifest()
    config = {**source.config, **selection}
    stage = artifacts.ArtifactBuilder(base, EmbeddingShards.kind, inputs={"images": images.as_input()}, config=config)

    def make() -> artifacts.Manifest:
        tars = {shard.name: shard.file(".tar").sha256 for shard in images.manifest().shards}
        wanted = [shard for shard in source.shards if shard.name in masks]
        items = [
            (shard.name, (shard, masks[shard.name], tars[shard.name]))
            for shard in wanted
            if not masks[shard.name].all()
        ]
        done, _ = run_shards(stage, items, KeepRows, (embeddings.uri, stage.uri, cache, True))
        rewritten = {shard.name: shard for shard in done}
        kept = [rewritten.get(shard.name) or shard.reused_from(embeddings.uri) for shard in wanted]
        return stage.commit(kept, identity=source.identity, info={"outcomes": sum_outcomes(kept), "lost_shards": {}})

    return run_stage(stage, EmbeddingShards, make, note=lambda manifest: selection["where"])
