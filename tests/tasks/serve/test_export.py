"""The user's own columns: in search results, on the page, in filters and in exports."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.fakes import WithoutRay
from support.tiny_artifacts import IMAGES, embedding_shards, image_shards
from support.tiny_domain import COLOURS, drawn, encoded

from infra.errors import InputError
from infra.settings import Settings
from tasks.download.config import DownloadConfig, ListOptions
from tasks.download.task import download
from tasks.index.config import IndexConfig
from tasks.index.task import index
from tasks.references.database import open_database
from tasks.references.domain_folder import DomainFolder
from tasks.references.lineage import embeddings_of
from tasks.references.takedown import Entries
from tasks.references.types import DatabaseVersion
from tasks.references.user_columns import UserColumns
from tasks.serve.export import export_database
from tasks.serve.gallery import gallery
from tasks.serve.load import SearchResult, user_columns_of
from tasks.upkeep.subset import subset
from tasks.upkeep.takedown import commit_takedown


@pytest.fixture
def version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatabaseVersion:
    """Six images with columns of several types; the last one is taken down."""
    WithoutRay().install(monkeypatch)
    (tmp_path / "files").mkdir()
    for number, colour in enumerate(COLOURS[:6]):
        (tmp_path / "files" / f"{number}.png").write_bytes(encoded(drawn(colour, "circle")))
        columns = {
            "url": f"http://host/{colour}.png", "id": number, "Licence": "CC0" if number % 2 else 'CC "BY", 4.0',
            "tags": [colour, "x"], "score": number / 2 if number else 1, "caption": f"a {colour} circle",
        }  # fmt: skip
        if number == 3:
            columns["licence_checked"] = True
        (tmp_path / "files" / f"{number}.json").write_text(json.dumps(columns))
    folder = DomainFolder(uri=str(tmp_path / "root" / "shapes"), cache=tmp_path / "cache")
    config = DownloadConfig(shard_rows=4)
    images = download(str(tmp_path / "files"), folder, config, options=ListOptions(images=True)).reference
    taken = commit_takedown(Entries(frozenset({f"http://host/{COLOURS[5]}.png"})), folder, info={}).reference
    rows = embedding_shards(folder.uri, images)
    return index(rows, folder, IndexConfig(index="Flat", recall_queries=4), takedown=taken).reference


def test_user_columns_are_found_filtered_and_exported(version: DatabaseVersion, tmp_path: Path) -> None:
    cache, settings = tmp_path / "cache", Settings(root=str(tmp_path / "root"))
    described = open_database(version, cache).describe([4, 0, 4])
    own = user_columns_of(version, described, cache)
    assert [row["id"] for row in own] == [4, 0, 4]
    assert own[1] == {
        "id": 0, "Licence": 'CC "BY", 4.0', "tags": ["red", "x"], "score": 1.0, "caption": "a red circle"
    }  # fmt: skip
    hits = [{"rank": 1, "score": 0.5, **described[1], "columns": own[1]}]
    page = gallery("a", SearchResult(version=version, name="x", rows=hits), [Image.new("RGB", (9, 9))])
    assert "Licence: CC &#34;BY&#34;, 4.0" in page
    assert "tags: [&#34;red&#34;, &#34;x&#34;]" in page

    def selected(where: str) -> list[str]:
        folder = DomainFolder(uri=str(tmp_path / "root" / f"subset-{abs(hash(where))}"), cache=cache)
        rows = subset(version, where, folder).embeddings.reference
        tables = [
            pq.read_table(Path(shard.folder or rows.uri, shard.file(".parquet").name))["url"].to_pylist()
            for shard in rows.manifest().shards
        ]
        return [url[12:-4] for urls in tables for url in urls]

    assert selected('licence = "CC0" and width >= 8') == ["green", "orange"]
    assert selected("score > 0.5 and id + 1 < 4") == ["red", "blue"]
    assert selected("licence_checked = 'true' or tags like '%\"red\"%'") == ["red", "orange"]
    with pytest.raises(InputError, match=r"unknown column: colour; the columns are url, .*, caption, id, l"):
        selected("colour = 'red'")
    with pytest.raises(InputError, match="compares text with a number"):
        selected("id = 'red'")

    made = export_database(version.uri, "parquet", tmp_path / "parquet", settings, file_rows=3)
    assert [path.name for path in made.files] == ["rows-00000.parquet", "rows-00001.parquet"]
    table = pq.read_table(tmp_path / "parquet")
    assert made.rows == table.num_rows == 5
    assert table.column_names == [
        "id", "key", "url", "sha256", "width", "height", "Licence", "caption", "user_id", "licence_checked", "score",
        "tags",
    ]  # fmt: skip
    assert table["user_id"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["tags"][0].as_py() == '["red", "x"]'

    (path,) = export_database(version.uri, "csv", tmp_path / "csv", settings, file_rows=3).files
    with path.open(newline="") as stream:
        read = list(csv.DictReader(stream))
    assert [row["caption"] for row in read] == [f"a {colour} circle" for colour in COLOURS[:5]]
    assert read[0]["Licence"] == 'CC "BY", 4.0'

    export_database(version.uri, "clip-retrieval", tmp_path / "cr", settings)
    metadata = pq.read_table(tmp_path / "cr" / "metadata" / "metadata_0.parquet")
    rows = np.load(tmp_path / "cr" / "img_emb" / "img_emb_0.npy")
    assert (rows.dtype, len(rows), metadata["image_path"].to_pylist()) == (np.float16, 5, metadata["key"].to_pylist())
    assert np.array_equal(rows, open_database(version, cache).rows(np.arange(5)))


def test_user_columns_of_a_list_of_urls_are_empty(tmp_path: Path) -> None:
    images = image_shards(tmp_path, [IMAGES[:2]])
    own = UserColumns(images, tmp_path / "cache")
    assert own.types() == {}
    assert own.rows("00000", ["000000001", "000000000"]) == [{}, {}]
    assert own.table("00000", ["000000001"], {"id": pa.int64()}).to_pylist() == [{"id": None}]


def test_user_columns_without_image_shards_are_empty(version: DatabaseVersion, tmp_path: Path) -> None:
    described = open_database(version, tmp_path / "cache").describe([0])
    images = Path(embeddings_of(version).manifest().inputs["images"]["uri"])
    (images / "manifest.json").unlink()
    assert user_columns_of(version, described, tmp_path / "cache") == [{}]


@pytest.mark.parametrize(
    ("kind", "out", "message"),
    [
        ("orc", "new", "--format is unknown: orc; use parquet, csv, clip-retrieval"),
        ("csv", ".", "is not an empty folder"),
    ],
)
def test_export_with_invalid_options_fails(kind: str, out: str, message: str, tmp_path: Path) -> None:
    from flows.cli.inputs import EXPORT_FORMATS, check_export
    from tasks.serve import export

    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=message):
        check_export(kind, tmp_path / out)
    with pytest.raises(InputError, match=message.removeprefix("--")):
        export_database("x", kind, tmp_path / out, Settings(root=str(tmp_path)))
    assert tuple(export._WRITERS) == EXPORT_FORMATS
