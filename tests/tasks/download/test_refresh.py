import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fakes import LoopbackServer, Reply, WithoutRay
from support.tiny_domain import COLOURS, SHAPES, drawn, encoded, write_urls

from infra import artifacts, storage
from infra.download.downloader import DownloadPolicy
from infra.formats import tables, webdataset
from tasks.download.config import DownloadConfig
from tasks.download.refresh import refresh
from tasks.download.task import download
from tasks.references.domain_folder import DomainFolder
from tasks.references.types import ImageShards
from tasks.upkeep.takedown import Entries, commit_takedown

NAMES = [f"/{c}-{s}.png" for c in COLOURS for s in SHAPES][:6]
BODY = {path: encoded(drawn(*path[1:-4].split("-"))) for path in NAMES}
NEW = encoded(drawn("blue", "ring").resize((40, 40)))


class Revalidating(LoopbackServer):
    """A server that answers a matching ``If-None-Match`` or ``If-Modified-Since`` with 304."""

    def answer(self, path: str, headers: Any) -> Reply:
        reply = super().answer(path, headers)
        sent = {"If-None-Match": "ETag", "If-Modified-Since": "Last-Modified"}
        if any(name in headers and headers[name] == reply.headers.get(field) for name, field in sent.items()):
            return Reply(status=304, headers=reply.headers)
        return reply


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Revalidating]:
    WithoutRay().install(monkeypatch)
    fields: list[dict[str, str]] = [{"ETag": '"1"'}, {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}, {}]
    replies = {path: Reply(body=BODY[path], headers=fields[number % 3]) for number, path in enumerate(NAMES)}
    with Revalidating(replies) as running:
        yield running


class Domain:
    def __init__(self, server: Revalidating, folder: Path) -> None:
        self.server = server
        self.folder = DomainFolder(uri=str(folder / "base"), cache=folder / "cache")
        policy = DownloadPolicy(allow_hosts=(server.host,), threads=2, retries=1)
        self.config = DownloadConfig(shard_rows=3, policy=policy, workers=1)
        urls = write_urls(folder / "urls.jsonl", [server.url(path) for path in NAMES])
        self.images = download(str(urls), self.folder, self.config).reference

    def refresh(self, images: ImageShards, **options: Any) -> Any:
        self.server.requests.clear()
        self.server.headers.clear()
        return refresh(images, self.folder, self.config, **options)


@pytest.fixture
def shards(server: Revalidating, tmp_path: Path) -> Domain:
    return Domain(server, tmp_path)


def rows_of(images: ImageShards) -> dict[str, dict[str, Any]]:
    """Return the rows by path."""
    listed = images.manifest().shards
    found = [tables.read_table(storage.join(one.folder or images.uri, one.file(".parquet").name)) for one in listed]
    return {"/" + row["url"].rsplit("/", 1)[-1]: row for table in found for row in table.to_pylist()}


def bodies_of(images: ImageShards, shard: artifacts.Shard) -> dict[str, bytes]:
    return dict(webdataset.iter_images(Path(shard.folder or images.uri) / shard.file(".tar").name))


def test_refresh_without_changes_returns_the_version_and_asks_once(shards: Domain) -> None:
    result = shards.refresh(shards.images)
    assert (result.reference, result.note) == (shards.images, "unchanged 6")
    assert sorted(shards.server.requests) == sorted(NAMES), "a 304 is not retried"
    conditional = [bool({"If-None-Match", "If-Modified-Since"} & set(headers)) for headers in shards.server.headers]
    assert sum(conditional) == 4


@pytest.mark.parametrize("number", [0, 1, 2], ids=["etag", "last-modified", "neither"])
def test_refresh_replaces_a_changed_image_under_its_key(shards: Domain, number: int) -> None:
    path = NAMES[number]
    shards.server.replies[path] = Reply(body=NEW, headers={"ETag": '"2"'})
    before = rows_of(shards.images)
    result = shards.refresh(shards.images)
    after = rows_of(result.reference)
    assert (result.note, result.reference.rows) == ("unchanged 5, changed 1", 6)
    assert after[path]["key"] == before[path]["key"]
    assert after[path]["sha256"] != before[path]["sha256"]
    assert (after[path]["width"], after[path]["etag"], after[path]["last_modified"]) == (40, '"2"', None)
    assert {name: after[name] for name in NAMES if name != path} == {
        name: before[name] for name in NAMES if name != path
    }
    first, second = result.reference.manifest().shards
    assert second == shards.images.manifest().shards[1].reused_from(shards.images.uri)
    old, new = bodies_of(shards.images, shards.images.manifest().shards[0]), bodies_of(result.reference, first)
    assert {key for key in old if old[key] != new[key]} == {before[path]["key"]}
    assert list(old) == list(new)
    again = shards.refresh(result.reference)
    assert again.reference == result.reference


def test_refresh_keeps_images_that_are_gone_or_taken_down(shards: Domain) -> None:
    shards.server.replies[NAMES[0]] = Reply(status=410)
    shards.server.replies[NAMES[1]] = Reply(body=NEW)
    entries = Entries(sha256=frozenset({hashlib.sha256(NEW).hexdigest()}))
    takedown = commit_takedown(entries, shards.folder, info={}).reference
    result = shards.refresh(shards.images, takedown=takedown)
    assert result.reference == shards.images
    assert sorted(result.note.split(", ")) == ["http_410 1", "taken_down 1", "unchanged 4"]
