"""Takedown stage: read a list of images that a domain may never show again, and store its entries.

The next index hides the matching rows. Compaction (``tasks/upkeep/compact.py``) removes their bytes from the shards.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from infra import artifacts, logs, storage, uris
from infra.errors import InputError
from infra.formats import tables
from tasks.references.domain_folder import DomainFolder
from tasks.references.takedown import COLUMNS, Entries, Matcher, list_takedowns, read_entries, read_takedown_list
from tasks.references.types import ImageShards, StageResult, Takedown
from tasks.references.url_history import FINAL_OUTCOMES
from tasks.stage import run_stage, stage_task

_SCHEMA = pa.schema([("column", pa.string()), ("value", pa.string())])
_MAX_QUOTED = 3  # number of entries that a message quotes
_MATCH_COLUMNS = [*COLUMNS, "error_class"]


@stage_task(name="takedown")
def take_down(
    listed: str, images: ImageShards, folder: DomainFolder, *, previous: Takedown | None = None
) -> StageResult[Takedown]:
    """Add the entries of the list at ``listed`` to ``previous`` and store the result in ``<folder>/takedown/<key>``.

    Images are identified by their bytes. For a url, the sha256 of the image is stored too, so that copies at other
    URLs are hidden as well. A key is replaced by the sha256, since keys repeat once databases are merged. A url or
    sha256 that matches no image yet is rejected by later downloads.

    Raises:
        InputError: no entry matches an image of ``images`` or an earlier entry, or a key matches several images.
    """
    before = read_entries(previous, folder.cache) if previous is not None else Entries()
    requested = read_takedown_list(listed)
    is_known = not requested.key and not len(requested - before)  # keys are stored as sha256 and need a lookup
    entries = before if is_known else before | _resolve(requested, before, images, folder.cache, listed)
    if previous is not None and entries == before:
        return StageResult(reference=previous, skipped=True, seconds=0.0, note="all entries were taken down before")
    return commit_takedown(entries, folder, info={"list": storage.absolute(uris.hide(listed))})


def commit_takedown(entries: Entries, folder: DomainFolder, *, info: Mapping[str, str]) -> StageResult[Takedown]:
    """Store ``entries`` in a folder that depends only on the entries, not on their order or origin."""
    stage = artifacts.ArtifactBuilder(
        folder.uri, Takedown.kind, inputs={}, config={"entries": artifacts.digest_of(entries.listed())}
    )

    def build() -> artifacts.Manifest:
        with storage.scratch() as scratch:
            tables.write_table(entries.listed(), _SCHEMA, scratch / "takedown.parquet")
            shard = artifacts.commit_shard(stage.uri, "00000", scratch, rows=len(entries), info={})
        return stage.commit([shard], info=info)

    return run_stage(stage, Takedown, build)


@contextlib.contextmanager
def rolled_back_on(
    folder: DomainFolder,
    when: type[Exception] | tuple[type[Exception], ...],
    *,
    but: Callable[[], Takedown | None] = lambda: None,
) -> Iterator[None]:
    """Roll back takedowns created in this block if it fails with one of the errors ``when``.

    ``but`` returns a takedown that a version already uses; it is not rolled back.
    """
    before = list_takedowns(folder)
    try:
        yield
    except when:
        used = but()
        remaining = {*before, *([] if used is None else [storage.canonical(used.uri)])}
        for uri in list_takedowns(folder):
            if not {uri, storage.canonical(uri)} & remaining:
                storage.discard(uri)
        raise


def with_image_hashes(entries: Entries, images: ImageShards, cache: Path) -> Entries:
    """Add the sha256 of the images at the urls of ``entries`` in ``images``, so that copies are hidden as well."""
    found, _ = _match_images(Entries(url=entries.url), images, cache) if entries.url else ([], None)
    return entries | Entries(sha256=frozenset(row["sha256"] for row in found if row["sha256"]))


def _resolve(requested: Entries, before: Entries, images: ImageShards, cache: Path, listed: str) -> Entries:
    """Check the ``requested`` entries against ``images`` and return them with the sha256 of each matching image."""
    found, key_counts = _match_images(requested, images, cache)
    existing = Entries(*(frozenset(row[name] for row in found) for name in COLUMNS)) | before
    if absent := (requested - existing).listed():
        _report_unmatched(absent, len(requested), images, listed)
    if repeated := sorted(key for key, count in key_counts.items() if count > 1):
        raise InputError(
            f"key {repeated[0]} of {listed} matches {key_counts[repeated[0]]} images of the merged database "
            f"{images.uri}; identify the image by its url or sha256"
        )
    return Entries(
        url=requested.url,
        sha256=requested.sha256 | {row["sha256"] for row in found if row["sha256"]},
        key=frozenset(row["key"] for row in found if row["key"] in requested.key and not row["sha256"])
        | (requested.key & before.key),
    )


def _report_unmatched(absent: list[dict[str, str]], total: int, images: ImageShards, listed: str) -> None:
    """Warn about entries that match no image. Raise ``InputError`` if none does, since the list is probably wrong."""
    first = ", ".join(f"{entry['column']} {entry['value']}" for entry in absent[:_MAX_QUOTED])
    summary = f"{len(absent)} of {total} entries ({first}{', …' if len(absent) > _MAX_QUOTED else ''})"
    if len(absent) == total:
        raise InputError(f"takedown list {listed} matches no image of {images.uri}: {summary}; check the list")
    logs.get("stage").warning(
        "takedown list %s has entries that match no image of %s: %s; later downloads reject their urls and sha256",
        listed,
        images.uri,
        summary,
    )


def _match_images(requested: Entries, images: ImageShards, cache: Path) -> tuple[list[dict[str, str]], Counter[str]]:
    """Return the rows of matching images, present or removed, and the number of images per requested key."""
    matcher = Matcher(requested)

    def match(shard: artifacts.Shard) -> list[dict[str, str]]:
        table = tables.read_table(artifacts.fetch_shard(images.uri, shard, ".parquet", cache), _MATCH_COLUMNS)
        table = table.filter(pa.array(matcher.mask(table)))
        rows: list[dict[str, str]] = table.filter(pc.is_in(table["error_class"], pa.array(FINAL_OUTCOMES))).to_pylist()
        return rows

    found = [row for rows in storage.read_all(match, images.manifest().shards) for row in rows]
    return found, Counter(row["key"] for row in found if row["key"] in requested.key)
