"""Compact: a version without the bytes of what was taken down.

Only shards that hold something named are rewritten: the tar without the picture, the table with the row's url and
sha256 alone (so that it is refused when it is listed again), the embeddings without the row. All others are taken over.
Nothing is embedded. The old version stays as it is until ``tasks/upkeep/garbage.py`` removes it.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.compute as pc

from infra import artifacts, storage
from infra.formats import tables
from infra.formats.webdataset import TAKEN_DOWN, drop_images
from tasks.references.types import EmbeddingShards, ImageShards, StageResult, Takedown
from tasks.references.url_history import UrlHistory
from tasks.stage import run_shards, run_stage, stage_task, sum_outcomes
from tasks.upkeep.rewrite_embeddings import KeepRows
from tasks.upkeep.takedown import Matcher, match_shards, read_entries

_READERS = 8


@stage_task(name="compact")
def compact(
    images: ImageShards, embeddings: EmbeddingShards, takedown: Takedown, base: str, *, cache: Path
) -> tuple[StageResult[ImageShards], StageResult[EmbeddingShards]]:
    """``images`` and ``embeddings`` without what ``takedown`` names; they themselves when they hold none of it."""
    slimmer = compact_images(images, takedown, base, cache=cache)
    if slimmer.reference == images:
        return slimmer, StageResult(reference=embeddings, skipped=True, seconds=0.0, note=slimmer.note)
    return slimmer, compact_embeddings(embeddings, slimmer.reference, takedown, base, cache=cache)


def compact_images(images: ImageShards, takedown: Takedown, base: str, *, cache: Path) -> StageResult[ImageShards]:
    """Image shards without the pictures named, in ``base/images/<key>``."""
    source = images.manifest()
    # As with a download that adds, the version before is no input: it must be free to go.
    config = {**source.config, "previous": images.digest}
    stage = artifacts.ArtifactBuilder(base, ImageShards.kind, inputs={"takedown": takedown.as_input()}, config=config)
    named = {} if stage.committed() else _keys_named(images, takedown, cache)
    if not named and not stage.committed():
        return StageResult(reference=images, skipped=True, seconds=0.0, note="holds nothing that was taken down")

    def make() -> artifacts.Manifest:
        items = [(shard.name, (shard, named[shard.name])) for shard in source.shards if shard.name in named]
        done, _ = run_shards(stage, items, _DropImages, (images.uri, stage.uri, cache))
        rewritten = {shard.name: shard for shard in done}
        kept = [rewritten.get(shard.name) or shard.reused_from(images.uri) for shard in source.shards]
        info = {
            "requested": source.info.get("requested", source.rows),
            "outcomes": sum_outcomes(kept),
            "seen": UrlHistory.of(images, cache).kept(stage.uri),
            "shards_rewritten": len(done),
            "pictures_dropped": sum(len(keys) for keys in named.values()),
        }
        return stage.commit(kept, identity=source.identity, info=info)

    return run_stage(stage, ImageShards, make, note=_note)


def compact_embeddings(
    embeddings: EmbeddingShards, images: ImageShards, takedown: Takedown, base: str, *, cache: Path
) -> StageResult[EmbeddingShards]:
    """The embeddings of compacted ``images``: what embedding them would give, their rows copied from ``embeddings``."""
    source = embeddings.manifest()
    stage = artifacts.ArtifactBuilder(
        base, EmbeddingShards.kind, inputs={"images": images.as_input()}, config=source.config
    )

    def make() -> artifacts.Manifest:
        tars = {shard.name: shard for shard in images.manifest().shards}
        affected = [shard for shard in source.shards if tars[shard.name].folder is None]
        masks = match_shards(read_entries(takedown, cache), embeddings, affected, cache)
        items = [
            (shard.name, (shard, ~mask, tars[shard.name].file(".tar").sha256))
            for shard, mask in zip(affected, masks, strict=True)
        ]
        done, _ = run_shards(stage, items, KeepRows, (embeddings.uri, stage.uri, cache))
        rewritten = {shard.name: shard for shard in done}
        kept = [rewritten.get(shard.name) or shard.reused_from(embeddings.uri) for shard in source.shards]
        info = {"outcomes": sum_outcomes(kept), "lost_shards": {}, "shards_rewritten": len(done)}
        return stage.commit(kept, identity=source.identity, info=info)

    return run_stage(stage, EmbeddingShards, make, note=_note)


class _DropImages:
    """A shard's tar and table without the pictures of some keys, on a worker."""

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


def _keys_named(images: ImageShards, takedown: Takedown, cache: Path) -> dict[str, list[str]]:
    """For each shard that holds any, the keys of its pictures that are named."""
    matcher = Matcher(read_entries(takedown, cache))

    def keys(shard: artifacts.Shard) -> list[str]:
        path = artifacts.fetch_shard(images.uri, shard, ".parquet", cache)
        table = tables.read_table(path, ["key", "url", "sha256", "error_class"])
        held = table.filter(matcher.mask(table))
        found: list[str] = held.filter(pc.equal(held["error_class"], "success"))["key"].to_pylist()
        return found

    every = images.manifest().shards
    with ThreadPoolExecutor(_READERS) as pool:
        return {shard.name: found for shard, found in zip(every, pool.map(keys, every), strict=True) if found}


def _note(manifest: artifacts.Manifest) -> str:
    return f"compacted: {manifest.info['shards_rewritten']} of {len(manifest.shards)} shards rewritten"
