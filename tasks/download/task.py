"""Download: a URL list to img2dataset's webdataset shards, each URL's outcome on record.

With the version before, only what is new: URLs it was not asked for, pictures whose bytes it does not have.
"""

import dataclasses
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from infra import artifacts, storage, uris
from infra.download.downloader import SHARD_ROWS, SHARDS, DownloadPolicy, download_shard
from infra.errors import InputError, StageError
from infra.formats import tables
from infra.formats.webdataset import DUPLICATE, TAKEN_DOWN, drop_images
from infra.settings import Settings
from tasks.references.types import ImageShards, StageResult, Takedown, config_to_dict
from tasks.references.url_history import Hashes, UrlHistory, hashes_of, write_seen
from tasks.stage import run_shards, run_stage, stage_task, sum_outcomes
from tasks.upkeep.takedown import Entries, read_entries

_TRANSIENT_OUTCOMES = ("connection_error", "timeout", "deadline_exceeded", "dns_error", "http_429", "http_5")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """How a URL list becomes shards."""

    shard_rows: int = 1000
    policy: DownloadPolicy = dataclasses.field(default_factory=DownloadPolicy)
    max_lost_fraction: float = 0.01  # shards lost (not URLs) before the stage fails
    workers: int = 2  # shards downloaded at once, each with the policy's threads
    retry_failed: bool = False  # ask again for URLs that failed in the version before

    def __post_init__(self) -> None:
        """Refuse what img2dataset's keys cannot count."""
        if not 1 <= self.shard_rows <= SHARD_ROWS:
            raise ValueError(f"shard_rows must lie in 1…{SHARD_ROWS}: img2dataset's keys have four digits a shard")


@stage_task(name="download")
def download(
    urls: str,
    base: str,
    config: DownloadConfig,
    *,
    previous: ImageShards | None = None,
    takedown: Takedown | None = None,
    cache: Path | None = None,
    verify: bool = False,
) -> StageResult[ImageShards]:
    """Fetch what ``urls`` lists into ``base/images/<key>``.

    The same list (content and order, not file name) and config find the same folder. With ``previous`` its shards are
    taken over, and of the list only URLs that it was not asked for are fetched, into shards numbered after its own;
    pictures whose bytes it has, or that come twice, are dropped, and so is what ``takedown`` names. A list without
    anything new is answered with ``previous`` itself, and so is one of failures that all fail again. With ``verify``
    the digests of shards that are there already are checked. Damaged ones are downloaded again, unless they were
    added to ``previous``.

    Raises:
        InputError: the list is empty, unreadable or lacks a ``url`` column.
        StageError: nothing could be downloaded; the histogram of reasons is in the message.
        IntegrityError: a committed file is damaged and is not downloaded again.
    """
    urls, cache = uris.hide(urls), cache or Settings().cache_folder
    seen = UrlHistory.of(previous, cache) if previous is not None else None
    refused = read_entries(takedown, cache) if takedown is not None else Entries()
    table = new_rows(tables.read_url_list(urls), seen, refused, config)
    if table.num_rows == 0:
        if previous is None:
            raise InputError(f"{urls} lists nothing that was not taken down; give it another URL")
        return StageResult(reference=previous, skipped=True, seconds=0.0, note=f"{urls} lists nothing new")
    inputs = {"urls": {"uri": urls, "digest": _digest_of(table)}}
    if takedown is not None:
        inputs["takedown"] = takedown.as_input()
    # The version before is no input, or nothing that it alone refers to could ever be collected.
    lineage = {"previous": previous.digest} if previous is not None else {}
    without = ("workers", "max_lost_fraction", "retry_failed")
    stage = artifacts.ArtifactBuilder(
        base, ImageShards.kind, inputs=inputs, config={**config_to_dict(config, without=without), **lineage}
    )
    delta = IncrementalDownload(
        stage=stage, table=table, urls=urls, previous=previous, seen=seen, refused=refused, cache=cache
    )
    started = time.monotonic()
    try:
        # Of what was added to a version, one shard may by now be all failures, and those delete the folder.
        repairs = previous is None
        return run_stage(stage, ImageShards, lambda: delta.make(config), note=_note, verify=verify, repairs=repairs)
    except _AllRetriesFailedError as error:
        assert previous is not None  # noqa: S101  # what failed before, failed for a version
        return StageResult(reference=previous, skipped=False, seconds=time.monotonic() - started, note=str(error))


