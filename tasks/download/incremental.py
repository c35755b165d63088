"""Incremental download: the new rows of a URL list, on top of a previous version."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from infra import artifacts, storage
from infra.download.downloader import SHARDS, DownloadPolicy, download_shard
from infra.download.file_shard import import_shard
from infra.errors import InputError, StageError
from infra.formats import tables
from infra.formats.urls import normal_urls
from infra.formats.webdataset import DUPLICATE, TAKEN_DOWN, drop_images
from tasks.download.config import DownloadConfig
from tasks.download.listed_rows import RowSlice, Selection
from tasks.references.takedown import Entries
from tasks.references.types import ImageShards
from tasks.references.url_history import Hashes, UrlHistory, hash_digests, hashes_of, write_seen
from tasks.stage import run_shards, sum_outcomes

_TRANSIENT_OUTCOMES = ("connection_error", "timeout", "deadline_exceeded", "dns_error", "http_429", "http_5")


def histogram(outcomes: dict[str, int]) -> str:
    """Format outcome counts as one clause, most frequent first."""
    return ", ".join(f"{name} {count}" for name, count in Counter(outcomes).most_common())


class AllRetriesFailedError(Exception):
    """Raised when every retried URL has failed again. The message counts the outcomes."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IncrementalDownload:
    """Download of the new rows of a URL list, on top of a previous version if there is one."""

    stage: artifacts.ArtifactBuilder
    table: pa.Table
    selection: Selection
    urls: str
    previous: ImageShards | None
    seen: UrlHistory | None
    refused: Entries
    from_files: bool  # the rows name image files and not URLs
    cache: Path

    def make(self, config: DownloadConfig) -> artifacts.Manifest:
        """Download the rows, drop known images, and commit the new shards after those of the previous version."""
        before = self.previous.manifest() if self.previous is not None else None
        reused = [shard.reused_from(self.previous.uri) for shard in before.shards] if self.previous and before else []
        first = 1 + max((int(shard.name) for shard in reused), default=-1)
        items = list(self._items(first, config.shard_rows))
        settings = (self.stage.uri, config.worker_policy(), self.from_files)
        done, lost = run_shards(
            self.stage, items, _Download, settings, max_lost_fraction=config.max_lost_fraction, actors=config.workers
        )
        self._stop_if_retries_failed(sum_outcomes(done))
        self._require_success(sum_outcomes(done))
        done = self._without_known_images(done, config.workers)
        outcomes = sum_outcomes(done)
        hashes = hashes_of(self.stage.uri, done, self.cache)
        info: dict[str, Any] = {
            "requested": self._requested,
            "repeated": int(self.selection.repeated.sum()),
            "outcomes": outcomes,
            "lost_shards": lost,
            "seen": self._history_files(hashes),
        }
        if before is not None:
            total = Counter(before.info["outcomes"])
            total.update(outcomes)
            info |= {"outcomes": dict(total), "added": {"requested": self._requested, "outcomes": outcomes}}
            info["requested"] += before.info.get("requested", before.rows)
            info["repeated"] += before.info.get("repeated", 0)
        return self.stage.commit([*reused, *done], identity=before.identity if before is not None else None, info=info)

    @property
    def _requested(self) -> int:
        """Number of distinct URLs."""
        return int((~self.selection.repeated).sum())

    def _items(self, first: int, shard_rows: int) -> Iterator[tuple[str, tuple[int, RowSlice]]]:
        """Yield the work of each shard: ``shard_rows`` rows of the list, without repeated URLs.

        A URL is repeated within its shard's rows, so that the same rows are in the same shard whether or not an earlier
        release, which downloaded repeated URLs, began this download.
        """
        rows, repeated = self.selection.rows, self.selection.repeated
        starts = range(0, len(rows), shard_rows)
        if first + len(starts) > SHARDS:
            raise InputError(
                f"{self.urls} needs {first + len(starts)} shards, but names of five digits allow {SHARDS}; "
                "raise shard_rows"
            )
        for number, start in enumerate(starts, start=first):
            part = slice(start, start + shard_rows)
            if not repeated[part].all():
                yield f"{number:05d}", (number, RowSlice(self.table, rows[part][~repeated[part]]))

    def _stop_if_retries_failed(self, outcomes: dict[str, int]) -> None:
        """Raise ``AllRetriesFailedError`` if all URLs had failed before and failed again: nothing is recorded."""
        if self.seen is None or outcomes.get("success"):
            return
        listed = self.table["url"].take(pa.array(self.selection.rows))
        if self.seen.requested(listed.to_pylist(), failed_too=True).all():
            storage.remove(self.stage.uri)  # so that the next run requests them again
            raise AllRetriesFailedError(f"still failing: {histogram(outcomes)}")

    def _require_success(self, outcomes: dict[str, int]) -> None:
        """Raise ``StageError`` if nothing was downloaded; URLs added to a previous version may fail permanently."""
        if outcomes.get("success") or (
            self.previous is not None and not all(name.startswith(_TRANSIENT_OUTCOMES) for name in outcomes)
        ):
            return
        # The network may have been down: the next run must try all URLs again.
        storage.remove(storage.join(self.stage.uri, "shards"))
        raise StageError(
            f"none of the {self._requested} URLs of {self.urls} could be downloaded ({histogram(outcomes)}); see "
            f"the outcome of each in {self.stage.uri}/NNNNN.parquet, fix the list or the network and run again"
        )

    def _without_known_images(self, done: list[artifacts.Shard], workers: int) -> list[artifacts.Shard]:
        """Return the shards, after rewriting those with images that are known, repeated or taken down."""
        so_far = np.empty(0, dtype=np.uint64)  # sorted hashes of the images of the shards before
        items = []
        for shard in done:
            path = artifacts.fetch_shard(self.stage.uri, shard, ".parquet", self.cache)
            table = tables.read_table(path, ["key", "sha256", "error_class"])
            rows = [row for row in table.to_pylist() if row["error_class"] == "success"]
            reasons = {}
            digests = [row["sha256"] for row in rows]
            hashes = hash_digests(digests)
            known = np.isin(hashes, so_far, assume_unique=False)
            if self.seen is not None:
                known |= self.seen.contains(digests)
            here: set[str] = set()
            for row, is_known in zip(rows, known, strict=True):
                if row["sha256"] in self.refused.sha256:
                    reasons[row["key"]] = TAKEN_DOWN
                elif is_known or row["sha256"] in here:
                    reasons[row["key"]] = DUPLICATE
                here.add(row["sha256"])
            so_far = np.union1d(so_far, hashes)
            if reasons:
                items.append((shard, reasons))
        shards = {shard.name: shard for shard in done}
        with ThreadPoolExecutor(workers) as pool:  # threads suffice: rewriting is short compared with the download
            shards |= {shard.name: shard for shard in pool.map(self._rewrite, items)}
        return list(shards.values())

    def _rewrite(self, item: tuple[artifacts.Shard, dict[str, str]]) -> artifacts.Shard:
        """Rewrite a shard in place without the images that have a reason to be dropped."""
        shard, reasons = item
        tar, parquet = (
            artifacts.fetch_shard(self.stage.uri, shard, suffix, self.cache) for suffix in (".tar", ".parquet")
        )
        with storage.scratch() as folder:
            outcomes = drop_images(tar, parquet, folder / shard.name, reasons)
            # After a kill here the shard has no marker and is downloaded again: files and marker never disagree.
            storage.remove(storage.join(self.stage.uri, "shards", f"{shard.name}.json"))
            info = {**shard.info, "outcomes": outcomes}
            rows = outcomes.get("success", 0)
            return artifacts.commit_shard(self.stage.uri, shard.name, folder, rows=rows, info=info)

    def _history_files(self, added: Hashes) -> list[dict[str, Any]]:
        if self.seen is None:
            return [write_seen(self.stage.uri, added)]
        return self.seen.extend(self.stage.uri, added)


