"""Download stage: a URL list to webdataset shards in img2dataset's layout, with the outcome of each URL recorded.

Given the previous version, only new URLs are requested, and images whose bytes that version already has are dropped.
"""

import json
import time

import pyarrow as pa

from infra import artifacts, uris
from infra.errors import InputError
from infra.formats import tables
from tasks.download.config import DownloadConfig
from tasks.download.incremental import AllRetriesFailedError, IncrementalDownload, histogram, new_rows
from tasks.references.domain_folder import DomainFolder
from tasks.references.takedown import Entries, read_entries
from tasks.references.types import ImageShards, StageResult, Takedown, config_to_dict
from tasks.references.url_history import UrlHistory
from tasks.stage import run_stage, stage_task


@stage_task(name="download")
def download(
    urls: str,
    folder: DomainFolder,
    config: DownloadConfig,
    *,
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
        urls: URI of the URL list, with a ``url`` column.
        folder: Folder of the domain.
        config: Settings of the download.
        previous: Version to extend.
        takedown: URLs and sha256 digests to refuse.
        verify: Check the digests of committed shards.

    Raises:
        InputError: the list is empty, unreadable or lacks a ``url`` column.
        StageError: nothing could be downloaded; the message counts the reasons.
        IntegrityError: a committed file is damaged and is not downloaded again.
    """
    urls, cache = uris.hide(urls), folder.cache
    seen = UrlHistory.of(previous, cache) if previous is not None else None
    refused = read_entries(takedown, cache) if takedown is not None else Entries()
    table = new_rows(tables.read_url_list(urls), seen, refused, config)
    if table.num_rows == 0:
        if previous is None:
            raise InputError(f"every URL of {urls} was taken down; add other URLs")
        return StageResult(reference=previous, skipped=True, seconds=0.0, note=f"{urls} lists no new URLs")
    inputs = {"urls": {"uri": urls, "digest": _list_digest(table)}}
    if takedown is not None:
        inputs["takedown"] = takedown.as_input()
    # The previous version is not an input: otherwise garbage collection could never delete files that only it uses.
    lineage = {"previous": previous.digest} if previous is not None else {}
    without = ("workers", "max_lost_fraction", "retry_failed")
    stage = artifacts.ArtifactBuilder(
        folder.uri, ImageShards.kind, inputs=inputs, config={**config_to_dict(config, without=without), **lineage}
    )
    incremental = IncrementalDownload(
        stage=stage, table=table, urls=urls, previous=previous, seen=seen, refused=refused, cache=cache
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


def _list_digest(table: pa.Table) -> str:
    """Return the digest of column names and values. Types that JSON lacks (dates, bytes, decimals) count as text."""
    columns = [table.column_names, *(table[name].to_pylist() for name in table.column_names)]
    return artifacts.digest_of(json.loads(json.dumps(columns, default=str)))


def _note(manifest: artifacts.Manifest) -> str:
    if "added" in manifest.info:
        return f"added: {histogram(manifest.info['added']['outcomes'])}"
    return histogram(manifest.info["outcomes"])
