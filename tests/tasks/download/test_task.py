"""Tests of the download stage, mainly of incremental downloads: only new URLs are requested, only new images kept."""

import datetime
import decimal
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.fakes import LoopbackServer, Reply, WithoutRay
from support.tiny_artifacts import image_shards, sha
from support.tiny_domain import COLOURS, SHAPES, drawn, encoded, write_urls

from infra import artifacts, storage
from infra.artifacts import read_manifest
from infra.download.downloader import DownloadPolicy
from infra.errors import InputError, StageError
from infra.formats import tables, webdataset
from tasks.download.config import DownloadConfig
from tasks.download.task import download
from tasks.references.domain_folder import DomainFolder
from tasks.references.takedown import Entries
from tasks.references.types import ImageShards
from tasks.references.url_history import Hashes, UrlHistory, hash_texts
from tasks.upkeep.takedown import commit_takedown

NAMES = [f"/{c}-{s}.png" for c in COLOURS for s in SHAPES]
BODY = {path: encoded(drawn(*path[1:-4].split("-"))) for path in NAMES}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackServer]:
    WithoutRay().install(monkeypatch)
    replies = {path: Reply(body=body) for path, body in BODY.items()}
    with LoopbackServer(replies | {"/copy.png": Reply(body=BODY[NAMES[0]]), "/gone.png": Reply(status=404)}) as up:
        yield up


