"""Union of databases, without downloading or embedding anything.

The union references the shards of its parts, and numbers them again. Its images are identified by shard and key,
because images from different parts can have the same key.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

from infra import artifacts
from infra.download.downloader import SHARDS
from infra.errors import InputError
from tasks.references.domain_folder import DomainFolder
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.takedown import Entries, inherited_takedown
from tasks.references.types import (
    DatabaseVersion,
    EmbeddingShards,
    ImageShards,
    StageResult,
    Takedown,
    require_same_encoder,
)
from tasks.references.url_history import UrlHistory
from tasks.stage import run_stage, stage_task, sum_outcomes
from tasks.upkeep.takedown import commit_takedown, with_image_hashes

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
    embeddings = _merged_embeddings(parts, sources, images.reference, folder)
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

    Later downloads into the union use the config of the first part.
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
            for file in UrlHistory.of(part, folder.cache).stored_files(f"{stage.uri}/{number}")
        ]
        requested = sum(source.info.get("requested", source.rows) for source in sources)
        info = {"requested": requested, "outcomes": dict(outcomes), "seen": seen}
        identities = [source.identity for source in sources]  # a subset has one
        return stage.commit(_renumbered(all_shards), identity={"of": identities} if any(identities) else {}, info=info)

    return run_stage(stage, ImageShards, build, note=lambda manifest: f"{len(parts)} databases merged")


def _merged_embeddings(
    parts: Sequence[EmbeddingShards],
    part_images: Sequence[ImageShards],
    images: ImageShards,
    folder: DomainFolder,
) -> StageResult[EmbeddingShards]:
    """Combine all embedding shards, each named after its image shard in the union."""
    sources = [part.manifest() for part in parts]
    # Equal images can have different embeddings: after failed shards, or from different weights of the same name.
    config = {**sources[0].config, "merged": [part.digest for part in parts]}
    stage = artifacts.ArtifactBuilder(
        folder.uri, EmbeddingShards.kind, inputs={"images": images.as_input()}, config=config
    )

    def build() -> artifacts.Manifest:
        all_shards, offset = [], 0
        for part, source, images_of_part in zip(parts, sources, part_images, strict=True):
            numbers = {shard.name: offset + n for n, shard in enumerate(images_of_part.manifest().shards)}
            offset += len(numbers)
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
