"""Download: a URL list to img2dataset's webdataset shards, each URL's outcome on record."""

import dataclasses
from collections import Counter
from typing import Any

import pyarrow as pa

from infra import artifacts, shards, storage
from infra.downloader import DownloadPolicy, download_shard
from infra.errors import StageError
from tasks.contracts import ImageShards, Outcome, config_of
from tasks.stage import map_stage, skip_or_make, stage_task


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """How a URL list becomes shards."""

    shard_rows: int = 1000
    policy: DownloadPolicy = dataclasses.field(default_factory=DownloadPolicy)
    max_lost_fraction: float = 0.01  # shards lost (not URLs) before the stage fails
    workers: int = 2  # shards downloaded at once, each with the policy's threads

    def __post_init__(self) -> None:
        """Refuse what img2dataset's keys cannot count."""
        if not 1 <= self.shard_rows <= 10_000:
            raise ValueError("shard_rows must lie in 1…10000: img2dataset's keys have four digits a shard")


def download_images(urls: str, base: str, config: DownloadConfig) -> Outcome[ImageShards]:
    """Fetch what ``urls`` lists into ``base/images/<key>``.

    The same list (content and order, not file name) and config find the same folder.

    Raises:
        InputError: the list is empty, unreadable or lacks a ``url`` column.
        StageError: nothing could be downloaded; the histogram of reasons is in the message.
    """
    table = shards.read_url_list(urls)
    digest = artifacts.digest_of([table.column_names, *(table[name].to_pylist() for name in table.column_names)])
    stage = artifacts.Stage(
        base,
        ImageShards.kind,
        inputs={"urls": {"uri": urls, "digest": digest}},
        config=config_of(config, without=("workers", "max_lost_fraction")),
    )

    def make() -> artifacts.Manifest:
        starts = range(0, table.num_rows, config.shard_rows)
        items = [(f"{n:05d}", (n, table.slice(start, config.shard_rows))) for n, start in enumerate(starts)]
        settings = (stage.uri, config.policy)
        done, lost = map_stage(
            stage, items, _Download, settings, max_lost_fraction=config.max_lost_fraction, actors=config.workers
        )
        outcomes: Counter[str] = Counter()
        for shard in done:
            outcomes.update(shard.info["outcomes"])
        if not outcomes["success"]:
            storage.remove(storage.join(stage.uri, "shards"))  # perhaps the network was down: try all of them again
            raise StageError(
                f"none of the {table.num_rows} URLs of {urls} could be downloaded ({histogram(outcomes)}); the outcome "
                f"of each is in {stage.uri}/NNNNN.parquet: mend the list or the network and run again"
            )
        info = {"requested": table.num_rows, "outcomes": dict(outcomes), "lost_shards": lost}
        return stage.commit(done, info=info)

    return skip_or_make(stage, ImageShards, make, note=lambda manifest: histogram(manifest.info["outcomes"]))


def histogram(outcomes: dict[str, int]) -> str:
    """Outcomes, most frequent first, as one clause."""
    return ", ".join(f"{name} {count}" for name, count in Counter(outcomes).most_common())


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


@stage_task(name="download")
def download(urls: str, base: str, config: DownloadConfig) -> Outcome[ImageShards]:
    """Task of :func:`download_images`."""
    return download_images(urls, base, config)
