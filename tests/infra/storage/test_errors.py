"""A store that refuses, is not there or breaks off: tried again where that may help, then one clear line."""

import errno
import socket
import time
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions
import fsspec
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem
from support.object_stores import Bucket, RadosGateway, one_line

from infra import storage
from infra.errors import KNNDiffusionError, NotFoundError, TransientError
from infra.storage import errors


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other without a pause."""
    monkeypatch.setattr(errors, "RETRY_DELAYS_S", (0.0, 0.0))


def test_a_missing_bucket_is_one_clear_line(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    uri = "s3://no-such-bucket/d/a"
    for touch in (
        lambda: storage.read_bytes(uri),
        lambda: storage.write_bytes(uri, b"x"),
        lambda: storage.create_bytes(uri, b"x"),
        lambda: storage.put(tmp_path / "a", uri),
        lambda: storage.fetch(uri, tmp_path / "b"),
        lambda: storage.exists(uri),
        lambda: storage.size(uri),
        lambda: storage.list_names("s3://no-such-bucket/d"),
        lambda: storage.remove(uri),
    ):
        with pytest.raises(NotFoundError) as caught:
            touch()
        message = one_line(caught)
        assert message.startswith("s3://no-such-bucket/d")
        assert message.endswith(
            f": bucket no-such-bucket does not exist at {bucket.store.endpoint}; create it or choose another root"
        )


def test_refused_credentials_are_one_clear_line(bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("d/a", b"x")
    (tmp_path / "a").write_bytes(b"y")
    uri = f"{bucket.uri}/d/a"
    with bucket.store.locked():
        for touch in (
            lambda: storage.read_bytes(uri),
            lambda: storage.write_bytes(uri, b"y"),
            lambda: storage.create_bytes(uri, b"y"),
            lambda: storage.put(tmp_path / "a", uri),
            lambda: storage.exists(uri),
            lambda: storage.list_names(uri),
            lambda: storage.remove(uri),
        ):
            with pytest.raises(NotFoundError) as caught:
                touch()
            message = one_line(caught)
            assert message.startswith(f"access to {uri} is denied at {bucket.store.endpoint}: ")
            assert message.endswith("; check the credentials and the bucket")
    assert bucket.read("d/a") == b"x"


def test_wrong_and_missing_keys_are_told(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bucket.write("d/a", b"x")
    uri = f"{bucket.uri}/d/a"
    if isinstance(bucket.store, RadosGateway):  # moto admits everybody
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            with monkeypatch.context() as patch:
                patch.setenv(name, "wrong")
                s3fs.S3FileSystem.clear_instance_cache()
                with pytest.raises(
                    NotFoundError, match=r"access to .* is denied .*; check the credentials and the bucket$"
                ):
                    storage.read_bytes(uri)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(NotFoundError) as caught:
        storage.read_bytes(uri)
    assert one_line(caught).startswith(f"no credentials for {uri}: ")


def test_a_store_that_is_not_there_is_one_clear_line(
    moto_bucket: Bucket, hasty: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    for touch in (storage.exists, storage.read_bytes, storage.list_names):
        with pytest.raises(TransientError) as caught:
            touch("s3://bucket/a")
        message = one_line(caught)
        assert message.startswith(f"s3://bucket/a could not be reached at {endpoint}: Could not connect")
        assert message.endswith("; check that the store is up and run again")


class BreakingFileSystem(MemoryFileSystem):
    """``breaking://``: reads and writes break off half way with ``error``, the first ``times``."""

    protocol = "breaking"
    error: OSError
    times = 0

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        Path(lpath).write_bytes(b"hal")
        self._break()
        Path(lpath).write_bytes(b"whole")

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self._break()

    def _break(self) -> None:
        type(self).times -= 1
        if self.times >= 0:
            raise self.error


@pytest.fixture
def breaking(hasty: None) -> type[BreakingFileSystem]:
    fsspec.register_implementation("breaking", BreakingFileSystem, clobber=True)
    return BreakingFileSystem


def answered(status: int, code: str) -> OSError:
    """What s3fs makes of a store's answer."""
    response = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: OSError = s3fs.errors.translate_boto_error(botocore.exceptions.ClientError(response, "PutObject"))
    return error


LOST = [
    ConnectionResetError("reset by peer"),
    TimeoutError("no answer in 60 s"),
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    OSError(errno.EREMOTEIO, "We encountered an internal error"),
    OSError(errno.EBUSY, "Please reduce your request rate"),
    aiohttp.ClientPayloadError("the body\nbroke off"),
    botocore.exceptions.ConnectionClosedError(endpoint_url="http://store"),
    answered(500, "UnknownError"),  # of RadosGW
    answered(502, "502"),  # of a proxy before the store
    answered(504, "GatewayTimeout"),
    answered(503, "ServerTimeout"),
    answered(429, "TooManyRequests"),
    answered(409, "409"),
    answered(409, "ConditionalRequestConflict"),
]


@pytest.mark.parametrize("error", LOST)
def test_a_lost_connection_may_pass(error: OSError, breaking: type[BreakingFileSystem], tmp_path: Path) -> None:
    for touch in (
        lambda: storage.write_bytes("breaking://x/a", b"data"),
        lambda: storage.fetch("breaking://x/a", tmp_path / "a"),
    ):
        breaking.error, breaking.times = error, 2
        touch()
        assert breaking.times == -1
        breaking.times = 3
        with pytest.raises(TransientError) as caught:
            touch()
        assert breaking.times == 0
        said = " ".join(str(error.strerror if error.args[1:] else error).split())
        assert (
            one_line(caught) == f"breaking://x/a could not be reached: {said}; check that the store is up and run again"
        )
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_what_will_not_pass_is_not_tried_again(breaking: type[BreakingFileSystem]) -> None:
    refusals = (answered(501, "NotImplemented"), answered(409, "InvalidBucketState"), answered(400, "Strange"))
    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (PermissionError("no"), FileNotFoundError(), full, *refusals):
        breaking.error, breaking.times = error, 3
        with pytest.raises(KNNDiffusionError):
            storage.write_bytes("breaking://x/a", b"data")
        assert breaking.times == 2


def test_pauses_grow_and_a_long_failure_is_not_repeated(
    breaking: type[BreakingFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "RETRY_DELAYS_S", (0.05, 0.1, 0.2))
    breaking.error, breaking.times = ConnectionResetError("reset"), 3
    started = time.monotonic()
    storage.write_bytes("breaking://x/a", b"data")
    assert 0.35 <= time.monotonic() - started < 3
    monkeypatch.setattr(errors, "RETRY_DEADLINE_S", -1.0)
    breaking.times = 3
    with pytest.raises(TransientError):
        storage.write_bytes("breaking://x/a", b"data")
    assert breaking.times == 2


def test_a_fetch_that_breaks_off_leaves_what_was_there(breaking: type[BreakingFileSystem], tmp_path: Path) -> None:
    breaking.error = ConnectionResetError("reset by peer")
    (tmp_path / "old").write_bytes(b"before")
    for name in ("old", "fresh"):
        breaking.times = 3
        with pytest.raises(TransientError):
            storage.fetch("breaking://x/a", tmp_path / name)
    assert (tmp_path / "old").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
