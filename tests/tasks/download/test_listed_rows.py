"""Rows of a list: reserved columns, results of a download as a list, repeated URLs, digests."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from support.tiny_domain import write_urls

from infra.errors import InputError, NotFoundError
from infra.manifest import digest_of
from tasks.download import listed_rows
from tasks.download.config import DownloadConfig, ListOptions
from tasks.download.listed_rows import RowSlice, list_digest, read_rows, select_rows
from tasks.references.takedown import Entries
from tasks.references.url_history import Hashes, UrlHistory, hash_texts

URLS = [f"http://host/{n}.png" for n in range(4)]


def parquet(path: Path, **columns: list[object]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_read_rows_prefixes_columns_that_the_download_uses(tmp_path: Path) -> None:
    listed = parquet(
        tmp_path / "a.parquet", url=URLS[:1], key=[7], status=["new"], width=[5], user_key=["mine"], id=[1]
    )
    table = read_rows(listed, ListOptions())
    assert table.to_pylist() == [
        {"url": URLS[0], "user_user_key": "7", "user_status": "new", "user_width": 5, "user_key": "mine", "id": 1}
    ]


def test_read_rows_of_a_downloaded_shard_returns_its_list(tmp_path: Path) -> None:
    results = {
        "url": URLS, "id": [0, 1, 2, 3], "key": ["0", "1", "2", "3"], "sha256": ["a", None, "c", None],
        "status": ["success", "failed_to_download", "dropped", "failed_to_resize"],
        "error_message": [None, "x", "y", "z"], "width": [1, None, 2, None],
    }  # fmt: skip
    shard = parquet(tmp_path / "00000.parquet", **results)  # type: ignore[arg-type]
    (tmp_path / "00000_stats.json").write_text('{"count": 4}')
    assert read_rows(str(tmp_path), ListOptions()).to_pydict() == {"url": URLS, "id": [0, 1, 2, 3]}
    assert read_rows(shard, ListOptions(only_failed=True)).to_pydict() == {"url": URLS[1::2], "id": [1, 3]}
    plain = write_urls(tmp_path / "plain.jsonl", URLS)
    with pytest.raises(InputError, match=r"plain\.jsonl has no outcomes; give --only-failed with the parquet files"):
        read_rows(str(plain), ListOptions(only_failed=True))
    good = parquet(tmp_path / "good.parquet", **{name: values[:1] for name, values in results.items()})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"no URL of .*good\.parquet failed"):
        read_rows(good, ListOptions(only_failed=True))


def test_select_rows_marks_repeated_urls_in_a_first_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed_rows, "_BATCH_ROWS", 2)
    table = pa.table({"url": [URLS[0], URLS[1], "HTTP://HOST/0.png#x", URLS[2], None, URLS[1], URLS[3]]})
    refused = Entries(frozenset({" HTTP://host:80/2.png"}))
    first = select_rows(table, None, refused, DownloadConfig())
    assert first.rows.tolist() == [0, 1, 2, 4, 5, 6]
    assert first.repeated.tolist() == [False, False, True, False, True, False]
    nothing = np.empty(0, np.uint64)
    seen = UrlHistory([Hashes(np.sort(hash_texts(URLS[:1])), np.sort(hash_texts(URLS[3:])), nothing)], [])
    later = select_rows(table, seen, refused, DownloadConfig())
    assert later.rows.tolist() == [1, 4, 5]
    assert select_rows(table, seen, refused, DownloadConfig(retry_failed=True)).rows.tolist() == [1, 4, 5, 6]


def test_row_slice_pickles_only_its_rows() -> None:
    table = pa.table({"url": [f"{n:0100d}" for n in range(100_000)]})
    data = pickle.dumps(RowSlice(table, np.array([3, 5, 99_999])))
    assert len(data) < 2_000
    assert pickle.loads(data).read()["url"].to_pylist() == [f"{n:0100d}" for n in (3, 5, 99_999)]  # noqa: S301


def test_list_digest_is_that_of_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed_rows, "_BATCH_ROWS", 2)
    table = pa.table({"url": URLS, "score": [0.5, None, float("nan"), 1.0], "tags": [{"b": 1, "a": "ä"}] * 4})
    rows = np.array([0, 1, 3])
    expected = [table.column_names, *(table[name].take(pa.array(rows)).to_pylist() for name in table.column_names)]
    assert list_digest(table, rows) == digest_of(expected)
    assert list_digest(table.slice(0, 0), rows[:0]) == digest_of([table.column_names, [], [], []])


def test_source_fields_accepts_one_list_or_folder(tmp_path: Path) -> None:
    from flows.cli.sources import source_fields

    listed = str(write_urls(tmp_path / "a.jsonl", URLS))
    assert source_fields([listed], None, None, False)["urls"] == listed
    assert source_fields([listed, listed], None, None, False)["urls"] == (listed, listed)
    assert source_fields(None, str(tmp_path), None, False) == {"urls": None, "folder": str(tmp_path)}
    assert source_fields(None, None, None, False, optional=True) == {}
    with pytest.raises(typer.BadParameter, match="--urls and --folder are both given"):
        source_fields([listed], str(tmp_path), None, False)
    with pytest.raises(typer.BadParameter, match="--urls and --folder are both missing"):
        source_fields(None, None, None, False)
    with pytest.raises(NotFoundError, match="--folder does not exist"):
        source_fields(None, str(tmp_path / "none"), None, False)
    (tmp_path / "b.csv").write_text("image_url,id\nhttp://host/1.png,1\n")
    with pytest.raises(InputError, match="give --url-column image_url"):
        source_fields([str(tmp_path / "b.csv")], None, None, False)
    assert source_fields([str(tmp_path / "b.csv")], None, "image_url", False)["url_column"] == "image_url"
    with pytest.raises(InputError, match="has no outcomes"):
        source_fields([listed], None, None, True)


def test_configs_need_one_source() -> None:
    from flows.new_domain import NewDomainConfig
    from flows.rebuild_config import RebuildIndexConfig

    for source in ({"urls": "a.txt"}, {"urls": ("a.txt", "b.txt")}, {"folder": "images"}):
        assert NewDomainConfig(domain="a", **source) and RebuildIndexConfig(domain="a", **source)  # type: ignore[arg-type]
    RebuildIndexConfig(domain="a")
    with pytest.raises(ValueError, match="urls and folder are both missing"):
        NewDomainConfig(domain="a")
    with pytest.raises(ValueError, match="urls and folder are both given"):
        RebuildIndexConfig(domain="a", urls="a.txt", folder="images")
