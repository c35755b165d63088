"""Tests of Parquet tables and URL lists."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.object_stores import Bucket

from infra.errors import InputError, NotFoundError
from infra.formats import tables

URLS = ["https://host/1.png", "https://host/a,b?c=d#e"]
CAPTIONS = ["one", 'two "quoted", with comma']


def parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        tables.read_url_list(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


TABLES = {
    "a.parquet": parquet(pa.table({"caption": CAPTIONS, "url": URLS})),
    "a.csv": b'caption,url\none,https://host/1.png\n"two ""quoted"", with comma","https://host/a,b?c=d#e"\n',
    "a.CSV": b'\xef\xbb\xbfurl,caption\r\n"https://host/1.png",one\r\n'
    b'"https://host/a,b?c=d#e","two ""quoted"", with comma"\r\n',
    "a.tsv": b'url\tcaption\nhttps://host/1.png\tone\nhttps://host/a,b?c=d#e\t"two ""quoted"", with comma"\n',
    "a.json": b'{"url": "https://host/1.png", "caption": "one"}\n'
    b'{"caption": "two \\"quoted\\", with comma", "url": "https://host/a,b?c=d#e"}\n',
    "a.jsonl": b'{"url": "https://host/1.png", "caption": "one"}\n'
    b'{"url": "https://host/a,b?c=d#e", "caption": "two \\"quoted\\", with comma"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_read_url_list_keeps_the_order_and_further_columns(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(TABLES[name])
    table = tables.read_url_list(str(tmp_path / name))
    assert sorted(table.column_names) == ["caption", "url"]
    assert table["url"].to_pylist() == URLS
    assert table["caption"].to_pylist() == CAPTIONS
    assert table["url"].type == pa.string()
    assert table["url"].num_chunks == 1


@pytest.mark.parametrize("name", ["a.txt", "a.urls", "list"])
def test_read_url_list_of_plain_text_reads_one_url_per_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f"# stickers\n\n  {URLS[0]}\t\r\n{URLS[1]}")
    assert tables.read_url_list(str(tmp_path / name)).to_pydict() == {"url": URLS}


@pytest.mark.parametrize(
    "urls", [pa.array(URLS, pa.large_string()), pa.array(URLS).dictionary_encode(), pa.array(URLS, pa.string_view())]
)
def test_read_url_list_accepts_every_string_type(urls: pa.Array, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(pa.table({"url": urls})))
    table = tables.read_url_list(str(tmp_path / "a.parquet"))
    assert table["url"].type == pa.string()
    assert table["url"].to_pylist() == URLS


def test_read_url_list_combines_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": URLS * 3}), tmp_path / "a.parquet", row_group_size=1)
    table = tables.read_url_list(str(tmp_path / "a.parquet"))
    assert (table["url"].to_pylist(), table["url"].num_chunks) == (URLS * 3, 1)


def test_read_url_list_reads_a_remote_list(bucket: Bucket) -> None:
    bucket.write("lists/a.csv", TABLES["a.csv"])
    assert tables.read_url_list(f"{bucket.uri}/lists/a.csv")["url"].to_pylist() == URLS
    with pytest.raises(NotFoundError, match=rf"^{bucket.uri}/lists/b\.csv does not exist; check the path"):
        tables.read_url_list(f"{bucket.uri}/lists/b.csv")


@pytest.mark.parametrize(
    ("name", "data", "columns", "advice"),
    [
        ("a.parquet", parquet(pa.table({"URL": URLS, "id": [1, 2]})), "URL, id", "give --url-column URL"),
        ("a.parquet", parquet(pa.table({"id": [1], " url": URLS[:1]})), "id,  url", "give --url-column ' url'"),
        ("a.csv", b"page,img\na,https://host/1.png\n", "page, img", "give --url-column img"),
        ("a.csv", b"https://host/1.png\nhttps://host/2.png\n", "https://host/1.png", "add a header line with"),
        ("a.tsv", b"url,id\nhost/1.png,1\n", "url,id", "rename the column of the URLs"),
        ("a.jsonl", b'{"link": "https://host/1.png"}\n', "link", "give --url-column link"),
        ("a.parquet", parquet(pa.table({})), "nothing", "rename the column of the URLs"),
    ],
)
def test_read_url_list_without_a_url_column_names_the_columns(
    name: str, data: bytes, columns: str, advice: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    assert refused(path, data).startswith(f"{path} has no column 'url', only {columns}; {advice}")


def test_read_url_list_with_a_url_column_renames_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,image_url,id\npage,https://host/1.png,7\n")
    table = tables.read_url_list(str(tmp_path / "a.csv"), "image_url")
    assert table.to_pydict() == {"user_url": ["page"], "url": ["https://host/1.png"], "id": [7]}
    with pytest.raises(InputError, match="has no column 'link', only url, image_url, id; name one of them"):
        tables.read_url_list(str(tmp_path / "a.csv"), "link")


@pytest.mark.parametrize(
    ("name", "data", "repeated"),
    [
        ("a.csv", b"url,url\nhttps://host/1.png,https://host/2.png\n", "url"),
        ("a.tsv", b"url\tid\tid\nhttps://host/1.png\t1\t2\n", "id"),
    ],
)
def test_read_url_list_with_a_repeated_column_names_it(name: str, data: bytes, repeated: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert refused(path, data) == f"{path} has several columns {repeated!r}; keep only one of them"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", b""),
        ("a.txt", b"\n  \n# only a comment\n"),
        ("a.csv", b"url,caption\n"),
        ("a.parquet", parquet(pa.table({"url": pa.array([], pa.string())}))),
    ],
)
def test_read_url_list_without_rows_raises_input_error(name: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    assert refused(path, data) == f"{path} lists no URL; add at least one row"


@pytest.mark.parametrize(
    ("name", "data", "form"),
    [
        ("a.parquet", b"PAR1 but no more", ".parquet"),
        ("a.parquet", TABLES["a.parquet"][:-20], ".parquet"),
        ("a.parquet", b"", ".parquet"),
        ("a.csv", b"", ".csv"),
        ("a.csv", b"url,caption\nhttps://host/1.png\n", ".csv"),
        ("a.jsonl", b'{"url": "https://ho', ".jsonl"),
        ("a.json", b'[{"url": "https://host/1.png"}', ".json"),
        ("a.json", b'["https://host/1.png"]', ".json"),
        ("a.txt", b"https://host/\xff\n", ".txt"),
        ("a.gz", b"\x1f\x8b\x08\x00", ".gz"),
        ("list", b"\x00\xff", "text"),
        ("list", b"first\nsecond\n", "text"),
    ],
)
def test_read_url_list_of_an_unreadable_file_names_its_format(
    name: str, data: bytes, form: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    assert refused(path, data).startswith(f"{path} cannot be read as a {form} URL list (")


def test_read_url_list_of_a_missing_file_raises_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.txt does not exist; check the path"):
        tables.read_url_list(str(tmp_path / "none.txt"))


def test_write_table_then_read_table_keeps_schema_and_columns(tmp_path: Path) -> None:
    schema = pa.schema([("key", pa.string()), ("width", pa.int32())])
    path = tmp_path / "metadata/metadata_00000.parquet"
    rows = [{"key": "b", "width": 3}, {"key": "a"}, {"width": 5, "ignored": 1}]
    tables.write_table(iter(rows), schema, path)
    table = tables.read_table(path)
    assert table.schema.equals(schema)
    assert table.to_pydict() == {"key": ["b", "a", None], "width": [3, None, 5]}
    assert tables.read_table(str(path), ["width"]).to_pydict() == {"width": [3, None, 5]}


def test_write_table_without_rows_keeps_the_schema(tmp_path: Path) -> None:
    schema = pa.schema([("key", pa.string())])
    tables.write_table([], schema, tmp_path / "a.parquet")
    assert tables.read_table(tmp_path / "a.parquet").schema.equals(schema)


@pytest.mark.parametrize("data", [b"", b"no parquet", TABLES["a.parquet"][:-9], None])
def test_read_table_of_an_unreadable_file_raises_input_error(data: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        tables.read_table(path)
    assert str(caught.value).startswith(f"{path} is not a readable parquet file (")


def test_read_lines_strips_lines_and_drops_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a cat\r\n\n  ein Käfer \n# kept".encode())
    assert tables.read_lines(str(path)) == ["a cat", "ein Käfer", "# kept"]
    path.write_bytes(b"a \xff")
    with pytest.raises(InputError) as caught:
        tables.read_lines(str(path))
    assert str(caught.value).startswith(f"{path} is not UTF-8 text (")
    with pytest.raises(NotFoundError, match=r"none\.txt does not exist; check the path"):
        tables.read_lines(str(tmp_path / "none.txt"))
