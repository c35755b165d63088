import errno
import fcntl
import hashlib
import itertools
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import s3fs
from support.object_stores import Bucket, one_line

from infra import storage
from infra.errors import NotFoundError, StageError, TransientError

ABSENT = "{} does not exist; check the path or run the stage that writes it"


@pytest.fixture(params=["path", "file://", "moto", pytest.param("radosgw", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of a folder that does not exist yet, in each supported form."""
    if request.param in {"path", "file://"}:
        return f"{'' if request.param == 'path' else 'file://'}{tmp_path}/deep/folder"
    bucket: Bucket = request.getfixturevalue(f"{request.param}_bucket")
    return f"{bucket.uri}/deep/folder"


@contextmanager
def full_disk(after_bytes: int) -> Iterator[None]:
    """Fail writes that make a file larger than ``after_bytes``."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_write_bytes_content_is_read_back(folder: str) -> None:
    uri = f"{folder}/a.bin"
    storage.write_bytes(uri, b"first")
    assert storage.read_bytes(uri) == b"first"
    storage.write_bytes(uri, b"second, longer")
    assert storage.read_bytes(uri) == b"second, longer"
    assert storage.size(uri) == len(b"second, longer")
    assert storage.sha256(uri) == hashlib.sha256(b"second, longer").hexdigest()
    with storage.open_read(uri) as stream:
        stream.seek(8)
        assert stream.read(6) == b"longer"


def test_put_and_fetch_preserve_the_file(folder: str, tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000  # more than one block
    (tmp_path / "source").write_bytes(data)
    uri = f"{folder}/a.tar"
    storage.put(tmp_path / "source", uri)
    assert storage.sha256(uri) == hashlib.sha256(data).hexdigest()
    assert storage.fetch(uri, tmp_path / "new/here").read_bytes() == data
    (tmp_path / "source").write_bytes(b"other")
    storage.put(tmp_path / "source", uri)
    assert storage.read_bytes(uri) == b"other"


def test_put_stores_raw_bytes_and_fetch_writes_the_given_path(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"image")
    storage.put(tmp_path / "source", f"{bucket.uri}/d/a.png")
    storage.write_bytes(f"{bucket.uri}/d/b.json", b"{}")
    assert bucket.keys() == ["d/a.png", "d/b.json"]
    assert (bucket.read("d/a.png"), bucket.read("d/b.json")) == (b"image", b"{}")
    fetched = storage.fetch(f"{bucket.uri}/d/a.png", tmp_path / "cache/a.png")
    assert fetched == tmp_path / "cache/a.png"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a.png"]


def test_fetch_local_file_returns_it_without_a_copy(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"here")
    for uri in (str(tmp_path / "a"), f"file://{tmp_path}/a"):
        assert storage.fetch(uri, tmp_path / "copy") == tmp_path / "a"
    assert not (tmp_path / "copy").exists()


def test_walk_lists_every_object_with_size_and_time(folder: str) -> None:
    assert storage.walk(folder) == []
    for name in ("b/1.txt", "a.txt", "b/c/d/2.txt"):
        storage.write_bytes(storage.join(folder, name), name.encode())
    found = storage.walk(folder)
    assert [(file.uri, file.bytes) for file in found] == [
        (storage.join(folder, name), len(name)) for name in ("a.txt", "b/1.txt", "b/c/d/2.txt")
    ]
    assert all(abs(file.modified - storage.modified(file.uri)) < 1 for file in found)
    assert all(abs(file.modified - time.time()) < 60 for file in found)


def test_list_names_returns_sorted_base_names(folder: str) -> None:
    assert storage.list_names(folder) == []
    for name in ("b.tar", "a.tar", "sub/c.tar"):
        storage.write_bytes(f"{folder}/{name}", b"x")
    assert storage.list_names(folder) == ["a.tar", "b.tar", "sub"]
    assert storage.list_names(f"{folder}/sub") == ["c.tar"]
    storage.write_bytes(f"{folder}/d.tar", b"x")
    assert storage.list_names(folder) == ["a.tar", "b.tar", "d.tar", "sub"]


def test_exists_returns_true_for_files_and_folders(folder: str) -> None:
    assert not storage.exists(folder)
    storage.write_bytes(f"{folder}/a/b", b"")
    existing = [path for path in ("", "/a", "/a/b", "/a/c", "/b") if storage.exists(folder + path)]
    assert existing == ["", "/a", "/a/b"]
    assert storage.size(f"{folder}/a/b") == 0


def test_remove_deletes_only_the_file_or_folder(folder: str) -> None:
    for name in ("keep", "a/one", "a/b/two", "ab"):
        storage.write_bytes(f"{folder}/{name}", b"x")
    storage.remove(f"{folder}/a")
    assert storage.list_names(folder) == ["ab", "keep"]
    storage.remove(f"{folder}/ab")
    storage.remove(f"{folder}/ab")  # already deleted
    storage.remove(f"{folder}/never")
    assert storage.list_names(folder) == ["keep"]


def test_remove_without_permission_raises_not_found(moto_bucket: Bucket) -> None:
    for key in ("d/kept", "d/goes", "alone"):
        moto_bucket.write(key, b"x")
    moto_bucket.forbid_deletion("d/kept")
    for uri in (f"{moto_bucket.uri}/d", f"{moto_bucket.uri}/d/kept"):
        with pytest.raises(NotFoundError) as caught:
            storage.remove(uri)
        assert one_line(caught) == (
            f"access to {uri} is denied at {moto_bucket.store.endpoint}: it still exists after its deletion "
            "(locked, or no permission to delete); check the credentials and the bucket"
        )
    storage.remove(f"{moto_bucket.uri}/alone")
    storage.discard(f"{moto_bucket.uri}/d")
    assert moto_bucket.keys() == ["d/kept"]


def test_remove_concurrently_rewritten_object_succeeds(moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    moto_bucket.write("a", b"old")
    rm = s3fs.S3FileSystem.rm

    def overtaken(fs: Any, path: str, **options: Any) -> None:
        rm(fs, path, **options)
        moto_bucket.write("a", b"new")

    monkeypatch.setattr(s3fs.S3FileSystem, "rm", overtaken)
    storage.remove(f"{moto_bucket.uri}/a")
    assert moto_bucket.read("a") == b"new"


def test_read_missing_file_raises_not_found_with_uri(folder: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{folder}/other", b"x")
    uri = f"{folder}/none.json"
    for look in (storage.read_bytes, storage.size, storage.sha256):
        with pytest.raises(NotFoundError) as caught:
            look(uri)
        assert one_line(caught) == ABSENT.format(uri)


def test_fetch_missing_file_leaves_no_files(bucket: Bucket, tmp_path: Path) -> None:
    uri = f"{bucket.uri}/none.tar"
    with pytest.raises(NotFoundError) as caught:
        storage.fetch(uri, tmp_path / "cache/none.tar")
    assert one_line(caught) == ABSENT.format(uri)
    assert list((tmp_path / "cache").iterdir()) == []


def test_list_names_and_remove_handle_several_pages(folder: str) -> None:
    count = 1203
    names = [f"{number:05d}.json" for number in range(count)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: storage.write_bytes(f"{folder}/shards/{name}", b"{}"), names))
    assert storage.list_names(f"{folder}/shards") == names
    assert storage.list_names(folder) == ["shards"]
    storage.remove(f"{folder}/shards")  # a bulk delete takes at most a thousand keys
    assert storage.list_names(folder) == []


def test_put_large_file_uses_parts_and_open_read_uses_ranges(bucket: Bucket, tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(30_000_000)
    (tmp_path / "big").write_bytes(data)
    uri = f"{bucket.uri}/d/big.npy"
    storage.put(tmp_path / "big", uri)
    assert bucket.parts("d/big.npy") == 4
    assert bucket.uploads() == []
    assert storage.sha256(uri) == hashlib.sha256(data).hexdigest()
    assert storage.fetch(uri, tmp_path / "there").read_bytes() == data
    with storage.open_read(uri) as stream:
        for start in (29_999_990, 12_345_678, 0):
            stream.seek(start)
            assert stream.read(10) == data[start : start + 10]


def test_put_huge_file_stays_within_the_part_limit(
    moto_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", lambda *_, chunksize: sizes.append(chunksize))
    for size in (30_000_000, 100 << 30):
        with open(tmp_path / "sparse", "wb") as file:
            file.truncate(size)
        storage.put(tmp_path / "sparse", f"{moto_bucket.uri}/a")
    assert sizes[0] == storage.PART_BYTES
    assert 9_990 <= (100 << 30) / sizes[1] <= 10_000


def test_create_bytes_concurrent_writers_one_succeeds(folder: str) -> None:
    uri = f"{folder}/first.json"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: storage.create_bytes(uri, b"writer %d" % number), range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == b"writer %d" % won.index(True)
    assert not storage.create_bytes(uri, b"later")
    assert storage.create_bytes(uri, b"writer %d" % won.index(True))  # a retry after a lost response
    storage.remove(uri)
    assert storage.create_bytes(uri, b"later")
    assert storage.list_names(folder) == ["first.json"]


def test_modified_returns_the_stores_time(folder: str) -> None:
    before = time.time()
    storage.write_bytes(f"{folder}/a", b"1")
    assert before - 2 <= storage.modified(f"{folder}/a") <= time.time() + 2
    with pytest.raises(NotFoundError):
        storage.modified(f"{folder}/none")


@pytest.mark.parametrize("how", ["write_bytes", "put"])
def test_write_full_disk_keeps_the_existing_file(how: str, tmp_path: Path) -> None:
    new = b"n" * 4_000_000
    (tmp_path / "source").write_bytes(new)

    def write(name: str) -> None:
        uri = str(tmp_path / "out" / name)
        if how == "put":
            storage.put(tmp_path / "source", uri)
        else:
            storage.write_bytes(uri, new)

    storage.write_bytes(str(tmp_path / "out/old"), b"old")
    for name in ("old", "fresh"):
        with full_disk(after_bytes=1_500_000), pytest.raises(StageError) as caught:
            write(name)
        assert one_line(caught).startswith(
            f"no space left for {tmp_path}/out/{name}; free some space or choose another location"
        )
        assert one_line(caught).endswith("and run again: committed work is kept")
    assert (tmp_path / "out/old").read_bytes() == b"old"
    assert storage.list_names(str(tmp_path / "out")) == ["old"]
    for name in ("old", "fresh"):  # remains of the failed write do not interfere
        write(name)
        assert (tmp_path / "out" / name).read_bytes() == new
    assert storage.list_names(str(tmp_path / "out")) == ["fresh", "old"]


@pytest.mark.parametrize("how", ["write_bytes", "put"])
def test_write_concurrent_reader_never_sees_a_partial_file(how: str, tmp_path: Path) -> None:
    versions = [bytes([number]) * 3_000_000 for number in (1, 2)]
    sources = [tmp_path / "1", tmp_path / "2"]
    for source, version in zip(sources, versions, strict=True):
        source.write_bytes(version)
    uri = str(tmp_path / "shared")
    storage.write_bytes(uri, versions[0])
    stop = threading.Event()

    def write() -> None:
        for turn in itertools.cycle((1, 0)):
            if stop.is_set():
                return
            if how == "put":
                storage.put(sources[turn], uri)
            else:
                storage.write_bytes(uri, versions[turn])

    writer = threading.Thread(target=write)
    writer.start()
    deadline = time.monotonic() + 30
    seen, changes = versions[0], 0
    try:
        while changes < 20 and time.monotonic() < deadline:
            data = storage.read_bytes(uri)
            assert data in versions, f"a partial file of {len(data)} bytes"
            changes += data != seen
            seen = data
    finally:
        stop.set()
        writer.join()
    assert changes == 20


def test_join_keeps_the_scheme() -> None:
    assert storage.join("s3://bucket/a/", "b", "/c/") == "s3://bucket/a/b/c"
    assert storage.join("/data", "a.json") == "/data/a.json"
    assert storage.join("file:///data/", "a/b.json") == "file:///data/a/b.json"


def test_absolute_resolves_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("data") == str(tmp_path / "data")
    assert storage.absolute("~/data/") == "/home/someone/data"
    assert storage.absolute("file:///data/x") == "/data/x"
    assert storage.absolute("s3://bucket/x/") == "s3://bucket/x"


def test_is_local_returns_true_for_paths_and_file_uris() -> None:
    uris = ("a/b", "/a", "~/a", "file:///a", "s3://b/a", "memory://a", "https://host/a")
    assert [storage.is_local(uri) for uri in uris] == [True, True, True, True, False, False, False]
    assert storage.local_path("file:///a/b") == Path("/a/b")
    with pytest.raises(ValueError, match=r"^s3://b/a is remote; download it with storage.fetch first$"):
        storage.local_path("s3://b/a")


def test_scratch_is_deleted_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), storage.scratch() as folder:
        (folder / "a").mkdir()
        (folder / "a/b").write_bytes(b"x")
        raise ZeroDivisionError
    assert not folder.exists()


def test_scratch_works_without_locks_and_after_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with storage.scratch() as folder:
        shutil.rmtree(folder.parent)
    assert list(tmp_path.iterdir()) == []

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with storage.scratch() as folder, storage.scratch():
        (folder / "a").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


SCRATCH = """
import sys
from infra import storage
with storage.scratch() as folder:
    (folder / "shard").write_bytes(b"x")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_scratch_deletes_only_folders_of_killed_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    others = ("knn-diffusion-data/file", "knn-diffusion-cache/lock", "knn-diffusion-far/lock-of-another-machine")
    for name in others:
        storage.write_bytes(f"{tmp_path}/{name}", b"x")
    command, pipe = [sys.executable, "-c", SCRATCH], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        assert left.is_relative_to(tmp_path)
        with storage.scratch() as folder, storage.scratch():
            assert (left / "shard").exists(), "its process is alive"
            assert list(folder.iterdir()) == []
        process.kill()
    assert (left / "shard").exists()
    with storage.scratch() as folder:
        assert not left.parent.exists()
        assert folder.exists()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)
    assert len(list(tmp_path.iterdir())) == len(others)


def test_scratch_concurrent_folders_are_separate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def work(number: int) -> None:
        for _ in range(20):
            with storage.scratch() as folder:
                (folder / "mine").write_bytes(b"%d" % number)
                assert [path.read_bytes() for path in folder.iterdir()] == [b"%d" % number]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert list(tmp_path.iterdir()) == []


def test_scratch_full_disk_raises_stage_error() -> None:
    with pytest.raises(StageError) as caught, storage.scratch() as folder, full_disk(after_bytes=1_000_000):
        np.save(folder / "rows.npy", np.zeros(1_000_000))
    assert one_line(caught).startswith(f"no space left for {folder}; free some space")
    with pytest.raises(OSError, match="another reason"), storage.scratch():
        raise OSError("another reason")


def test_canonical_normalises_links_and_slashes(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert storage.canonical(f"{tmp_path}/link/../{tmp_path.name}/link/a/") == str(tmp_path / "a")
    for uri in ("s3://bucket//line//x/", "s3://bucket/line/x"):
        assert storage.absolute(uri) == storage.canonical(uri) == "s3://bucket/line/x"
    assert storage.absolute("http://host//a//") == "http://host//a"  # double slashes may be significant to the server


def test_exists_unknown_host_raises_transient_error_with_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    def connects_at_once(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(fsspec.core, "url_to_fs", connects_at_once)
    with pytest.raises(TransientError, match=r"^ftp://nowhere/x could not be reached: Name or service not known;"):
        storage.exists("ftp://nowhere/x")
