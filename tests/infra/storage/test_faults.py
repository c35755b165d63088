"""Crashes, hangs and restarts of a real object store."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import s3fs
from support.object_stores import Bucket, RadosGateway

from infra import storage
from infra.errors import TransientError
from infra.storage import errors

pytestmark = pytest.mark.s3


@pytest.fixture
def store(radosgw_bucket: Bucket) -> Iterator[RadosGateway]:
    """The store, restarted after the test if necessary."""
    store = radosgw_bucket.store
    assert isinstance(store, RadosGateway)
    yield store
    if not store.is_up():
        store.revive()


def big_file(folder: Path) -> Path:
    path = folder / "big"
    path.write_bytes(np.random.default_rng(0).bytes(200_000_000))
    return path


def wait_for_an_upload(bucket: Bucket, uploading: Future[None]) -> None:
    deadline = time.monotonic() + 60
    while not bucket.uploads():
        assert not uploading.done()
        assert time.monotonic() < deadline


def test_put_store_killed_during_upload_keeps_old_objects(
    radosgw_bucket: Bucket, store: RadosGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "RETRY_DELAYS_S", (0.1,))
    bucket, path = radosgw_bucket, big_file(tmp_path)
    bucket.write("d/old.npy", b"old and whole")
    for key in ("d/old.npy", "d/new.npy"):
        with ThreadPoolExecutor(1) as pool:
            uploading = pool.submit(storage.put, path, f"{bucket.uri}/{key}")
            wait_for_an_upload(bucket, uploading)
            store.kill()
            error = uploading.exception(120)
        assert isinstance(error, TransientError)
        assert "\n" not in str(error)
        assert str(error).startswith(f"{bucket.uri}/{key} could not be reached at {store.endpoint}: ")
        assert str(error).endswith("; check that the store is up and run again")
        store.revive()
        assert bucket.keys() == ["d/old.npy"]
        assert storage.read_bytes(f"{bucket.uri}/d/old.npy") == b"old and whole"
        assert not storage.exists(f"{bucket.uri}/d/new.npy")
        (left,) = bucket.uploads()  # an incomplete upload, which can be aborted
        assert left[0] == key
        bucket.abort(*left)
        assert bucket.uploads() == []
    storage.put(path, f"{bucket.uri}/d/old.npy")
    assert storage.sha256(f"{bucket.uri}/d/old.npy") == storage.sha256(str(path))


def test_storage_retries_until_the_store_has_restarted(
    radosgw_bucket: Bucket, store: RadosGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "RETRY_DELAYS_S", (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0))
    bucket, path = radosgw_bucket, big_file(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        uploading = pool.submit(storage.put, path, f"{bucket.uri}/a.npy")
        wait_for_an_upload(bucket, uploading)
        store.kill()
        reviving = pool.submit(lambda: (time.sleep(2), store.revive()))
        assert not storage.exists(f"{bucket.uri}/none")
        uploading.result(120)
        reviving.result()
    assert storage.fetch(f"{bucket.uri}/a.npy", tmp_path / "back").read_bytes() == path.read_bytes()


def test_read_bytes_frozen_store_raises_transient_error(
    radosgw_bucket: Bucket, store: RadosGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "RETRY_DELAYS_S", (0.1,))
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 1)
    radosgw_bucket.write("a", b"x")
    with store.frozen(), pytest.raises(TransientError) as caught:
        storage.read_bytes(f"{radosgw_bucket.uri}/a")
    assert str(caught.value).startswith(
        f"{radosgw_bucket.uri}/a could not be reached at {store.endpoint}: Read timeout"
    )
    assert storage.read_bytes(f"{radosgw_bucket.uri}/a") == b"x"
