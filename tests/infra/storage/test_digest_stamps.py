import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra import storage
from infra.errors import NotFoundError
from infra.storage import digest_stamps
from infra.storage.digest_stamps import is_verified
from infra.storage.errors import storage_errors


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def file_of(path: Path, data: bytes) -> tuple[Path, str, int]:
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest(), len(data)


def stamps(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def test_is_verified_accepts_only_matching_bytes(tmp_path: Path, cache: Path) -> None:
    path, digest, size = file_of(tmp_path / "a", b"right")
    assert is_verified(path, digest, size, cache)
    assert is_verified(path, digest, size, cache)
    other = hashlib.sha256(b"wrong").hexdigest()
    assert not is_verified(path, other, size, cache)
    assert not is_verified(path, digest, size + 1, cache)
    assert not is_verified(tmp_path / "none", digest, size, cache)
    assert [stamp.name[:64] for stamp in stamps(cache)] == [digest]


def test_is_verified_second_call_cost_is_independent_of_size(tmp_path: Path, cache: Path) -> None:
    small = file_of(tmp_path / "small", os.urandom(1_000))
    large = file_of(tmp_path / "large", os.urandom(1_000_000) * 256)
    first = [seconds(lambda file=file: is_verified(*file, cache)) for file in (small, large)]
    again = [min(seconds(lambda file=file: is_verified(*file, cache)) for _ in range(20)) for file in (small, large)]
    assert first[1] > 0.05  # the file was hashed
    assert again[1] < first[1] / 50
    assert again[1] < again[0] * 10 + 0.001


def test_is_verified_reads_an_existing_stamp_once_per_process(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of(tmp_path / "a", b"right bytes")
    read, read_stamp = [], digest_stamps._read_stamp
    monkeypatch.setattr(digest_stamps, "_read_stamp", lambda stamp: read.append(stamp) or read_stamp(stamp))
    assert [is_verified(*file, cache) for _ in range(4)] == [True] * 4
    (stamp,) = stamps(cache)
    assert read == [stamp, stamp], "once before the stamp existed and once after"
    os.utime(stamp, (0, 0))
    assert is_verified(*file, cache)
    assert time.time() - stamp.stat().st_mtime < 60, "the stamp records the last use"
    stamp.unlink()
    hashed, sha256 = [], storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda uri: hashed.append(uri) or sha256(uri))
    assert is_verified(*file, cache)
    assert hashed == [str(file[0])], "the file is hashed again after its stamp was deleted"


def flip(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(3)
        stream.write(b"X")


def flip_and_restore_mtime(path: Path) -> None:
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"othXr bytes")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [flip, flip_and_restore_mtime, replace, lambda path: path.write_bytes(b"short")])
def test_is_verified_detects_a_change_after_verification(
    change: Callable[[Path], object], tmp_path: Path, cache: Path
) -> None:
    path, digest, size = file_of(tmp_path / "a", b"right bytes")
    assert is_verified(path, digest, size, cache)
    change(path)
    assert not is_verified(path, digest, size, cache)
    assert not is_verified(path, digest, size, cache)
    path.write_bytes(b"right bytes")
    assert is_verified(path, digest, size, cache)


def test_is_verified_detects_a_change_right_after_verification(tmp_path: Path, cache: Path) -> None:
    for number in range(20):  # some changes fall within the resolution of the file system's clock
        path, digest, size = file_of(tmp_path / str(number), b"right bytes")
        assert is_verified(path, digest, size, cache)
        flip(path)
        assert not is_verified(path, digest, size, cache)


@pytest.mark.parametrize("hashed", [False, True])
def test_is_verified_file_removed_during_check_returns_false(
    hashed: bool, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digest, size = file_of(tmp_path / "a", b"right bytes")

    def removed(uri: str) -> str:
        if hashed:
            assert storage_sha256(uri) == digest
        path.unlink()
        return digest if hashed else storage_sha256(uri)

    storage_sha256 = storage.sha256
    monkeypatch.setattr(storage, "sha256", removed)
    assert not is_verified(path, digest, size, cache)
    assert stamps(cache) == []


def test_is_verified_unreadable_file_raises_not_found(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digest, size = file_of(tmp_path / "a", b"right bytes")

    def refused(uri: str) -> str:
        with storage_errors(uri):
            raise PermissionError("no")  # simulated, because root can read every file

    monkeypatch.setattr(storage, "sha256", refused)
    with pytest.raises(NotFoundError, match="is denied"):
        is_verified(path, digest, size, cache)


def test_is_verified_stamp_applies_to_one_path_only(tmp_path: Path, cache: Path) -> None:
    path, digest, size = file_of(tmp_path / "a", b"right bytes")
    assert is_verified(path, digest, size, cache)
    (tmp_path / "b").write_bytes(b"wrong bytes")
    assert not is_verified(tmp_path / "b", digest, size, cache)
    file_of(tmp_path / "b", b"right bytes")
    assert is_verified(tmp_path / "b", digest, size, cache)
    assert len(stamps(cache)) == 2


@pytest.mark.parametrize("data", [b"", b"{", b"[1, 2]", b"\xff", b"null"])
def test_is_verified_ignores_a_corrupt_stamp(data: bytes, tmp_path: Path, cache: Path) -> None:
    path, digest, size = file_of(tmp_path / "a", b"right bytes")
    assert is_verified(path, digest, size, cache)
    digest_stamps.stamp_file(cache, digest, path).write_bytes(data)
    flip(path)
    assert not is_verified(path, digest, size, cache)


def test_is_verified_hashes_every_time_without_a_stamp_folder(tmp_path: Path, cache: Path) -> None:
    cache.write_bytes(b"a file in place of the folder")
    path, digest, size = file_of(tmp_path / "a", b"right bytes")
    assert is_verified(path, digest, size, cache)
    flip(path)
    assert not is_verified(path, digest, size, cache)
