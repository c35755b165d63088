"""Errors of unavailable, failing and refusing stores: retried if transient, then reported on one line."""

import errno
import socket
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions
import fsspec
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem
from support.fakes import FakeClock
from support.object_stores import Bucket, RadosGateway, one_line

from infra import storage
from infra.errors import KNNDiffusionError, NotFoundError, TransientError
from infra.storage import errors


@pytest.fixture
def without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without delay."""
    monkeypatch.setattr(errors, "RETRY_DELAYS_S", (0.0, 0.0))


def test_storage_missing_bucket_raises_one_line_not_found(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    uri = "s3://no-such-bucket/d/a"
    for access in (
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
            access()
        message = one_line(caught)
        assert message.startswith("s3://no-such-bucket/d")
        assert message.endswith(
            f": bucket no-such-bucket does not exist at {bucket.store.endpoint}; create it or choose another root"
        )


def test_storage_denied_access_raises_one_line_not_found(bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("d/a", b"x")
    (tmp_path / "a").write_bytes(b"y")
    uri = f"{bucket.uri}/d/a"
    with bucket.store.locked():
        for access in (
            lambda: storage.read_bytes(uri),
            lambda: storage.write_bytes(uri, b"y"),
            lambda: storage.create_bytes(uri, b"y"),
            lambda: storage.put(tmp_path / "a", uri),
            lambda: storage.exists(uri),
            lambda: storage.list_names(uri),
            lambda: storage.remove(uri),
        ):
            with pytest.raises(NotFoundError) as caught:
                access()
            message = one_line(caught)
            assert message.startswith(f"access to {uri} is denied at {bucket.store.endpoint}: ")
            assert message.endswith("; check the credentials and the bucket")
    assert bucket.read("d/a") == b"x"


def test_storage_wrong_or_missing_keys_raise_not_found(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket.write("d/a", b"x")
    uri = f"{bucket.uri}/d/a"
    if isinstance(bucket.store, RadosGateway):  # moto accepts any credentials
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


def test_storage_unreachable_store_raises_one_line_transient_error(
    moto_bucket: Bucket, without_delay: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    for access in (storage.exists, storage.read_bytes, storage.list_names):
        with pytest.raises(TransientError) as caught:
            access("s3://bucket/a")
        message = one_line(caught)
        assert message.startswith(f"s3://bucket/a could not be reached at {endpoint}: Could not connect")
        assert message.endswith("; check that the store is up and run again")


class BreakingFileSystem(MemoryFileSystem):
    """``breaking://``: the first ``times`` reads and writes fail half-way with ``error``."""

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
def breaking(without_delay: None) -> type[BreakingFileSystem]:
    fsspec.register_implementation("breaking", BreakingFileSystem, clobber=True)
    return BreakingFileSystem


def s3_error(status: int, code: str) -> OSError:
    """Return the exception that s3fs raises for this response of a store."""
    response = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: OSError = s3fs.errors.translate_boto_error(botocore.exceptions.ClientError(response, "PutObject"))
    return error


TRANSIENT = [
    ConnectionResetError("reset by peer"),
    TimeoutError("no answer in 60 s"),
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    OSError(errno.EREMOTEIO, "We encountered an internal error"),
    OSError(errno.EBUSY, "Please reduce your request rate"),
    aiohttp.ClientPayloadError("the body\nwas truncated"),
    botocore.exceptions.ConnectionClosedError(endpoint_url="http://store"),
    s3_error(500, "UnknownError"),  # from RadosGW
    s3_error(502, "502"),  # from a proxy in front of the store
    s3_error(504, "GatewayTimeout"),
    s3_error(503, "ServerTimeout"),
    s3_error(429, "TooManyRequests"),
    s3_error(409, "409"),
    s3_error(409, "ConditionalRequestConflict"),
]


@pytest.mark.parametrize("error", TRANSIENT)
def test_with_retries_transient_error_is_retried_then_raised(
    error: OSError, breaking: type[BreakingFileSystem], tmp_path: Path
) -> None:
    for access in (
        lambda: storage.write_bytes("breaking://x/a", b"data"),
        lambda: storage.fetch("breaking://x/a", tmp_path / "a"),
    ):
        breaking.error, breaking.times = error, 2
        access()
        assert breaking.times == -1
        breaking.times = 3
        with pytest.raises(TransientError) as caught:
            access()
        assert breaking.times == 0
        said = " ".join(str(error.strerror if error.args[1:] else error).split())
        assert (
            one_line(caught) == f"breaking://x/a could not be reached: {said}; check that the store is up and run again"
        )
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_with_retries_permanent_error_is_not_retried(breaking: type[BreakingFileSystem]) -> None:
    refusals = (s3_error(501, "NotImplemented"), s3_error(409, "InvalidBucketState"), s3_error(400, "Strange"))
    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (PermissionError("no"), FileNotFoundError(), full, *refusals):
        breaking.error, breaking.times = error, 3
        with pytest.raises(KNNDiffusionError):
            storage.write_bytes("breaking://x/a", b"data")
        assert breaking.times == 2


def test_with_retries_backs_off_and_stops_at_deadline() -> None:
    clock, lasting_s, left = FakeClock(), 0.0, 4

    def breaking() -> str:
        nonlocal left
        clock.now += lasting_s
        if left:
            left -= 1
            raise ConnectionResetError("reset")
        return "data"

    def retried() -> str:
        return errors.with_retries("s3://bucket/a", breaking, clock=clock, sleep=clock.sleep)

    assert retried() == "data"
    assert [round(pause / least, 6) for pause, least in zip(clock.pauses, errors.RETRY_DELAYS_S, strict=True)] == [
        pytest.approx(1.25, abs=0.25)
    ] * 4
    lasting_s, left = errors.RETRY_DEADLINE_S + 1, 4
    with pytest.raises(TransientError):
        retried()
    assert left == 3


def test_fetch_interrupted_keeps_the_existing_file(breaking: type[BreakingFileSystem], tmp_path: Path) -> None:
    breaking.error = ConnectionResetError("reset by peer")
    (tmp_path / "old").write_bytes(b"before")
    for name in ("old", "fresh"):
        breaking.times = 3
        with pytest.raises(TransientError):
            storage.fetch("breaking://x/a", tmp_path / name)
    assert (tmp_path / "old").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
