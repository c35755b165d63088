"""Compaction: write a version without the bytes of images that were taken down.

Only shards that contain such images are rewritten: the tar without the image, the embeddings without the row, and the
table with only the row's url and sha256, so that the image is rejected if it is listed again. All other shards are
reused. Nothing is embedded. The old version is unchanged until ``tasks/upkeep/garbage.py`` removes it.
"""

from pathlib import Path

import pyarrow.compute as pc

from infra import artifacts, storage
from infra.formats import tables
from infra.formats.webdataset import TAKEN_DOWN, drop_images
from tasks.references.domain_folder import DomainFolder
from tasks.references.takedown import Matcher, match_shards, read_entries
from tasks.references.types import EmbeddingShards, ImageShards, StageResult, Takedown
from tasks.references.url_history import UrlHistory
from tasks.stage import run_shards, run_stage, stage_task, sum_outcomes
from tasks.upkeep.rewrite_embeddings import KeepRows


@stage_task(name="compact")
def compact(
    images: ImageShards, embeddings: EmbeddingShards, takedown: Takedown, folder: DomainFolder
) -> tuple[StageResult[ImageShards], StageResult[EmbeddingShards]]:
    """Remove what ``takedown`` names from ``images`` and ``embeddings``; return them unchanged if nothing matches."""
    compacted = compact_images(images, takedown, folder)
    if compacted.reference == images:
        return compacted, StageResult(reference=embeddings, skipped=True, seconds=0.0, note=compacted.note)
    return compacted, compact_embeddings(embeddings, compacted.reference, takedown, folder)


def compact_images(images: ImageShards, takedown: Takedown, folder: DomainFolder) -> StageResult[ImageShards]:
    """Write image shards without the images that ``takedown`` names to ``<folder>/images/<key>``."""
    source = images.manifest()
    # The previous version is not an input, so that garbage collection can delete it (as in incremental downloads).
    config = {**source.config, "previous": images.digest}
    stage = artifacts.ArtifactBuilder(
        folder.uri, ImageShards.kind, inputs={"takedown": takedown.as_input()}, config=config
    )
    named = {} if stage.committed_manifest() else _matched_keys(images, takedown, folder.cache)
    if not named and not stage.committed_manifest():
        return StageResult(reference=images, skipped=True, seconds=0.0, note="contains no image that was taken down")

    def build() -> artifacts.Manifest:
        items = [(shard.name, (shard, named[shard.name])) for shard in source.shards if shard.name in named]
        done, _ = run_shards(stage, items, _DropImages, (images.uri, stage.uri, folder.cache))
        rewritten = {shard.name: shard for shard in done}
        shards = [rewritten.get(shard.name) or shard.reused_from(images.uri) for shard in source.shards]
        info = {
            "requested": source.info.get("requested", source.rows),
            "outcomes": sum_outcomes(shards),
            "seen": UrlHistory.of(images, folder.cache).stored_files(stage.uri),
            "shards_rewritten": len(done),
            "pictures_dropped": sum(len(keys) for keys in named.values()),
        }
        return stage.commit(shards, identity=source.identity, info=info)

    return run_stage(stage, ImageShards, build, note=_note)


def compact_embeddings(
    embeddings: EmbeddingShards, images: ImageShards, takedown: Takedown, folder: DomainFolder
) -> StageResult[EmbeddingShards]:
    """Write the embeddings of compacted ``images`` by copying rows from ``embeddings``; nothing is embedded again."""
    source = embeddings.manifest()
    stage = artifacts.ArtifactBuilder(
        folder.uri, EmbeddingShards.kind, inputs={"images": images.as_input()}, config=source.config
    )

    def build() -> artifacts.Manifest:
        tars = {shard.name: shard for shard in images.manifest().shards}
        affected = [shard for shard in source.shards if tars[shard.name].folder is None]
        masks = match_shards(read_entries(takedown, folder.cache), embeddings, affected, folder.cache)
        items = [
            (shard.name, (shard, ~mask, tars[shard.name].file(".tar").sha256))
            for shard, mask in zip(affected, masks, strict=True)
        ]
        done, _ = run_shards(stage, items, KeepRows, (embeddings.uri, stage.uri, folder.cache))
        rewritten = {shard.name: shard for shard in done}
        shards = [rewritten.get(shard.name) or shard.reused_from(embeddings.uri) for shard in source.shards]
        info = {"outcomes": sum_outcomes(shards), "lost_shards": {}, "shards_rewritten": len(done)}
        return stage.commit(shards, identity=source.identity, info=info)

    return run_stage(stage, EmbeddingShards, build, note=_note)


class _DropImages:
    """Worker that writes a shard's tar and table without the images of some keys."""

    def __init__(self, images_uri: str, folder_uri: str, cache: Path) -> None:
        self._images_uri, self._folder_uri, self._cache = images_uri, folder_uri, cache

    def __call__(self, item: tuple[str, tuple[artifacts.Shard, list[str]]]) -> artifacts.Shard:
        name, (shard, keys) = item
        tar, parquet = (
            artifacts.fetch_shard(self._images_uri, shard, suffix, self._cache) for suffix in (".tar", ".parquet")
        )
        with storage.scratch() as folder:
            outcomes = drop_images(tar, parquet, folder / name, dict.fromkeys(keys, TAKEN_DOWN))
            info = {**shard.info, "outcomes": outcomes}
            return artifacts.commit_shard(self._folder_uri, name, folder, rows=outcomes.get("success", 0), info=info)


def _matched_keys(images: ImageShards, takedown: Takedown, cache: Path) -> dict[str, list[str]]:
    """Map the name of each shard with images that ``takedown`` names to the keys of these images."""
    matcher = Matcher(read_entries(takedown, cache))

    def keys(shard: artifacts.Shard) -> list[str]:
        path = artifacts.fetch_shard(images.uri, shard, ".parquet", cache)
        table = tables.read_table(path, ["key", "url", "sha256", "error_class"])
        matched = table.filter(matcher.mask(table))
        found: list[str] = matched.filter(pc.equal(matched["error_class"], "success"))["key"].to_pylist()
        return found

    every = images.manifest().shards
    return {shard.name: found for shard, found in zip(every, storage.read_all(keys, every), strict=True) if found}


def _note(manifest: artifacts.Manifest) -> str:
    return f"compacted: {manifest.info['shards_rewritten']} of {len(manifest.shards)} shards rewritten"
