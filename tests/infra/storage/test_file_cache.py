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
from infra.storage import file_cache as caching

SIZE = 100_000
COUNT = 12


class Shelf:
    """Files on a loopback server, and a cache for them."""

    def __init__(self, server: LoopbackServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.data = [bytes([number]) * SIZE for number in range(COUNT)]
        for number, data in enumerate(self.data):
            server.replies[f"/{number}.npy"] = Reply(body=data)

    def file(self, number: int) -> tuple[str, str, int]:
        return self.server.url(f"/{number}.npy"), hashlib.sha256(self.data[number]).hexdigest(), SIZE

    def fetch(self, number: int) -> Path:
        return caching.fetch(*self.file(number), self.folder)

    def there(self) -> list[int]:
        """Which files the cache holds."""
        return [number for number in range(COUNT) if self.place(number).exists()]

    def place(self, number: int) -> Path:
        digest = self.file(number)[1]
        return self.folder / digest[:2] / f"{digest}.npy"

    def process(self, script: str, *arguments: Any) -> subprocess.Popen[str]:
        """Another process, with this cache as ``cache``."""
        head = (
            "import sys, time\nfrom pathlib import Path\nfrom infra.storage import file_cache as caching\n"
            "cache = Path(sys.argv[1])\n"
        )
        command = [sys.executable, "-c", head + script, str(self.folder), *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    monkeypatch.setenv("KNN_DIFFUSION_CACHE_BYTES", str(4 * SIZE))
    with LoopbackServer({}) as server:
        yield Shelf(server, tmp_path / "cache")


def test_a_file_is_fetched_once(shelf: Shelf) -> None:
    for _ in range(3):
        assert shelf.fetch(0).read_bytes() == shelf.data[0]
    assert shelf.server.requests == ["/0.npy"]
    assert shelf.fetch(0) == shelf.place(0)


def test_what_was_used_least_recently_goes(shelf: Shelf) -> None:
    for number in (0, 1, 2, 3):
        shelf.fetch(number)
    assert shelf.there() == [0, 1, 2, 3]
    shelf.fetch(0)  # used again
    shelf.fetch(4)
    assert shelf.there() == [0, 2, 3, 4]
    shelf.fetch(5)
    assert shelf.there() == [0, 3, 4, 5]
    assert shelf.fetch(1).read_bytes() == shelf.data[1]
    assert shelf.there() == [0, 1, 4, 5]
    stamped = [path.name[:64] for path in (shelf.folder / "verified").rglob("*") if path.is_file()]
    assert sorted(stamped) == sorted(shelf.file(number)[1] for number in shelf.there())


def test_a_path_that_is_referenced_keeps_its_file(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    kept = [shelf.fetch(number) for number in range(6)]
    assert shelf.there() == [0, 1, 2, 3, 4, 5]  # above the bound, and told
    assert f"{6 * SIZE} bytes are in use, the bound is {4 * SIZE}; raise KNN_DIFFUSION_CACHE_BYTES" in caplog.text
    again = shelf.fetch(2)
    del kept[2]
    shelf.fetch(6)
    assert shelf.there() == [0, 1, 2, 3, 4, 5, 6]  # 2 is somebody's still
    shelf.fetch(7)
    assert shelf.there() == [0, 1, 2, 3, 4, 5, 7]  # and 6 is nobody's any more
    del kept, again
    gc.collect()
    shelf.fetch(8)
    assert shelf.there() == [2, 5, 7, 8]


def test_what_is_mapped_or_open_outlives_its_file(shelf: Shelf) -> None:
    mapped = np.memmap(shelf.fetch(1), mode="r")
    with shelf.fetch(2).open("rb") as stream:
        for number in range(5, 10):
            shelf.fetch(number)
        assert shelf.there() == [6, 7, 8, 9]
        assert bytes(mapped) == shelf.data[1]
        assert stream.read() == shelf.data[2]


def test_what_another_process_uses_stays_until_it_dies(shelf: Shelf) -> None:
    other = shelf.process(
        "path = caching.fetch(sys.argv[2], sys.argv[3], int(sys.argv[4]), cache)\nprint('has it', flush=True)\n"
        "time.sleep(600)\n",
        *shelf.file(0),
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n", other.communicate()[1]
        for number in range(1, 7):
            shelf.fetch(number)
        assert shelf.there() == [0, 4, 5, 6]
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    shelf.fetch(7)
    assert shelf.there() == [4, 5, 6, 7]


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


def test_processes_that_share_a_tight_cache_do_not_harm_each_other(shelf: Shelf) -> None:
    listed = "".join("{} {} {}\n".format(*shelf.file(number)) for number in range(COUNT))
    script = READER.replace("sys.stdin.read()", repr(listed))
    readers = [shelf.process(script, seed) for seed in range(4)]
    for reader in readers:
        output, error = reader.communicate(timeout=120)
        assert output == "done\n", error[-2000:]
    assert len(shelf.there()) <= 5  # the last one may have been in use
    assert list((shelf.folder / "fetching").iterdir()) == []
    assert caching.evict(shelf.folder, 4 * SIZE) <= 4 * SIZE


def test_of_several_that_want_a_file_one_fetches_it(shelf: Shelf) -> None:
    def slowly() -> Iterator[bytes]:
        time.sleep(0.5)
        yield shelf.data[3]

    shelf.server.replies["/3.npy"] = Reply(body=slowly)
    other = shelf.process(
        "print(caching.fetch(sys.argv[2], sys.argv[3], int(sys.argv[4]), cache).stat().st_size)", *shelf.file(3)
    )
    while not shelf.server.requests:
        time.sleep(0.005)
    with ThreadPoolExecutor(4) as pool:
        assert {path.read_bytes() for path in pool.map(shelf.fetch, [3] * 4)} == {shelf.data[3]}
    assert other.communicate(timeout=60)[0] == f"{SIZE}\n"
    assert shelf.server.requests == ["/3.npy"]


def test_what_a_dead_process_was_fetching_is_cleared_away(shelf: Shelf) -> None:
    hold = threading.Event()

    def half() -> Iterator[bytes]:
        yield shelf.data[3][:50_000]
        hold.wait(60)

    for number in (3, 4):
        shelf.server.replies[f"/{number}.npy"] = Reply(body=half)
    fetching = "caching.fetch(sys.argv[2], sys.argv[3], int(sys.argv[4]), cache)"
    others = [shelf.process(fetching, *shelf.file(number)) for number in (3, 4)]
    try:
        deadline = time.monotonic() + 60
        while len([path for path in shelf.folder.glob("fetching/*/.*") if path.stat().st_size]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        for other in others:
            other.send_signal(signal.SIGKILL)
            other.communicate()
        hold.set()
    assert shelf.there() == []  # nothing half is ever there
    shelf.server.replies["/3.npy"] = Reply(body=shelf.data[3])
    assert shelf.fetch(3).read_bytes() == shelf.data[3]  # who wants the same goes on in its place
    assert list((shelf.folder / "fetching").iterdir()) == []  # what was left of 4 went with an eviction


def test_what_somebody_is_fetching_is_not_cleared_away(shelf: Shelf) -> None:
    go_on = threading.Event()

    def slowly() -> Iterator[bytes]:
        yield shelf.data[3][:50_000]
        go_on.wait(60)
        yield shelf.data[3][50_000:]

    shelf.server.replies["/3.npy"] = Reply(body=slowly)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(shelf.fetch, 3)
        while not list(shelf.folder.glob("fetching/*/.*")):
            time.sleep(0.01)
        caching.evict(shelf.folder, 0)
        go_on.set()
        assert found.result().read_bytes() == shelf.data[3]
    assert shelf.server.requests == ["/3.npy"]


@pytest.mark.parametrize("time_set_back", [False, True])
def test_a_flipped_byte_in_the_cache_is_found_and_the_file_fetched_anew(shelf: Shelf, time_set_back: bool) -> None:
    path = shelf.fetch(1)
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(70_000)
        stream.write(b"X")
    if time_set_back:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shelf.fetch(1).read_bytes() == shelf.data[1]
    assert shelf.server.requests == ["/1.npy"] * 2


def test_other_bytes_and_no_bytes_are_not_kept(shelf: Shelf) -> None:
    shelf.server.replies["/1.npy"] = Reply(body=shelf.data[2])
    with pytest.raises(caching.DigestMismatchError):
        shelf.fetch(1)
    del shelf.server.replies["/1.npy"]
    with pytest.raises(NotFoundError, match=r"/1\.npy does not exist"):
        shelf.fetch(1)
    assert shelf.there() == []
    assert list((shelf.folder / "fetching").iterdir()) == []


def test_what_stages_keep_counts_and_goes_when_it_was_long_unused(shelf: Shelf) -> None:
    old, new = shelf.folder / "pixels/old.npy", shelf.folder / "encoded/new.npy"
    for path in (old, new):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(2 * SIZE))
    os.utime(old, (time.time() - 2 * caching.DERIVED_GRACE_S,) * 2)
    shelf.fetch(0)
    assert (old.exists(), new.exists(), shelf.there()) == (False, True, [0])
    for number in (1, 2):
        shelf.fetch(number)
    assert (new.exists(), shelf.there()) == (True, [1, 2])


def test_a_folder_that_is_referenced_keeps_its_files(shelf: Shelf) -> None:
    def whole(folder: Path) -> bool:
        return (folder / "weights").exists()

    def download(to: Path) -> None:
        to.mkdir()
        (to / "weights").write_bytes(bytes(2 * SIZE))

    digest = "ab" * 32
    held = caching.fetch_registered(digest, whole, download, shelf.folder)
    assert held == shelf.folder / "registered" / digest
    os.utime(held / "weights", (time.time() - 2 * caching.DERIVED_GRACE_S,) * 2)
    for stray in (shelf.folder / ".stray", held.parent / ".stray"):
        stray.write_bytes(b"x")
        os.utime(stray, (time.time() - 2 * caching.DERIVED_GRACE_S,) * 2)
    caching.evict(shelf.folder, 0)
    assert whole(held)
    assert not (shelf.folder / ".stray").exists()
    with pytest.MonkeyPatch.context() as patch:  # a cache that may only be read
        patch.setattr(caching, "_locked", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
        assert caching.fetch_registered(digest, whole, download, shelf.folder) == held
        with pytest.raises(InputError, match="is not writable"):
            caching.fetch_registered("cd" * 32, whole, download, shelf.folder)
    del held
    gc.collect()
    caching.evict(shelf.folder, 0)
    assert not whole(shelf.folder / "registered" / digest)


def test_what_is_renamed_while_an_eviction_looks_does_no_harm(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    partial, whole = shelf.folder / "pixels/.a.npy.partial", shelf.folder / "pixels/a.npy"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(SIZE))
    listed = caching._inventory

    def outdated(cache: Path) -> Any:
        found = listed(cache)
        partial.rename(whole)  # as its writer does, just then
        return found

    monkeypatch.setattr(caching, "_inventory", outdated)
    assert caching.evict(shelf.folder, 0) == 0
    assert whole.exists()


def test_a_second_name_of_a_file_goes_with_it(shelf: Shelf) -> None:
    path = shelf.fetch(0)
    link = shelf.folder / "generators/abc/model.npy"
    link.parent.mkdir(parents=True)
    os.link(path, link)
    os.utime(path, (time.time() - 2 * caching.DERIVED_GRACE_S,) * 2)
    del path
    for number in range(1, 5):
        shelf.fetch(number)
    assert shelf.there() == [1, 2, 3, 4]
    assert not link.exists()


def test_a_path_travels_as_a_plain_one(shelf: Shelf) -> None:
    path = shelf.fetch(0)
    again = pickle.loads(pickle.dumps(path))  # noqa: S301
    assert again == path
    assert type(again) is type(Path())
    assert type(path.parent / "x") is not type(Path())  # and is no less a path
    assert (path.parent / "x").name == "x"


def test_a_folder_that_cannot_be_a_cache_is_told(shelf: Shelf) -> None:
    shelf.folder.write_bytes(b"a file")
    with pytest.raises(InputError) as caught:
        shelf.fetch(0)
    assert str(caught.value) == (
        f"the cache {shelf.folder} is not writable: Not a directory; set KNN_DIFFUSION_CACHE to a writable folder"
    )


def test_a_full_disk_is_told_and_leaves_nothing(shelf: Shelf) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StageError, match=r"^no space left for .*KNN_DIFFUSION_CACHE.* committed work is kept$"):
            shelf.fetch(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert shelf.there() == []
    assert list((shelf.folder / "fetching").iterdir()) == []
    assert shelf.fetch(0).read_bytes() == shelf.data[0]


def test_what_is_forgotten_goes_unless_it_is_in_use(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    held = shelf.fetch(0)
    for number in (1, 2):
        shelf.fetch(number)
    old, new = (shelf.folder / "pixels" / f"{name}.npy" for name in ("old", "new"))
    for path in (old, new):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"derived")
    weights = shelf.folder / "registered" / ("ab" * 32) / "weights"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"holds no pictures")
    os.utime(old, (0, 0))
    freed = caching.purge({shelf.file(number)[1] for number in (0, 1)}, shelf.folder)
    assert (freed, shelf.there(), old.exists(), new.exists()) == (SIZE + 7, [0, 2], False, True)
    assert "2 files could not be deleted: they are in use" in caplog.text
    os.utime(new, (0, 0))
    os.utime(weights, (0, 0))
    caplog.clear()
    fresh = shelf.folder / "pixels" / "fresh.npy"
    fresh.write_bytes(b"of pictures that stay")
    os.utime(fresh, (0, 0))
    assert caching.purge((), shelf.folder, derived=False) == 7
    assert fresh.exists(), "nobody asked for it to go"
    fresh.unlink()
    assert ("1 files could not be deleted" in caplog.text, weights.exists()) == (True, True)
    assert shelf.fetch(1).read_bytes() == shelf.data[1]
    del held
    gc.collect()
    assert caching.has_pending_purges(shelf.folder)
    assert caching.purge((), shelf.folder, derived=False) == SIZE, "though nobody names it any more"
    assert shelf.there() == [1, 2]
    assert not caching.has_pending_purges(shelf.folder)
    assert caching.purge({"0" * 64}, shelf.folder / "none") == 0
