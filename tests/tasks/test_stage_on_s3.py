"""A stage whose object store dies in the middle, and one that finds wrong keys."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.fakes import LoopbackServer, Reply
from support.object_stores import Bucket, RadosGateway
from support.tiny_domain import drawn, encoded, write_urls

from infra import artifacts, compute
from infra.download.downloader import DownloadPolicy
from infra.errors import NotFoundError, TransientError
from tasks.download.task import DownloadConfig, download

SHARDS, SHARD_ROWS = 4, 2


@pytest.fixture
def pictures() -> Iterator[LoopbackServer]:
    """Pictures that take half a second each, so that there is a middle."""
    picture = encoded(drawn("red", "circle"))

    def slowly() -> Iterator[bytes]:
        time.sleep(0.5)
        yield picture

    with LoopbackServer({f"/{number}.png": Reply(body=slowly) for number in range(SHARDS * SHARD_ROWS)}) as server:
        yield server


def config(server: LoopbackServer) -> DownloadConfig:
    policy = DownloadPolicy(allow_hosts=(server.host,), threads=1, retries=0)
    return DownloadConfig(shard_rows=SHARD_ROWS, workers=1, policy=policy)


def listed(server: LoopbackServer, folder: Path) -> str:
    return str(write_urls(folder / "urls.jsonl", [server.url(path) for path in server.replies]))


@pytest.mark.s3
def test_a_stage_whose_store_dies_goes_on_at_the_shard(
    radosgw_bucket: Bucket, pictures: LoopbackServer, tmp_path: Path
) -> None:
    bucket, store = radosgw_bucket, radosgw_bucket.store
    assert isinstance(store, RadosGateway)
    urls = listed(pictures, tmp_path)

    def run(base: str) -> artifacts.Manifest:
        return download(urls, f"{bucket.uri}/{base}", config(pictures)).reference.manifest()

    def markers() -> set[str]:
        return {key for key in list(bucket.keys()) if "/shards/" in key}

    with compute.cluster(cores=1), ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, "broken")
        while not (before := markers()):
            assert not running.done(), running.exception()
            time.sleep(0.05)
        store.kill()
        try:
            error = running.exception(300)
        finally:
            store.revive()
        assert isinstance(error, TransientError), error
        assert "\n" not in str(error)
        assert "shards have to wait" in str(error)
        assert "check that the store is up and run again" in str(error)
        kept = markers()
        assert before <= kept
        assert len(kept) < SHARDS
        assert not any(key.endswith("manifest.json") for key in list(bucket.keys()))

        asked = len(pictures.requests)
        resumed = run("broken")
        assert len(pictures.requests) - asked == (SHARDS - len(kept)) * SHARD_ROWS
        assert resumed.digest == run("unbroken").digest


def test_a_missing_bucket_is_told_before_anything_is_downloaded(
    bucket: Bucket, pictures: LoopbackServer, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match=r"bucket no-such-bucket does not exist .*; create it or choose"):
        download(listed(pictures, tmp_path), "s3://no-such-bucket/twemoji", config(pictures))
    with bucket.store.locked(), pytest.raises(NotFoundError, match=r"; check the credentials and the bucket$"):
        download(listed(pictures, tmp_path), f"{bucket.uri}/twemoji", config(pictures))
    assert pictures.requests == []
