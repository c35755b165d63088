import errno
import gc
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fakes import LoopbackServer, Reply

from infra.errors import InputError, NotFoundError, StageError
from infra.storage import eviction, pins
from infra.storage import file_cache as caching

SIZE = 100_000
COUNT = 12


class CachedFiles:
    """Files on a loopback server and a cache for them."""

    def __init__(self, server: LoopbackServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.data = [bytes([number]) * SIZE for number in range(COUNT)]
        for number, data in enumerate(self.data):
            server.replies[f"/{number}.npy"] = Reply(body=data)

    def file(self, number: int) -> tuple[str, str, int]:
        return self.server.url(f"/{number}.npy"), hashlib.sha256(self.data[number]).hexdigest(), SIZE

    def fetch(self, number: int) -> Path:
        return caching.fetch(*self.file(number), self.folder)

    def cached(self) -> list[int]:
        """Return the numbers of the cached files."""
        return [number for number in range(COUNT) if self.place(number).exists()]

    def place(self, number: int) -> Path:
        digest = self.file(number)[1]
        return self.folder / digest[:2] / f"{digest}.npy"

    def process(self, script: str, *arguments: Any) -> subprocess.Popen[str]:
        """Run a script in another process, with this cache as ``cache``."""
        head = (
            "import sys, time\nfrom pathlib import Path\nfrom infra.storage import file_cache as caching\n"
            "cache = Path(sys.argv[1])\n"
        )
        command = [sys.executable, "-c", head + script, str(self.folder), *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CachedFiles]:
    monkeypatch.setenv("KNN_DIFFUSION_CACHE_BYTES", str(4 * SIZE))
    with LoopbackServer({}) as server:
        yield CachedFiles(server, tmp_path / "cache")


def test_fetch_downloads_a_file_once(files: CachedFiles) -> None:
    for _ in range(3):
        assert files.fetch(0).read_bytes() == files.data[0]
    assert files.server.requests == ["/0.npy"]
    assert files.fetch(0) == files.place(0)


def test_fetch_evicts_the_least_recently_used_file(files: CachedFiles) -> None:
    for number in (0, 1, 2, 3):
        files.fetch(number)
    assert files.cached() == [0, 1, 2, 3]
    files.fetch(0)  # used again
    files.fetch(4)
    assert files.cached() == [0, 2, 3, 4]
    files.fetch(5)
    assert files.cached() == [0, 3, 4, 5]
    assert files.fetch(1).read_bytes() == files.data[1]
    assert files.cached() == [0, 1, 4, 5]
    stamped = [path.name[:64] for path in (files.folder / "verified").rglob("*") if path.is_file()]
    assert sorted(stamped) == sorted(files.file(number)[1] for number in files.cached())


def test_evict_keeps_files_of_referenced_paths(files: CachedFiles, caplog: pytest.LogCaptureFixture) -> None:
    pinned = [files.fetch(number) for number in range(6)]
    assert files.cached() == [0, 1, 2, 3, 4, 5]  # above the bound, with a warning
    assert f"{6 * SIZE} bytes are in use, the limit is {4 * SIZE}; increase KNN_DIFFUSION_CACHE_BYTES" in caplog.text
    again = files.fetch(2)
    del pinned[2]
    files.fetch(6)
    assert files.cached() == [0, 1, 2, 3, 4, 5, 6]  # 2 is still referenced
    files.fetch(7)
    assert files.cached() == [0, 1, 2, 3, 4, 5, 7]  # 6 is no longer referenced
    del pinned, again
    gc.collect()
    files.fetch(8)
    assert files.cached() == [2, 5, 7, 8]


def test_evict_mapped_or_open_file_stays_readable(files: CachedFiles) -> None:
    mapped = np.memmap(files.fetch(1), mode="r")
    with files.fetch(2).open("rb") as stream:
        for number in range(5, 10):
            files.fetch(number)
        assert files.cached() == [6, 7, 8, 9]
        assert bytes(mapped) == files.data[1]
        assert stream.read() == files.data[2]


def test_evict_keeps_files_of_another_process_until_it_dies(files: CachedFiles) -> None:
    other = files.process(
        "path = caching.fetch(sys.argv[2], sys.argv[3], int(sys.argv[4]), cache)\nprint('fetched', flush=True)\n"
        "time.sleep(600)\n",
        *files.file(0),
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "fetched\n", other.communicate()[1]
        for number in range(1, 7):
            files.fetch(number)
        assert files.cached() == [0, 4, 5, 6]
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    files.fetch(7)
    assert files.cached() == [4, 5, 6, 7]


READER = """
import hashlib, random
files = [line.split() for line in sys.stdin.read().splitlines()]
random.seed(int(sys.argv[2]))
for turn in range(60):
    url, digest, size = random.choice(files)
    path = caching.fetch(url, digest, int(size), cache)
    if random.random() < 0.3:
        time.sleep(0.005)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, path
print("done")
"""


def test_fetch_concurrent_processes_in_a_small_cache_read_correct_files(files: CachedFiles) -> None:
    listed = "".join("{} {} {}\n".format(*files.file(number)) for number in range(COUNT))
    script = READER.replace("sys.stdin.read()", repr(listed))
    readers = [files.process(script, seed) for seed in range(4)]
    for reader in readers:
        output, error = reader.communicate(timeout=120)
        assert output == "done\n", error[-2000:]
    assert len(files.cached()) <= 4 + len(readers) - 1  # a file in use by another reader is not evicted
    assert list((files.folder / "fetching").iterdir()) == []
    assert eviction.evict(files.folder, 4 * SIZE) <= 4 * SIZE


def test_fetch_concurrent_requests_download_once(files: CachedFiles) -> None:
    def slowly() -> Iterator[bytes]:
        time.sleep(0.5)
        yield files.data[3]

    files.server.replies["/3.npy"] = Reply(body=slowly)
    other = files.process(
        "print(caching.fetch(sys.argv[2], sys.argv[3], int(sys.argv[4]), cache).stat().st_size)", *files.file(3)
    )
    while not files.server.requests:
        time.sleep(0.005)
    with ThreadPoolExecutor(4) as pool:
        assert {path.read_bytes() for path in pool.map(files.fetch, [3] * 4)} == {files.data[3]}
    assert other.communicate(timeout=60)[0] == f"{SIZE}\n"
    assert files.server.requests == ["/3.npy"]


def test_fetch_deletes_partial_downloads_of_dead_processes(files: CachedFiles) -> None:
    hold = threading.Event()

    def half() -> Iterator[bytes]:
        yield files.data[3][:50_000]
        hold.wait(60)

    for number in (3, 4):
        files.server.replies[f"/{number}.npy"] = Reply(body=half)
    fetching = "caching.fetch(sys.argv[2], sys.argv[3], int(sys.argv[4]), cache)"
    others = [files.process(fetching, *files.file(number)) for number in (3, 4)]
    try:
        deadline = time.monotonic() + 60
        while len([path for path in files.folder.glob("fetching/*/.*") if path.stat().st_size]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        for other in others:
            other.send_signal(signal.SIGKILL)
            other.communicate()
        hold.set()
    assert files.cached() == []  # no partial file is visible
    files.server.replies["/3.npy"] = Reply(body=files.data[3])
    assert files.fetch(3).read_bytes() == files.data[3]  # the partial download of 3 is replaced
    assert list((files.folder / "fetching").iterdir()) == []  # the partial download of 4 was deleted by an eviction


def test_evict_keeps_downloads_in_progress(files: CachedFiles) -> None:
    resume = threading.Event()

    def slowly() -> Iterator[bytes]:
        yield files.data[3][:50_000]
        resume.wait(60)
        yield files.data[3][50_000:]

    files.server.replies["/3.npy"] = Reply(body=slowly)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(files.fetch, 3)
        while not list(files.folder.glob("fetching/*/.*")):
            time.sleep(0.01)
        eviction.evict(files.folder, 0)
        resume.set()
        assert found.result().read_bytes() == files.data[3]
    assert files.server.requests == ["/3.npy"]


@pytest.mark.parametrize("mtime_restored", [False, True])
def test_fetch_corrupt_cached_file_is_downloaded_again(files: CachedFiles, mtime_restored: bool) -> None:
    path = files.fetch(1)
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(70_000)
        stream.write(b"X")
    if mtime_restored:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.fetch(1).read_bytes() == files.data[1]
    assert files.server.requests == ["/1.npy"] * 2


def test_fetch_wrong_or_missing_remote_file_is_not_cached(files: CachedFiles) -> None:
    files.server.replies["/1.npy"] = Reply(body=files.data[2])
    with pytest.raises(caching.DigestMismatchError):
        files.fetch(1)
    del files.server.replies["/1.npy"]
    with pytest.raises(NotFoundError, match=r"/1\.npy does not exist"):
        files.fetch(1)
    assert files.cached() == []
    assert list((files.folder / "fetching").iterdir()) == []


def test_evict_derived_files_count_and_are_deleted_after_grace_period(files: CachedFiles) -> None:
    old, new = files.folder / "pixels/old.npy", files.folder / "encoded/new.npy"
    for path in (old, new):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(2 * SIZE))
    os.utime(old, (time.time() - 2 * eviction.DERIVED_GRACE_S,) * 2)
    files.fetch(0)
    assert (old.exists(), new.exists(), files.cached()) == (False, True, [0])
    for number in (1, 2):
        files.fetch(number)
    assert (new.exists(), files.cached()) == (True, [1, 2])


def test_fetch_registered_referenced_folder_is_not_evicted(files: CachedFiles) -> None:
    def whole(folder: Path) -> bool:
        return (folder / "weights").exists()

    def download(to: Path) -> None:
        to.mkdir()
        (to / "weights").write_bytes(bytes(2 * SIZE))

    digest = "ab" * 32
    pinned = caching.fetch_registered(digest, whole, download, files.folder)
    assert pinned == files.folder / "registered" / digest
    os.utime(pinned / "weights", (time.time() - 2 * eviction.DERIVED_GRACE_S,) * 2)
    for stray in (files.folder / ".stray", pinned.parent / ".stray"):
        stray.write_bytes(b"x")
        os.utime(stray, (time.time() - 2 * eviction.DERIVED_GRACE_S,) * 2)
    eviction.evict(files.folder, 0)
    assert whole(pinned)
    assert not (files.folder / ".stray").exists()
    with pytest.MonkeyPatch.context() as patch:  # a read-only cache
        patch.setattr(pins, "locked", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
        assert caching.fetch_registered(digest, whole, download, files.folder) == pinned
        with pytest.raises(InputError, match="is not writable"):
            caching.fetch_registered("cd" * 32, whole, download, files.folder)
    del pinned
    gc.collect()
    eviction.evict(files.folder, 0)
    assert not whole(files.folder / "registered" / digest)


def test_evict_keeps_a_file_renamed_after_the_inventory(files: CachedFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    partial, whole = files.folder / "pixels/.a.npy.partial", files.folder / "pixels/a.npy"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(SIZE))
    listed = eviction._inventory

    def outdated(cache: Path) -> Any:
        found = listed(cache)
        partial.rename(whole)  # the writer renames it after the inventory
        return found

    monkeypatch.setattr(eviction, "_inventory", outdated)
    assert eviction.evict(files.folder, 0) == 0
    assert whole.exists()


def test_evict_deletes_all_hard_links_of_a_file(files: CachedFiles) -> None:
    path = files.fetch(0)
    link = files.folder / "generators/abc/model.npy"
    link.parent.mkdir(parents=True)
    os.link(path, link)
    os.utime(path, (time.time() - 2 * eviction.DERIVED_GRACE_S,) * 2)
    del path
    for number in range(1, 5):
        files.fetch(number)
    assert files.cached() == [1, 2, 3, 4]
    assert not link.exists()


def test_pinned_path_pickles_as_a_plain_path(files: CachedFiles) -> None:
    path = files.fetch(0)
    again = pickle.loads(pickle.dumps(path))  # noqa: S301
    assert again == path
    assert type(again) is type(Path())
    assert type(path.parent / "x") is not type(Path())  # derived paths keep the subclass
    assert (path.parent / "x").name == "x"


def test_fetch_unusable_cache_folder_raises_input_error(files: CachedFiles) -> None:
    files.folder.write_bytes(b"a file")
    with pytest.raises(InputError) as caught:
        files.fetch(0)
    assert str(caught.value) == (
        f"the cache {files.folder} is not writable: Not a directory; set KNN_DIFFUSION_CACHE to a writable folder"
    )


def test_fetch_full_disk_raises_stage_error_and_leaves_no_files(files: CachedFiles) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StageError, match=r"^no space left for .*KNN_DIFFUSION_CACHE.* committed work is kept$"):
            files.fetch(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files.cached() == []
    assert list((files.folder / "fetching").iterdir()) == []
    assert files.fetch(0).read_bytes() == files.data[0]


def test_purge_deletes_files_unless_in_use(files: CachedFiles, caplog: pytest.LogCaptureFixture) -> None:
    pinned = files.fetch(0)
    for number in (1, 2):
        files.fetch(number)
    old, new = (files.folder / "pixels" / f"{name}.npy" for name in ("old", "new"))
    for path in (old, new):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"derived")
    weights = files.folder / "registered" / ("ab" * 32) / "weights"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"contains no images")
    os.utime(old, (0, 0))
    freed = eviction.purge({files.file(number)[1] for number in (0, 1)}, files.folder)
    assert (freed, files.cached(), old.exists(), new.exists()) == (SIZE + 7, [0, 2], False, True)
    assert "2 files could not be deleted: in use" in caplog.text
    os.utime(new, (0, 0))
    os.utime(weights, (0, 0))
    caplog.clear()
    fresh = files.folder / "pixels" / "fresh.npy"
    fresh.write_bytes(b"derived from kept images")
    os.utime(fresh, (0, 0))
    assert eviction.purge((), files.folder, derived=False) == 7
    assert fresh.exists(), "derived=False keeps derived files"
    fresh.unlink()
    assert ("1 files could not be deleted" in caplog.text, weights.exists()) == (True, True)
    assert files.fetch(1).read_bytes() == files.data[1]
    del pinned
    gc.collect()
    assert eviction.has_pending_purges(files.folder)
    assert eviction.purge((), files.folder, derived=False) == SIZE, "a pending purge needs no digest"
    assert files.cached() == [1, 2]
    assert not eviction.has_pending_purges(files.folder)
    assert eviction.purge({"0" * 64}, files.folder / "none") == 0
