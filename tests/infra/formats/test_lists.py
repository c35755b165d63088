"""Lists as they are found in practice: quotes, encodings, compression, JSON in every form, several files."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from support.object_stores import Bucket

from infra.errors import InputError, NotFoundError
from infra.formats import delimited, list_source, lists, tables

ROWS = [(f"https://host/{n}.png", f"caption {n}") for n in range(5)]
LINES = "url,caption\n" + "".join(f"{url},{caption}\n" for url, caption in ROWS)
TABLE = {"url": [url for url, _ in ROWS], "caption": [caption for _, caption in ROWS]}


def read(path: Path, data: bytes | str | None = None) -> dict[str, list[object]]:
    if data is not None:
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    found: dict[str, list[object]] = tables.read_url_list(str(path)).to_pydict()
    return found


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read files in blocks of 64 KiB, so that short files have several."""
    for module in (list_source, delimited):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 16)


def refused(path: Path, data: bytes | str) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(InputError) as caught:
        tables.read_url_list(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("separator", ["\t", ","])
def test_list_without_quotes_keeps_captions_that_start_with_one(separator: str, tmp_path: Path) -> None:
    captions = ['"open', 'ends here"', '"Hello" she said', '5" nail', '"whole"', '""', "plain"] * 15
    text = separator.join(("caption", "url")) + "\n"
    text += "".join(f"{caption}{separator}https://host/{n}.png\n" for n, caption in enumerate(captions))
    found = read(tmp_path / ("a.tsv" if separator == "\t" else "a.csv"), text)
    assert found["caption"] == captions
    assert found["url"] == [f"https://host/{n}.png" for n in range(len(captions))]


def test_list_with_quotes_reads_separators_newlines_and_doubled_quotes(tmp_path: Path) -> None:
    captions = ['a "quoted" word', "with, comma", "two\nlines, and\n\nmore", "", 'ends with "', '5" nail']
    text = "caption,url\r\n" + "".join(
        '"{}",https://host/{}.png\r\n'.format(caption.replace('"', '""'), n) for n, caption in enumerate(captions)
    )
    assert read(tmp_path / "a.csv", text)["caption"] == captions


def test_list_whose_quotes_start_late_is_read_again_with_quotes(small_blocks: None, tmp_path: Path) -> None:
    plain = "".join(f"https://host/{n}.png,caption {n}\n" for n in range(40_000))
    found = read(tmp_path / "a.csv", "url,caption\n" + plain + 'https://host/z.png,"a, b"\n')
    assert len(found["url"]) == 40_001
    assert found["caption"][-2:] == ["caption 39999", "a, b"]


def test_list_with_unbalanced_quotes_names_the_line(tmp_path: Path) -> None:
    text = 'url,caption\nhttps://host/1.png,"one, two"\nhttps://host/2.png,"open, and\nhttps://host/3.png,three\n'
    message = refused(tmp_path / "a.csv", text)
    assert "the quotes in line 3 are not balanced, and without quotes line 2 has another number of columns" in message


def test_list_with_long_fields_is_read_up_to_the_documented_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "word\n" * 700_000  # 3.5 MB, with newlines
    found = read(tmp_path / "a.csv", f'url,caption\nhttps://host/1.png,"{long}"\nhttps://host/2.png,b\n')
    assert found["caption"] == [long, "b"]
    wide = "word " * 700_000
    assert read(tmp_path / "a.csv", f"url,caption\nhttps://host/1.png,{wide}\n")["caption"] == [wide]
    assert read(tmp_path / "a.jsonl", json.dumps({"url": "https://host/1.png", "caption": long}))["caption"] == [long]
    for name in ("MAX_FIELD_BYTES", "BLOCK_BYTES"):
        monkeypatch.setattr(list_source, name, 1 << 20)
        monkeypatch.setattr(delimited, name, 1 << 20)
    assert "a row is longer than 1 MiB" in refused(tmp_path / "a.csv", f"url,caption\nhttps://host/1.png,{wide}\n")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_list_csv_with_another_separator_is_recognised(separator: str, tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", LINES.replace(",", separator)) == TABLE


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
def test_list_in_unicode_with_a_mark_is_read(encoding: str, name: str, tmp_path: Path) -> None:
    url = "https://host/käfer.png"
    text = {"a.csv": f"url,caption\n{url},ü\n", "a.jsonl": f'{{"url": "{url}"}}\n', "a.txt": f"{url}\n"}[name]
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    assert read(tmp_path / name, (mark + text).encode(encoding))["url"] == [url]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
def test_list_in_latin_1_is_refused_with_the_encoding(name: str, tmp_path: Path) -> None:
    url = "https://host/1.png"
    text = {
        "a.csv": f"url,caption\n{url},caf\xe9\n",
        "a.jsonl": f'{{"url": "{url}"}}\n{{"url": "caf\xe9"}}\n',
        "a.txt": f"{url}\nhttps://caf\xe9\n",
    }[name]
    message = refused(tmp_path / name, text.encode("latin-1"))
    assert "it is not UTF-8: byte 0xe9 in line 2; it is probably Windows-1252 or Latin-1" in message


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a"])
def test_list_compressed_in_any_format_is_read(name: str, tmp_path: Path) -> None:
    text = LINES.replace(",", "\t") if name == "a.tsv" else LINES
    if name == "a.jsonl":
        text = "".join(json.dumps({"url": url, "caption": caption}) + "\n" for url, caption in ROWS)
    data = text.encode()
    packed = {
        ".gz": gzip.compress(data[:20]) + gzip.compress(data[20:]),
        ".zst": pa.compress(data, codec="zstd", asbytes=True),
        ".bz2": bz2.compress(data),
        ".xz": lzma.compress(data),
        ".GZ": gzip.compress(data),
    }
    for suffix, content in packed.items():
        assert read(tmp_path / (name + suffix), content) == TABLE
    assert "cannot be read as a .gz URL list (" in refused(tmp_path / f"{name}.gz", gzip.compress(data)[:-12])


JSON_FORMS = {
    "array": lambda rows: json.dumps(rows),
    "indented array": lambda rows: json.dumps(rows, indent=2),
    "indented objects": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
    "lines": lambda rows: "\r\n".join(json.dumps(row) for row in rows),
}


@pytest.mark.parametrize("form", JSON_FORMS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.txt", "list"])
def test_list_in_every_form_of_json_is_read(form: str, name: str, tmp_path: Path) -> None:
    rows = [{"url": url, "caption": caption} for url, caption in ROWS]
    assert read(tmp_path / name, JSON_FORMS[form](rows)) == TABLE


def test_list_of_long_json_array_is_read_in_parts(tmp_path: Path) -> None:
    rows = [{"url": f"https://host/{n}.png", "text": "x" * 500, "n": n} for n in range(25_000)]
    found = read(tmp_path / "a.json", json.dumps(rows))
    assert found["url"] == [row["url"] for row in rows]
    assert found["n"] == list(range(25_000))


@pytest.mark.parametrize("name", ["list", "a.urls", "a.txt"])
def test_list_of_unknown_suffix_is_recognised_by_its_content(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(TABLE), tmp_path / name)
    assert read(tmp_path / name) == TABLE
    assert read(tmp_path / name, LINES) == TABLE
    assert "its lines are not URLs: 'red apples'; write one URL per line" in refused(
        tmp_path / name, "red apples\ngreen pears\n"
    )


def test_list_with_columns_of_mixed_types_reads_them_as_text(small_blocks: None, tmp_path: Path) -> None:
    many = 5_000
    lines = [{"url": "https://host/1.png", "id": 7}] * many
    last = {"url": "https://host/2.png", "id": "eight", "tags": ["a"]}
    found = read(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in [*lines, last]))
    assert found["id"] == ["7"] * many + ["eight"]
    assert found["tags"][-2:] == [None, ["a"]]
    text = "url,id,score\n" + "https://host/1.png,7,1\n" * 9_000 + "https://host/2.png,eight,0.5\n"
    found = read(tmp_path / "a.csv", text)
    assert (found["id"][0], found["id"][-1], found["score"][0], found["score"][-1]) == ("7", "eight", 1.0, 0.5)


def test_list_of_times_keeps_their_text_if_one_is_no_time(small_blocks: None, tmp_path: Path) -> None:
    rows = [{"url": "https://host/1.png", "day": "2024-01-02T03:04:05"}] * 4_000
    found = read(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "day": "later"}]))
    assert (found["day"][0], found["day"][-1]) == ("2024-01-02T03:04:05", "later")