class Lists:
    """Downloads lists of paths of a server into a folder."""

    def __init__(self, server: LoopbackServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.policy = DownloadPolicy(allow_hosts=(server.host,), threads=4, retries=0)

    def __call__(self, paths: list[str], **more: Any) -> Any:
        retry = more.pop("retry_failed", False)
        urls = write_urls(self.folder / "urls.jsonl", [self.server.url(path) for path in paths])
        config = DownloadConfig(shard_rows=4, policy=self.policy, workers=2, retry_failed=retry)
        self.server.requests.clear()
        return download(
            str(urls), DomainFolder(uri=str(self.folder / "base"), cache=self.folder / "cache"), config, **more
        )


@pytest.fixture
def lists(server: LoopbackServer, tmp_path: Path) -> Lists:
    return Lists(server, tmp_path)


def outcomes(images: ImageShards) -> dict[str, str]:
    """Path -> error class, over all shards."""
    found = {}
    for shard in images.manifest().shards:
        table = tables.read_table(storage.join(shard.folder or images.uri, shard.file(".parquet").name))
        found.update({row["url"].rsplit("/", 1)[-1]: row["error_class"] for row in table.to_pylist()})
    return found


def bodies_of(images: ImageShards, shard: artifacts.Shard) -> dict[str, bytes]:
    return dict(webdataset.iter_images(Path(shard.folder or images.uri) / shard.file(".tar").name))


def test_download_with_previous_requests_only_new_urls(lists: Lists) -> None:
    first = lists([*NAMES[:5], "/gone.png"]).reference
    second = lists([*NAMES[3:8], "/gone.png"], previous=first)
    assert sorted(lists.server.requests) == sorted(NAMES[5:8])
    manifest = second.reference.manifest()
    assert [(s.name, s.rows, s.folder) for s in manifest.shards] == [
        ("00000", 4, first.uri), ("00001", 1, first.uri), ("00002", 3, None)
    ]  # fmt: skip
    assert manifest.rows == 8
    assert manifest.info["outcomes"] == {"success": 8, "http_404": 1}
    assert manifest.info["added"] == {"requested": 3, "outcomes": {"success": 3}}
    assert first.uri not in [given["uri"] for given in manifest.inputs.values()]
    assert list(bodies_of(second.reference, manifest.shards[2])) == ["000020000", "000020001", "000020002"]


def test_download_without_new_urls_returns_previous(lists: Lists) -> None:
    first = lists(NAMES[:3]).reference
    again = lists([NAMES[2], NAMES[0]], previous=first)
    assert (again.skipped, again.reference, lists.server.requests) == (True, first, [])
    assert "lists no new URLs" in again.note


def test_download_of_known_bytes_drops_images_and_records_them(lists: Lists) -> None:
    lists.server.replies |= {f"/again-{n}.png": Reply(body=BODY[NAMES[9]]) for n in range(6)}
    first = lists(NAMES[:4]).reference
    # Copies within a shard, across shards, and of the previous version.
    second = lists(["/again-0.png", "/again-1.png", NAMES[5], "/copy.png", *(f"/again-{n}.png" for n in (2, 3))],
                   previous=first).reference  # fmt: skip
    found = outcomes(second)
    assert {name for name, outcome in found.items() if outcome == "duplicate_content"} == {
        "again-1.png", "again-2.png", "again-3.png", "copy.png"
    }  # fmt: skip
    assert [shard.rows for shard in second.manifest().shards] == [4, 2, 0]
    assert second.manifest().info["added"]["outcomes"] == {"success": 2, "duplicate_content": 4}
    shard = second.manifest().shards[1]
    assert [len(key) for key in bodies_of(second, shard)] == [9, 9]
    row = tables.read_table(Path(second.uri) / shard.file(".parquet").name).to_pylist()[3]
    assert (row["sha256"], row["status"], row["width"]) == (sha(BODY[NAMES[0]]), "dropped", None)
    assert lists(["/copy.png", "/again-3.png"], previous=second).skipped  # a copy is not requested again


def test_download_of_first_list_keeps_one_of_repeated_urls_and_images(lists: Lists) -> None:
    first = lists([NAMES[0], NAMES[1], NAMES[0], "/copy.png", NAMES[2]])
    assert sorted(lists.server.requests) == sorted([*NAMES[:3], "/copy.png"])
    info = first.reference.manifest().info
    assert (info["requested"], info["repeated"]) == (4, 1)
    assert info["outcomes"] == {"success": 3, "duplicate_content": 1}
    assert first.note.endswith("; 1 repeated URLs")
    assert outcomes(first.reference)["copy.png"] == "duplicate_content"
    assert lists([NAMES[0], NAMES[1], NAMES[0], "/copy.png", NAMES[2]]).skipped


def test_download_with_takedown_drops_its_urls_and_images(lists: Lists) -> None:
    first = lists(NAMES[:2]).reference
    entries = Entries(frozenset({lists.server.url(NAMES[4])}), frozenset({sha(BODY[NAMES[6]])}))
    taken = commit_takedown(entries, DomainFolder(uri=str(lists.folder / "base")), info={}).reference
    second = lists(NAMES[4:7], previous=first, takedown=taken).reference
    assert sorted(lists.server.requests) == sorted(NAMES[5:7])  # the URL itself is not even requested
    assert outcomes(second)[NAMES[6][1:]] == "taken_down"
    assert second.rows == 3
    assert lists(NAMES[4:7], previous=second, takedown=taken).reference == second


def test_download_compares_urls_in_their_normal_form(lists: Lists) -> None:
    def variant(path: str) -> str:
        return " " + lists.server.url(path).replace("http", "HTTP").replace(".png", "%2Epng#top")

    def run(urls: list[str], **more: Any) -> Any:
        listed = write_urls(lists.folder / "variants.jsonl", urls)
        config = DownloadConfig(shard_rows=4, policy=lists.policy)
        lists.server.requests.clear()
        return download(str(listed), DomainFolder(uri=str(lists.folder), cache=lists.folder), config, **more).reference

    first = run([variant(NAMES[0]), lists.server.url(NAMES[1])])
    assert sorted(outcomes(first)) == sorted(name[1:] for name in NAMES[:2])  # stored in normal form
    refused = Entries(frozenset({variant(NAMES[2])}))
    taken = commit_takedown(refused, DomainFolder(uri=str(lists.folder / "base")), info={}).reference
    urls = [lists.server.url(path) for path in (NAMES[0], NAMES[2], NAMES[3])]
    second = run([variant(NAMES[1]), *urls, variant(NAMES[3])], previous=first, takedown=taken)
    assert lists.server.requests == [NAMES[3]]
    assert second.rows == 3


def test_download_requests_failed_urls_only_with_retry_failed(lists: Lists) -> None:
    first = lists([NAMES[0], "/gone.png"]).reference
    lists.server.replies["/gone.png"] = Reply(body=BODY[NAMES[1]])
    assert lists([NAMES[0], "/gone.png"], previous=first).skipped
    second = lists([NAMES[0], "/gone.png"], previous=first, retry_failed=True)
    assert lists.server.requests == ["/gone.png"]
    assert second.reference.rows == 2
    assert lists([NAMES[0], "/gone.png"], previous=second.reference, retry_failed=True).skipped


@pytest.mark.parametrize("status", [404, 503])
def test_download_whose_retries_all_fail_returns_previous_and_retries_next_time(lists: Lists, status: int) -> None:
    first = lists([NAMES[0], "/gone.png"]).reference
    lists.server.replies["/gone.png"] = Reply(status=status)
    again = lists([NAMES[0], "/gone.png"], previous=first, retry_failed=True)
    assert (again.reference, again.note, lists.server.requests) == (
        first, f"still failing: http_{status} 1", ["/gone.png"]
    )  # fmt: skip
    lists.server.replies["/gone.png"] = Reply(body=BODY[NAMES[1]])
    assert lists([NAMES[0], "/gone.png"], previous=first, retry_failed=True).reference.rows == 2


def test_download_records_dead_url_but_raises_for_dead_network(lists: Lists, tmp_path: Path) -> None:
    first = lists(NAMES[:2]).reference
    second = lists(["/gone.png"], previous=first).reference
    assert (second.rows, second.manifest().shards[-1].rows) == (2, 0)
    with LoopbackServer({}) as silent:
        pass  # the port is closed afterwards
    urls = write_urls(tmp_path / "silent.jsonl", [silent.url("/x.png"), silent.url("/y.png")])
    policy = DownloadPolicy(allow_hosts=(silent.host,), threads=2, retries=0)
    with pytest.raises(StageError, match=r"none of the 2 URLs .* \(connection_error 2\).* fix the list or the network"):
        download(str(urls), DomainFolder(uri=str(tmp_path / "base")), DownloadConfig(policy=policy), previous=second)


def test_download_resumes_after_kill_between_shards_with_same_version(lists: Lists) -> None:
    first = lists(NAMES[:4]).reference
    whole = lists([*NAMES[4:9], "/copy.png"], previous=first).reference
    folder = Path(whole.uri)
    (folder / "manifest.json").unlink()
    (folder / "shards" / "00002.json").unlink()  # the shard in progress, with incomplete files
    (folder / "00002.tar").write_bytes(b"half")
    again = lists([*NAMES[4:9], "/copy.png"], previous=first).reference
    assert again == whole
    assert sorted(lists.server.requests) == ["/copy.png", NAMES[8]]


def test_url_history_of_version_without_files_reads_its_shards(tmp_path: Path) -> None:
    body = BODY[NAMES[0]]
    images = image_shards(tmp_path, [[("http://host/a.png", body), ("http://host/b.png", None)]])
    seen = UrlHistory.of(images, tmp_path)
    urls = ["http://host/a.png", "http://host/b.png", "http://host/c.png"]
    assert seen.requested(urls, failed_too=True).tolist() == [True, True, False]
    assert seen.requested(urls, failed_too=False).tolist() == [True, False, False]
    assert seen.requested(["HTTP://Host:80/a.png#x"], failed_too=False).all()
    assert seen.contains([sha(body), "0" * 64]).tolist() == [True, False]


def test_url_history_of_raw_urls_finds_them_as_they_were_listed() -> None:
    raw, nothing = "HTTP://Host/a.png#x", np.empty(0, np.uint64)
    seen = UrlHistory([Hashes(hash_texts([raw]), nothing, nothing)], [])  # as release 0.1 wrote it
    assert seen.requested([raw, "http://host/b.png"], failed_too=False).tolist() == [True, False]


def test_url_history_extended_many_times_has_few_files(tmp_path: Path) -> None:
    files: list[dict[str, Any]] = []
    nothing = np.empty(0, np.uint64)
    for night in range(100):
        parts = []
        for entry in files:
            with np.load(io.BytesIO(storage.read_bytes(storage.join(entry["folder"], "seen.npz")))) as stored:
                parts.append(Hashes(**stored))
        added = Hashes(np.sort(hash_texts(f"{night}-{n}" for n in range(3))), nothing, nothing)
        files = UrlHistory(parts, files).extend(str(tmp_path / str(night)), added)
    assert len(files) <= 9
    assert sum(entry["rows"] for entry in files) == 300


def test_download_keeps_columns_of_every_type(lists: Lists, tmp_path: Path) -> None:
    day = datetime.date(2024, 1, 2)
    further = {
        "taken": pa.array([day, None, day]),
        "seen": pa.array([datetime.datetime(2024, 1, 2, 3, 4, 5, 6, datetime.UTC)] * 3, pa.timestamp("us", "UTC")),
        "fine": pa.array([1, 2, 3], pa.timestamp("ns")),
        "at": pa.array([datetime.time(3, 4), None, None]),
        "lasts": pa.array([datetime.timedelta(seconds=3)] * 3),
        "raw": pa.array([b"\xff\x00", b"", None]),
        "price": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("2.20")]),
        "nested": pa.array([{"day": day, "tags": ["a"]}] * 3),
        "score": pa.array([0.5, float("nan"), 2.0]),
    }
    # The third image is a copy of the first and is dropped: its other columns become null but keep their type.
    paths = [NAMES[0], NAMES[1], "/copy.png"]
    listed = pa.table({"url": [lists.server.url(path) for path in paths], **further})
    first = lists(NAMES[2:3]).reference
    results = []
    for days in (further["taken"], pa.array([day, day, day])):
        table = listed.set_column(1, "taken", days)
        pq.write_table(table, tmp_path / "urls.parquet")
        config = DownloadConfig(policy=lists.policy)
        options: Any = {"previous": first}
        results += [
            download(str(tmp_path / "urls.parquet"), DomainFolder(uri=str(tmp_path), cache=tmp_path), config, **options)
            for _ in range(2)
        ]
    assert [result.skipped for result in results] == [False, True, False, True]
    assert results[0].reference.uri != results[2].reference.uri, "a list with another date must have another key"
    shard = results[0].reference.manifest().shards[-1]
    stored = tables.read_table(Path(results[0].reference.uri) / shard.file(".parquet").name)
    assert stored["error_class"].to_pylist() == ["success", "success", "duplicate_content"]
    for name, values in further.items():
        assert stored.schema.field(name).type == values.type
        assert stored[name].slice(0, 2).to_pylist()[0] == values[0].as_py()
        assert not stored[name][2].is_valid


def test_download_digests_list_as_earlier_releases_did(lists: Lists, tmp_path: Path) -> None:
    (tmp_path / "urls.csv").write_text(f"url,likes,score,name\n{lists.server.url(NAMES[0])},3,0.1,ä\n")
    made = download(str(tmp_path / "urls.csv"), DomainFolder(uri=str(tmp_path)), DownloadConfig(policy=lists.policy))
    columns = [["url", "likes", "score", "name"], [lists.server.url(NAMES[0])], [3], [0.1], ["ä"]]
    assert made.reference.manifest().inputs["urls"]["digest"] == artifacts.digest_of(columns)


def test_download_of_list_taken_down_entirely_raises_input_error(lists: Lists) -> None:
    entries = Entries(frozenset({lists.server.url(NAMES[0])}))
    taken = commit_takedown(entries, DomainFolder(uri=str(lists.folder / "base")), info={}).reference
    with pytest.raises(InputError, match=r"every URL of .* was taken down; add other URLs"):
        lists(NAMES[:1], takedown=taken)
    assert read_manifest(taken.uri).rows == 1
