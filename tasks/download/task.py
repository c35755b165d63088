"""Download stage: a URL list to webdataset shards in img2dataset's layout, with the outcome of each URL recorded.

Given the previous version, only new URLs are requested, and images whose bytes that version already has are dropped.
"""

import time
from collections.abc import Sequence

from infra import artifacts
from infra.errors import InputError
from infra.formats import tables
from tasks.download.config import DownloadConfig, ListOptions
from tasks.download.incremental import AllRetriesFailedError, IncrementalDownload, histogram
from tasks.download.listed_rows import list_digest, read_rows, select_rows
from tasks.references.domain_folder import DomainFolder
from tasks.references.takedown import Entries, read_entries
from tasks.references.types import ImageShards, StageResult, Takedown, config_to_dict
from tasks.references.url_history import UrlHistory
from tasks.stage import run_stage, stage_task


@stage_task(name="download")
def download(
    urls: str | Sequence[str],
    folder: DomainFolder,
    config: DownloadConfig,
    *,
    options: ListOptions | None = None,
    previous: ImageShards | None = None,
    takedown: Takedown | None = None,
    verify: bool = False,
) -> StageResult[ImageShards]:
    """Download the images listed in ``urls`` into ``<folder>/images/<key>``.

    The same list (content and order, not file name) and config give the same folder.

    With ``previous``, its shards are reused and only URLs that it has not requested are downloaded, into new shards
    numbered after the existing ones. Images whose bytes ``previous`` has, repeated images, and images named by
    ``takedown`` are dropped. If the list has nothing new, or all retried URLs fail again, ``previous`` is returned.

    Damaged shards are downloaded again, unless they were added to a ``previous`` version.

    Args:
        urls: URI of the URL list, or several: files, folders or patterns.
        folder: Folder of the domain.
        config: Settings of the download.
        options: How to read the list.
        previous: Version to extend.
        takedown: URLs and sha256 digests to refuse.
        verify: Check the digests of committed shards.

    Raises:
        InputError: the list is empty, unreadable or lacks a ``url`` column.
        StageError: nothing could be downloaded; the message counts the reasons.
        IntegrityError: a committed file is damaged and is not downloaded again.
    """
    listed, cache = tables.shown_name(urls), folder.cache
    seen = UrlHistory.of(previous, cache) if previous is not None else None
    refused = read_entries(takedown, cache) if takedown is not None else Entries()
    options = options or ListOptions()
    table = read_rows(urls, options)
    selection = select_rows(table, seen, refused, config)
    if not len(selection.rows):
        if previous is None:
            raise InputError(f"every URL of {listed} was taken down; add other URLs")
        return StageResult(reference=previous, skipped=True, seconds=0.0, note=f"{listed} lists no new URLs")
    # Repeated URLs are part of the digest of a first list, as they were when they were downloaded.
    digested = selection.rows if previous is None else selection.rows[~selection.repeated]
    inputs = {"urls": {"uri": listed, "digest": list_digest(table, digested)}}
    if takedown is not None:
        inputs["takedown"] = takedown.as_input()
    # The previous version is not an input: otherwise garbage collection could never delete files that only it uses.
    lineage = {"previous": previous.digest} if previous is not None else {}
    without = ("workers", "max_lost_fraction", "retry_failed")
    stage = artifacts.ArtifactBuilder(
        folder.uri, ImageShards.kind, inputs=inputs, config={**config_to_dict(config, without=without), **lineage}
    )
    incremental = IncrementalDownload(
        stage=stage,
        table=table,
        selection=selection,
        urls=listed,
        previous=previous,
        seen=seen,
        refused=refused,
        from_files=options.images,
        cache=cache,
    )
    started = time.monotonic()
    try:
        # No repair with a previous version: if every URL of the damaged shard fails now, the folder would be deleted.
        repairs = previous is None
        return run_stage(
            stage, ImageShards, lambda: incremental.make(config), note=_note, verify=verify, repairs=repairs
        )
    except AllRetriesFailedError as error:
        assert previous is not None  # noqa: S101  # retries need a previous version
        return StageResult(reference=previous, skipped=False, seconds=time.monotonic() - started, note=str(error))


def _note(manifest: artifacts.Manifest) -> str:
    repeated = manifest.info.get("repeated")
    note = f"; {repeated} repeated URLs" if repeated else ""
    if "added" in manifest.info:
        return f"added: {histogram(manifest.info['added']['outcomes'])}{note}"
    return histogram(manifest.info["outcomes"]) + note