def folder_of_lists(folder: Path) -> None:
    (folder / "b").mkdir(parents=True)
    (folder / "_temporary").mkdir()
    pq.write_table(
        pa.table({"url": TABLE["url"][2:], "caption": TABLE["caption"][2:]}), folder / "b" / "part-1.parquet"
    )
    (folder / "a.csv").write_text("url,caption\n" + "".join(f"{url},{caption}\n" for url, caption in ROWS[:2]))
    for name in ("_SUCCESS", ".hidden.csv", "readme.md", "_temporary/x.csv"):
        (folder / name).write_text("no list")


def test_list_in_folder_pattern_or_several_files_is_read_in_stable_order(tmp_path: Path) -> None:
    folder_of_lists(tmp_path / "lists")
    root = str(tmp_path / "lists")
    assert tables.read_url_list(root).to_pydict() == TABLE
    assert tables.read_url_list(f"{root}/**/[ap]*.[cp][sa]*").to_pydict() == TABLE
    assert tables.read_url_list(f"{root}/?/*.parquet").to_pydict()["url"] == TABLE["url"][2:]
    assert tables.read_url_list([f"{root}/b/part-1.parquet", f"{root}/a.csv"])["url"].to_pylist() == [
        *TABLE["url"][2:], *TABLE["url"][:2]
    ]  # fmt: skip
    with pytest.raises(NotFoundError, match=r"\*\.orc matches no file"):
        tables.read_url_list(f"{root}/*.orc")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no list; give files of"):
        tables.read_url_list(str(tmp_path / "empty"))
    (tmp_path / "a[1].txt").write_text(ROWS[0][0])  # a file whose name looks like a pattern
    assert tables.read_url_list(str(tmp_path / "a[1].txt")).num_rows == 1