def histogram(outcomes: dict[str, int]) -> str:
    """Outcomes, most frequent first, as one clause."""
    return ", ".join(f"{name} {count}" for name, count in Counter(outcomes).most_common())


class _AllRetriesFailedError(Exception):
    """Everything that was asked again has failed again; its message counts how."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IncrementalDownload:
    """What is asked for, and what was there before."""

    stage: artifacts.ArtifactBuilder
    table: pa.Table
    urls: str
    previous: ImageShards | None
    seen: UrlHistory | None
    refused: Entries
    cache: Path

    def make(self, config: DownloadConfig) -> artifacts.Manifest:
        """Download, drop what is there already, commit it after the shards before."""
        before = self.previous.manifest() if self.previous is not None else None
        taken = [shard.reused_from(self.previous.uri) for shard in before.shards] if self.previous and before else []
        first = 1 + max((int(shard.name) for shard in taken), default=-1)
        starts = range(0, self.table.num_rows, config.shard_rows)
        if first + len(starts) > SHARDS:
            raise InputError(f"{self.urls} needs shard {first + len(starts)}, names have five digits; raise shard_rows")
        items = [
            (f"{n:05d}", (n, self.table.slice(start, config.shard_rows))) for n, start in enumerate(starts, start=first)
        ]
        settings = (self.stage.uri, config.policy)
        done, lost = run_shards(
            self.stage, items, _Download, settings, max_lost_fraction=config.max_lost_fraction, actors=config.workers
        )
        self._require_news(sum_outcomes(done))
        self._require_any(sum_outcomes(done))
        if self.seen is not None or self.refused.sha256:
            done = self._without_what_is_there(done, config.workers)
        outcomes = sum_outcomes(done)
        hashes = hashes_of(self.stage.uri, done, self.cache)
        info: dict[str, Any] = {
            "requested": self.table.num_rows,
            "outcomes": outcomes,
            "lost_shards": lost,
            "seen": self._seen_files(hashes),
        }
        if before is not None:
            total = Counter(before.info["outcomes"])
            total.update(outcomes)
            info |= {"outcomes": dict(total), "added": {"requested": self.table.num_rows, "outcomes": outcomes}}
            info["requested"] += before.info.get("requested", before.rows)
        return self.stage.commit([*taken, *done], identity=before.identity if before is not None else None, info=info)

    def _require_news(self, outcomes: dict[str, int]) -> None:
        """End a download of URLs that failed before and all failed again: there is nothing new to record."""
        if self.seen is None or outcomes.get("success"):
            return
        if self.seen.asked(self.table["url"].to_pylist(), failed_too=True).all():
            storage.remove(self.stage.uri)  # the next time they are asked again
            raise _AllRetriesFailedError(f"still failing: {histogram(outcomes)}")

    def _require_any(self, outcomes: dict[str, int]) -> None:
        """Refuse a download of nothing; URLs added to a database may all be dead, but not the network."""
        if outcomes.get("success") or (
            self.previous is not None and not all(name.startswith(_TRANSIENT_OUTCOMES) for name in outcomes)
        ):
            return
        storage.remove(storage.join(self.stage.uri, "shards"))  # perhaps the network was down: try all of them again
        raise StageError(
            f"none of the {self.table.num_rows} URLs of {self.urls} could be downloaded ({histogram(outcomes)}); the "
            f"outcome of each is in {self.stage.uri}/NNNNN.parquet: mend the list or the network and run again"
        )

    def _without_what_is_there(self, done: list[artifacts.Shard], workers: int) -> list[artifacts.Shard]:
        """The shards, those rewritten that hold pictures the database has, that come twice, or were taken down."""
        given: set[str] = set()
        items = []
        for shard in done:
            path = artifacts.fetch_shard(self.stage.uri, shard, ".parquet", self.cache)
            table = tables.read_table(path, ["key", "sha256", "error_class"])
            rows = [row for row in table.to_pylist() if row["error_class"] == "success"]
            reasons = {}
            digests = [row["sha256"] for row in rows]
            held = self.seen.holds(digests) if self.seen is not None else [False] * len(rows)
            for row, is_held in zip(rows, held, strict=True):
                if row["sha256"] in self.refused.sha256:
                    reasons[row["key"]] = TAKEN_DOWN
                elif is_held or row["sha256"] in given:
                    reasons[row["key"]] = DUPLICATE
                if self.seen is not None:
                    given.add(row["sha256"])
            if reasons:
                items.append((shard, reasons))
        kept = {shard.name: shard for shard in done}
        with ThreadPoolExecutor(workers) as pool:  # few and quick beside the download: no worker is started for them
            kept |= {shard.name: shard for shard in pool.map(self._rewritten, items)}
        return list(kept.values())

    def _rewritten(self, item: tuple[artifacts.Shard, dict[str, str]]) -> artifacts.Shard:
        """A shard in its place without the pictures that there are reasons against."""
        shard, reasons = item
        tar, parquet = (
            artifacts.fetch_shard(self.stage.uri, shard, suffix, self.cache) for suffix in (".tar", ".parquet")
        )
        with storage.scratch() as folder:
            outcomes = drop_images(tar, parquet, folder / shard.name, reasons)
            # Killed in between, the shard has no marker and is downloaded again: files and marker never disagree.
            storage.remove(storage.join(self.stage.uri, "shards", f"{shard.name}.json"))
            info = {**shard.info, "outcomes": outcomes}
            rows = outcomes.get("success", 0)
            return artifacts.commit_shard(self.stage.uri, shard.name, folder, rows=rows, info=info)

    def _seen_files(self, added: Hashes) -> list[dict[str, Any]]:
        if self.seen is None:
            return [write_seen(self.stage.uri, added)]
        return self.seen.extended(self.stage.uri, added)


def new_rows(table: pa.Table, seen: UrlHistory | None, refused: Entries, config: DownloadConfig) -> pa.Table:
    """The rows to ask for. Without a version before, all that are not refused, a URL that comes twice included."""
    urls = table["url"].to_pylist()
    wanted = np.array([url not in refused.url for url in urls], dtype=np.bool_)
    if seen is not None:
        wanted &= ~seen.asked(urls, failed_too=not config.retry_failed)
        first: set[str] = set()
        for row in np.flatnonzero(wanted):
            wanted[row] = urls[row] not in first
            first.add(urls[row])
    return table if wanted.all() else table.filter(pa.array(wanted)).combine_chunks()


def _digest_of(table: pa.Table) -> str:
    """Of the names and values of its columns; of what JSON lacks (a date, bytes, a decimal) by its text form."""
    columns = [table.column_names, *(table[name].to_pylist() for name in table.column_names)]
    return artifacts.digest_of(json.loads(json.dumps(columns, default=str)))


def _note(manifest: artifacts.Manifest) -> str:
    if "added" in manifest.info:
        return f"added: {histogram(manifest.info['added']['outcomes'])}"
    return histogram(manifest.info["outcomes"])


class _Download:
    """One shard of the list, on a worker."""

    def __init__(self, folder_uri: str, policy: DownloadPolicy) -> None:
        self._folder_uri, self._policy = folder_uri, policy

    def __call__(self, item: tuple[str, tuple[int, pa.Table]]) -> artifacts.Shard:
        name, (number, rows) = item
        with storage.scratch() as folder:
            counts = download_shard(number, rows, folder, self._policy)
            info: dict[str, Any] = {"outcomes": counts.outcomes, "seconds": counts.seconds}
            return artifacts.commit_shard(self._folder_uri, name, folder, rows=counts.downloaded, info=info)
