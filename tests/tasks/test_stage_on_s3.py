"""A stage whose object store dies halfway, and stages with a missing bucket or wrong credentials."""

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
from tasks.download.config import DownloadConfig
from tasks.download.task import download
from tasks.references.domain_folder import DomainFolder

SHARDS, SHARD_ROWS = 4, 2


@pytest.fixture
def images() -> Iterator[LoopbackServer]:
    """Serve images that take half a second each, so that the store can be killed halfway."""
    image = encoded(drawn("red", "circle"))

    def slowly() -> Iterator[bytes]:
        time.sleep(0.5)
        yield image

    with LoopbackServer({f"/{number}.png": Reply(body=slowly) for number in range(SHARDS * SHARD_ROWS)}) as server:
        yield server


def config(server: LoopbackServer) -> DownloadConfig:
    policy = DownloadPolicy(allow_hosts=(server.host,), threads=1, retries=0)
    return DownloadConfig(shard_rows=SHARD_ROWS, workers=1, policy=policy)


def listed(server: LoopbackServer, folder: Path) -> str:
    return str(write_urls(folder / "urls.jsonl", [server.url(path) for path in server.replies]))


@pytest.mark.s3
def test_download_after_store_died_resumes_at_the_missing_shards(
    radosgw_bucket: Bucket, images: LoopbackServer, tmp_path: Path
) -> None:
    bucket, store = radosgw_bucket, radosgw_bucket.store
    assert isinstance(store, RadosGateway)
    urls = listed(images, tmp_path)

    def run(base: str) -> artifacts.Manifest:
        return download(urls, DomainFolder(uri=f"{bucket.uri}/{base}"), config(images)).reference.manifest()

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
        assert "shards failed temporarily" in str(error)
        assert "check that the store is up and run again" in str(error)
        committed = markers()
        assert before <= committed
        assert len(committed) < SHARDS
        assert not any(key.endswith("manifest.json") for key in list(bucket.keys()))

        requests_before = len(images.requests)
        resumed = run("broken")
        assert len(images.requests) - requests_before == (SHARDS - len(committed)) * SHARD_ROWS
        assert resumed.digest == run("unbroken").digest


def test_download_into_missing_or_locked_bucket_raises_before_any_request(
    bucket: Bucket, images: LoopbackServer, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match=r"bucket no-such-bucket does not exist .*; create it or choose"):
        download(listed(images, tmp_path), DomainFolder(uri="s3://no-such-bucket/twemoji"), config(images))
    with bucket.store.locked(), pytest.raises(NotFoundError, match=r"; check the credentials and the bucket$"):
        download(listed(images, tmp_path), DomainFolder(uri=f"{bucket.uri}/twemoji"), config(images))
    assert images.requests == []
