"""Locked folders are deleted after use, but never outside their root."""

import errno
import fcntl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout
from support.hostile import is_untouched, victim

from infra.errors import InputError
from infra.storage import eviction
from infra.storage import file_cache as caching
from infra.storage.locks import exclusive_folder, remove_stale


@pytest.mark.parametrize("name", ["../Documents", "fetching/../../Documents", "link", ".", ""])
def test_exclusive_folder_outside_its_root_raises_and_deletes_nothing(name: str, tmp_path: Path) -> None:
    documents, cache = victim(tmp_path / "Documents"), tmp_path / "cache"
    (cache / "fetching").mkdir(parents=True)
    (cache / "link").symlink_to(documents)
    with (
        pytest.raises(InputError, match=r"is not below .*; remove the link"),
        exclusive_folder(cache / name, within=cache),
    ):
        pytest.fail("the folder was locked")
    assert is_untouched(documents)
    assert cache.exists()


def test_exclusive_folder_replaced_by_a_link_raises(tmp_path: Path) -> None:
    documents, folder = victim(tmp_path / "Documents"), tmp_path / "cache" / "mine"
    with pytest.raises(InputError, match="is not below"), exclusive_folder(folder, within=tmp_path / "cache"):
        folder.rename(tmp_path / "cache" / "moved")
        folder.symlink_to(documents)
    assert is_untouched(documents)


def test_exclusive_folder_deletes_links_but_not_their_targets(tmp_path: Path) -> None:
    documents, folder = victim(tmp_path / "Documents"), tmp_path / "cache" / "mine"
    with exclusive_folder(folder, within=tmp_path / "cache"):
        (folder / "link").symlink_to(documents)
    assert not folder.exists()
    assert is_untouched(documents)


def test_exclusive_folder_below_a_linked_root_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    with exclusive_folder(tmp_path / "cache" / "mine", within=tmp_path / "cache") as folder:
        (folder / "file").write_text("x")
    assert list((tmp_path / "disk").iterdir()) == []


def test_exclusive_folder_held_by_another_thread_without_waiting_raises_timeout(tmp_path: Path) -> None:
    def lock_again() -> None:
        with exclusive_folder(tmp_path / "mine", within=tmp_path, wait=False):
            pytest.fail("the folder was locked twice")

    with exclusive_folder(tmp_path / "mine", within=tmp_path) as folder, ThreadPoolExecutor(1) as pool:
        (folder / "file").write_text("x")
        with pytest.raises(Timeout):
            pool.submit(lock_again).result()
        remove_stale([folder], within=tmp_path)
        assert (folder / "file").exists()


def test_exclusive_folder_without_flock_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with (
        pytest.raises(OSError, match="Function not implemented"),
        exclusive_folder(tmp_path / "mine", within=tmp_path),
    ):
        pytest.fail("the folder was locked")


def test_exclusive_folder_waiting_threads_take_turns(tmp_path: Path) -> None:
    def take_turn(number: int) -> None:
        with exclusive_folder(tmp_path / "mine", within=tmp_path) as folder:
            assert [path.name for path in folder.iterdir()] == ["lock"]
            (folder / str(number)).write_text("x")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take_turn, range(40)))
    assert list(tmp_path.iterdir()) == []


def test_remove_stale_keeps_links_out_of_the_root(tmp_path: Path) -> None:
    documents, cache = victim(tmp_path / "Documents"), tmp_path / "cache"
    (cache / "dead").mkdir(parents=True)
    (cache / "link").symlink_to(documents)
    remove_stale(cache.glob("*"), within=cache)
    assert [path.name for path in cache.iterdir()] == ["link"]
    assert is_untouched(documents)


def test_evict_and_purge_keep_targets_of_links(tmp_path: Path) -> None:
    documents, cache = victim(tmp_path / "Documents"), tmp_path / "cache"
    cache.mkdir()
    (cache / "link").symlink_to(documents)
    assert eviction.evict(cache, 0) == 0
    assert eviction.purge(["thesis"], cache) == 0
    assert is_untouched(documents)


@pytest.mark.parametrize("digest", ["", "..", "../Documents", f"{'0' * 64}/../../../Documents", "A" * 64])
def test_fetch_invalid_digest_raises_and_deletes_nothing(digest: str, tmp_path: Path) -> None:
    documents, cache = victim(tmp_path / "Documents"), tmp_path / "cache"
    with pytest.raises(ValueError, match="64 lower-case hexadecimal digits"):
        caching.fetch("http://127.0.0.1:1/a", digest, 1, cache)
    with pytest.raises(ValueError, match="64 lower-case hexadecimal digits"):
        caching.fetch_registered(digest, lambda folder: False, lambda folder: folder.mkdir(), cache)
    assert is_untouched(documents)