class _Download:
    """Worker that downloads one shard of the list."""

    def __init__(self, folder_uri: str, policy: DownloadPolicy, from_files: bool) -> None:
        self._folder_uri, self._policy = folder_uri, policy
        # The columns do not decide: a list from the web could name files of this machine.
        self._make = import_shard if from_files else download_shard

    def __call__(self, item: tuple[str, tuple[int, RowSlice]]) -> artifacts.Shard:
        name, (number, rows_of_shard) = item
        listed = rows_of_shard.read()
        index = listed.schema.get_field_index("url")
        rows = _with_text_captions(listed.set_column(index, "url", normal_urls(listed["url"])))
        with storage.scratch() as folder:
            counts = self._make(number, rows, folder, self._policy)
            info: dict[str, Any] = {"outcomes": counts.outcomes, "seconds": counts.seconds}
            return artifacts.commit_shard(self._folder_uri, name, folder, rows=counts.downloaded, info=info)


def _with_text_captions(rows: pa.Table) -> pa.Table:
    """Return the rows with captions that are text; a parquet file may store them as bytes."""
    index = rows.schema.get_field_index("caption")
    if index < 0 or rows.schema.field(index).type not in (pa.binary(), pa.large_binary()):
        return rows
    texts = [None if one is None else one.decode("utf-8", "replace") for one in rows["caption"].to_pylist()]
    return rows.set_column(index, "caption", pa.array(texts, pa.string()))