def test_list_of_files_with_different_columns_and_types_is_united(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("url,id\nhttps://host/1.png,7\n")
    (tmp_path / "2.jsonl").write_text('{"id": "x", "url": "https://host/2.png", "at": {"x": 1}}\n')
    (tmp_path / "3.csv").write_text("url,id\nhttps://host/3.png,0.5\n")
    (tmp_path / "4.jsonl").write_text('{"id": [1], "url": "https://host/4.png", "at": {"y": "a"}}\n')
    assert tables.read_url_list(str(tmp_path)).to_pydict() == {
        "url": [f"https://host/{n}.png" for n in (1, 2, 3, 4)],
        "id": ["7", "x", "0.5", "[1]"],
        "at": [None, {"x": 1, "y": None}, None, {"x": None, "y": "a"}],
    }


def test_list_on_an_object_store_is_read_from_folder_and_pattern(bucket: Bucket, tmp_path: Path) -> None:
    folder_of_lists(tmp_path / "lists")
    for name in ("a.csv", "b/part-1.parquet"):
        bucket.write(f"lists/{name}", (tmp_path / "lists" / name).read_bytes())
    assert tables.read_url_list(f"{bucket.uri}/lists").to_pydict() == TABLE
    assert tables.read_url_list(f"{bucket.uri}/lists/b/*.parquet")["url"].to_pylist() == TABLE["url"][2:]


def test_long_list_is_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "_IN_MEMORY", 0)
    before = pa.total_allocated_bytes()
    path = tmp_path / "a.csv"
    path.write_text("url\n" + "".join(f"https://host/{n:09d}.png\n" for n in range(500_000)))
    table = tables.read_url_list(str(path))
    assert pa.total_allocated_bytes() - before < table.nbytes / 4
    assert pc.count_distinct(table["url"]).as_py() == 500_000


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_read_lines_reads_texts_from_a_column(name: str, tmp_path: Path) -> None:
    rows = {"id": [1, 2], "prompt": ["a cat", '"quoted, text" '], "caption": ["x", "y"]}
    if name == "a.parquet":
        pq.write_table(pa.table(rows), tmp_path / name)
    elif name == "a.csv":
        (tmp_path / name).write_text('id,prompt\n1,a cat\n2,"""quoted, text"" "\n')
    else:
        (tmp_path / name).write_text('{"prompt": "a cat"}\n{"prompt": "\\"quoted, text\\" "}\n')
    assert tables.read_lines(str(tmp_path / name)) == ["a cat", '"quoted, text"']
    (tmp_path / "b.csv").write_text("id,words\n1,a\n")
    with pytest.raises(InputError, match="has no column text, only id, words; rename"):
        tables.read_lines(str(tmp_path / "b.csv"))


def test_read_lines_reads_compressed_and_utf_16_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a cat\n\na dog"))
    assert tables.read_lines(str(tmp_path / "a.txt.gz")) == ["a cat", "a dog"]
    (tmp_path / "b.txt").write_bytes("ein Käfer\n".encode("utf-16"))
    assert tables.read_lines(str(tmp_path / "b.txt")) == ["ein Käfer"]
