"""Folders that are emptied after use: only ever below the root that they were made in."""

from pathlib import Path

import pytest
from support.hostile import is_untouched, victim

from infra.errors import InputError
from infra.storage import file_cache as caching
from infra.storage.locks import exclusive_folder, remove_stale


@pytest.mark.parametrize("name", ["../Documents", "fetching/../../Documents", "link", ".", ""])
def test_alone_outside_its_root_is_refused_and_deletes_nothing(name: str, tmp_path: Path) -> None:
    documents, cache = victim(tmp_path / "Documents"), tmp_path / "cache"
    (cache / "fetching").mkdir(parents=True)
    (cache / "link").symlink_to(documents)
    with (
        pytest.raises(InputError, match=r"is not below .*; remove the link"),
        exclusive_folder(cache / name, within=cache),
    ):
        pytest.fail("it was entered")
    assert is_untouched(documents)
    assert cache.exists()


def test_alone_is_refused_when_a_link_takes_its_place_meanwhile(tmp_path: Path) -> None:
    documents, folder = victim(tmp_path / "Documents"), tmp_path / "cache" / "mine"
    with pytest.raises(InputError, match="is not below"), exclusive_folder(folder, within=tmp_path / "cache"):
        folder.rename(tmp_path / "cache" / "moved")
        folder.symlink_to(documents)
    assert is_untouched(documents)


def test_alone_removes_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    documents, folder = victim(tmp_path / "Documents"), tmp_path / "cache" / "mine"
    with exclusive_folder(folder, within=tmp_path / "cache"):
        (folder / "link").symlink_to(documents)
    assert not folder.exists()
    assert is_untouched(documents)


def test_alone_below_a_root_that_is_a_link_is_as_anywhere(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    with exclusive_folder(tmp_path / "cache" / "mine", within=tmp_path / "cache") as folder:
        (folder / "file").write_text("x")
    assert list((tmp_path / "disk").iterdir()) == []


def test_drop_abandoned_leaves_links_that_lead_out(tmp_path: Path) -> None:
    documents, cache = victim(tmp_path / "Documents"), tmp_path / "cache"
    (cache / "dead").mkdir(parents=True)
    (cache / "link").symlink_to(documents)
    remove_stale(cache.glob("*"), within=cache)
    assert [path.name for path in cache.iterdir()] == ["link"]
    assert is_untouched(documents)


def test_eviction_and_forgetting_leave_what_a_link_in_the_cache_leads_to(tmp_path: Path) -> None:
    documents, cache = victim(tmp_path / "Documents"), tmp_path / "cache"
    cache.mkdir()
    (cache / "link").symlink_to(documents)
    assert caching.evict(cache, 0) == 0
    assert caching.purge(["thesis"], cache) == 0
    assert is_untouched(documents)


@pytest.mark.parametrize("digest", ["", "..", "../Documents", f"{'0' * 64}/../../../Documents", "A" * 64])
def test_cache_refuses_what_is_no_digest_and_deletes_nothing(digest: str, tmp_path: Path) -> None:
    documents, cache = victim(tmp_path / "Documents"), tmp_path / "cache"
    with pytest.raises(ValueError, match="64 lower-case hexadecimal digits"):
        caching.fetch("http://127.0.0.1:1/a", digest, 1, cache)
    with pytest.raises(ValueError, match="64 lower-case hexadecimal digits"):
        caching.fetch_registered(digest, lambda folder: False, lambda folder: folder.mkdir(), cache)
    assert is_untouched(documents)
