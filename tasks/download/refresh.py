"""Refresh of image shards: request stored URLs again, and replace the images that have changed.

A request is conditional if the server sent ``ETag`` or ``Last-Modified`` with the image. Otherwise the image is
downloaded and its digest compared. Only shards with a changed image are rewritten, under the same keys; the embedding
stage embeds the changed images only. An image that can no longer be downloaded stays as it is.
"""

import dataclasses
import json
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import artifacts, storage
from infra.download.downloader import DownloadPolicy, download_shard
from infra.download.shard_writer import VALIDATOR_COLUMNS
from infra.download.validators import Validators
from infra.formats import tables
from tasks.download.config import DownloadConfig
from tasks.download.incremental import histogram
from tasks.references.domain_folder import DomainFolder
from tasks.references.takedown import Entries, read_entries
from tasks.references.types import ImageShards, StageResult, Takedown
from tasks.references.url_history import UrlHistory, hashes_of
from tasks.stage import run_shards, run_stage, stage_task

_UNCHANGED, _CHANGED, _TAKEN_DOWN = "unchanged", "changed", "taken_down"
_REPLACED = ("width", "height", "original_width", "original_height", "sha256", *VALIDATOR_COLUMNS)
_COUNTS = "refreshed"


@stage_task(name="refresh")
def refresh(
    images: ImageShards, folder: DomainFolder, config: DownloadConfig, *, takedown: Takedown | None = None
) -> StageResult[ImageShards]:
    """Request the URLs of ``images`` again, and store a version with the changed ones in ``<folder>/images/<key>``.

    ``images`` itself is returned if none has changed. New content that ``takedown`` names is not taken.
    """
    source = images.manifest()
    stage = artifacts.ArtifactBuilder(
        folder.uri, ImageShards.kind, inputs=source.inputs, config={**source.config, "refreshed": images.digest}
    )
    refused = read_entries(takedown, folder.cache) if takedown is not None else Entries()

    def build() -> artifacts.Manifest:
        items = [(shard.name, shard) for shard in source.shards]
        settings = (images.uri, stage.uri, config.worker_policy(), refused, folder.cache)
        done, lost = run_shards(
            stage, items, _Refresh, settings, max_lost_fraction=config.max_lost_fraction, actors=config.workers
        )
        outcomes: Counter[str] = Counter()
        for shard in done:
            outcomes.update(shard.info[_COUNTS])
        rewritten = {shard.name: shard for shard in done if shard.folder is None}
        if not rewritten:
            raise NothingChangedError(histogram(outcomes))
        shards = [rewritten.get(shard.name) or shard.reused_from(images.uri) for shard in source.shards]
        added = hashes_of(stage.uri, rewritten.values(), folder.cache)
        seen = UrlHistory.of(images, folder.cache).extend(stage.uri, added)
        counts = {_COUNTS: dict(outcomes.most_common()), "lost_shards": lost}
        return stage.commit(shards, identity=source.identity, info={**source.info, "seen": seen, **counts})

    started = time.monotonic()
    try:
        return run_stage(stage, ImageShards, build, note=lambda manifest: histogram(manifest.info[_COUNTS]))
    except NothingChangedError as error:
        return StageResult(reference=images, skipped=True, seconds=time.monotonic() - started, note=str(error))


class NothingChangedError(Exception):
    """Raised when no image has changed. The message counts the outcomes."""


class _Refresh:
    """Worker that requests the images of one shard again, and rewrites the shard if some have changed."""

    def __init__(self, images_uri: str, folder_uri: str, policy: DownloadPolicy, refused: Entries, cache: Path) -> None:
        self._images_uri, self._folder_uri, self._policy = images_uri, folder_uri, policy
        self._refused, self._cache = refused, cache

    def __call__(self, item: tuple[str, artifacts.Shard]) -> artifacts.Shard:
        name, shard = item
        tar, parquet = (
            artifacts.fetch_shard(self._images_uri, shard, end, self._cache) for end in (".tar", ".parquet")
        )
        table = tables.read_table(parquet)
        stored = [row for row in table.to_pylist() if row["error_class"] == "success"]
        with storage.scratch() as folder:
            rows = pa.table({"url": pa.array([row["url"] for row in stored], pa.string())})
            conditions = {row["url"].strip(): Validators(**{one: row.get(one) for one in VALIDATOR_COLUMNS})
                          for row in stored}  # fmt: skip
            download_shard(0, rows, folder / "again", self._policy, conditions=conditions)
            again = tables.read_table(folder / "again" / "00000.parquet").to_pylist()
            outcomes = [self._outcome(old, new) for old, new in zip(stored, again, strict=True)]
            info = {**shard.info, _COUNTS: dict(Counter(outcomes))}
            pairs = zip(stored, again, outcomes, strict=True)
            changed = {old["key"]: new for old, new, outcome in pairs if outcome == _CHANGED}
            if not changed:
                return dataclasses.replace(shard.reused_from(self._images_uri), info=info)
            (folder / "shard").mkdir()
            _write_rows(table, changed, folder / "shard" / f"{name}.parquet")
            _write_images(tar, folder / "again" / "00000.tar", changed, folder / "shard" / f"{name}.tar")
            return artifacts.commit_shard(self._folder_uri, name, folder / "shard", rows=shard.rows, info=info)

    def _outcome(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
        if new["error_class"] != "success":
            return _UNCHANGED if new["error_class"] == "http_304" else str(new["error_class"])
        if new["sha256"] == old["sha256"]:
            return _UNCHANGED
        return _TAKEN_DOWN if new["sha256"] in self._refused.sha256 else _CHANGED


def _write_rows(table: pa.Table, changed: Mapping[str, Mapping[str, Any]], to: Path) -> None:
    """Write the rows of a shard with what has changed; a shard of an earlier release gets the new columns."""
    keys = table["key"].to_pylist()
    for name in _REPLACED:
        index = table.schema.get_field_index(name)
        field = pa.field(name, pa.string()) if index < 0 else table.schema.field(index).with_nullable(True)
        before = [None] * len(keys) if index < 0 else table[name].to_pylist()
        values = [changed[key][name] if key in changed else value for key, value in zip(keys, before, strict=True)]
        column = pa.array(values, field.type)
        table = table.append_column(field, column) if index < 0 else table.set_column(index, field, column)
    pq.write_table(table, to)


def _write_images(tar: Path, again: Path, changed: Mapping[str, Mapping[str, Any]], to: Path) -> None:
    """Write the samples of a shard, in their order, with the changed images in place of the former ones."""
    places = {row["key"]: key for key, row in changed.items()}
    with tarfile.open(again) as archive:
        fresh = {places[key]: image for key, image in _images(archive) if key in places}
    with tarfile.open(tar, "r|") as source, tarfile.open(to, "w") as target:
        for member in source:
            path, stream = PurePosixPath(member.name), source.extractfile(member)
            data = stream.read() if stream is not None else b""
            if path.stem in fresh and path.suffix == ".png":
                data = fresh[path.stem]
            elif path.stem in fresh and path.suffix == ".json":
                replaced = {name: changed[path.stem][name] for name in _REPLACED if name not in VALIDATOR_COLUMNS}
                data = json.dumps({**json.loads(data), **replaced}, default=str).encode()
            info = tarfile.TarInfo(member.name)  # no owner and no time: the same bytes on every run
            info.size = len(data)
            target.addfile(info, BytesIO(data))


def _images(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        stream = archive.extractfile(member)
        if member.name.endswith(".png") and stream is not None:
            yield PurePosixPath(member.name).stem, stream.read()
