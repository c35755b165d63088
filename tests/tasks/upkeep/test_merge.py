"""Union, subset and filters: the same images, each still found, none embedded again."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.fakes import WithoutRay
from support.tiny_artifacts import IDENTITY, IMAGES, embedding, embedding_shards, image_shards, sha, urls_of
from support.tiny_domain import encoded

from infra import artifacts
from infra.errors import EncoderMismatchError, InputError
from tasks.download.config import DownloadConfig
from tasks.index.config import IndexConfig
from tasks.index.task import index
from tasks.references.database import open_database
from tasks.references.domain_folder import DomainFolder
from tasks.references.filter_expression import parse_where
from tasks.references.images import fetch_images
from tasks.references.lineage import images_of
from tasks.references.takedown import Entries, read_entries
from tasks.references.types import DatabaseVersion, config_from_manifest, require_same_encoder
from tasks.references.url_history import UrlHistory
from tasks.upkeep.compact import compact
from tasks.upkeep.merge import CombinedInputs, merge
from tasks.upkeep.subset import subset
from tasks.upkeep.takedown import commit_takedown

INDEX = IndexConfig(index="Flat", recall_queries=4)


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> WithoutRay:
    fake = WithoutRay()
    fake.install(monkeypatch)
    return fake


def database(folder: Path, *parts: list[tuple[str, bytes | None]], **options: Any) -> DatabaseVersion:
    images = image_shards(folder, parts)
    rows = embedding_shards(folder, images)
    return index(rows, DomainFolder(uri=str(folder), cache=folder / "cache"), INDEX, **options).reference


def indexed(combined: CombinedInputs, folder: Path) -> DatabaseVersion:
    return index(
        combined.embeddings.reference,
        DomainFolder(uri=str(folder), cache=folder / "cache"),
        INDEX,
        takedown=combined.takedown,
    ).reference


def found(version: DatabaseVersion, folder: Path, k: int = 5) -> list[list[str]]:
    """Return, for each of the first eight images, the urls of its nearest rows."""
    opened = open_database(version, folder / "cache")
    queries = pa.array([sha(data) for _, data in IMAGES[:8]]).to_pylist()
    import numpy as np

    hits = opened.search(np.array([embedding(digest) for digest in queries], dtype=np.float32), k)
    return [[row["url"] for row in opened.describe(ids[ids >= 0].tolist())] for ids in hits.ids]


def test_merge_finds_same_rows_as_fresh_build(tmp_path: Path) -> None:
    a = database(tmp_path / "a", IMAGES[:3], IMAGES[3:5])
    b = database(tmp_path / "b", IMAGES[5:7], IMAGES[7:8])
    both = indexed(merge({"a": a, "b": b}, DomainFolder(uri=str(tmp_path / "c"), cache=tmp_path)), tmp_path / "c")
    fresh = database(tmp_path / "fresh", IMAGES[:3], IMAGES[3:5], IMAGES[5:7], IMAGES[7:8])
    assert found(both, tmp_path) == found(fresh, tmp_path)
    assert both.rows == 8
    # Both databases use the same keys; each row must still return its own image.
    images = fetch_images(both, list(range(8)), tmp_path / "cache")
    assert [encoded(image) for image in images] == [data for _, data in IMAGES[:8]]
    assert not list((tmp_path / "c").rglob("*.tar"))
    assert not list((tmp_path / "c").rglob("*.npy.*"))


def test_merge_hides_takedowns_of_both_and_merges_url_history(tmp_path: Path) -> None:
    a, b = image_shards(tmp_path / "a", [IMAGES[:3]]), image_shards(tmp_path / "b", [IMAGES[3:6]])
    down = commit_takedown(Entries(frozenset({IMAGES[4][0]})), DomainFolder(uri=str(tmp_path / "b")), info={}).reference
    versions = {
        "a": index(
            embedding_shards(tmp_path / "a", a), DomainFolder(uri=str(tmp_path), cache=tmp_path), INDEX
        ).reference,
        "b": index(
            embedding_shards(tmp_path / "b", b), DomainFolder(uri=str(tmp_path), cache=tmp_path), INDEX, takedown=down
        ).reference,
    }
    union = merge(versions, DomainFolder(uri=str(tmp_path / "c"), cache=tmp_path))
    assert union.takedown is not None
    assert read_entries(union.takedown, tmp_path).url == {IMAGES[4][0]}
    both = indexed(union, tmp_path / "c")
    assert all(IMAGES[4][0] not in urls for urls in found(both, tmp_path, k=6))
    images = images_of(union.embeddings.reference)
    assert UrlHistory.of(images, tmp_path).requested([url for url, _ in IMAGES[:7]], failed_too=True).tolist() == [
        True
    ] * 6 + [False]
    assert config_from_manifest(DownloadConfig, images.manifest().config).shard_rows == 4


def test_merge_of_different_subsets_of_same_shards_differs(tmp_path: Path) -> None:
    whole = database(tmp_path / "a", IMAGES[:6], IMAGES[6:12])
    other = database(tmp_path / "b", IMAGES[12:15])
    unions = []
    for where in ('url like "%circle%"', 'url like "%square%"'):
        part = indexed(
            subset(whole, where, DomainFolder(uri=str(tmp_path / "part"), cache=tmp_path)), tmp_path / "part"
        )
        unions.append(
            merge({"b": other, "part": part}, DomainFolder(uri=str(tmp_path / "c"), cache=tmp_path)).embeddings
        )
    wanted = [url for url, _ in IMAGES[:12] if "square" in url]
    assert wanted
    assert urls_of(unions[1].reference) == [url for url, _ in IMAGES[12:15]] + wanted
    assert [outcome.skipped for outcome in unions] == [False, False]
    assert images_of(unions[0].reference).digest != images_of(unions[1].reference).digest


def test_compact_different_subsets_of_same_shards_differ(tmp_path: Path) -> None:
    """Their shards are equal, but their URL histories differ."""
    whole = database(tmp_path / "a", IMAGES[:6], IMAGES[6:12])
    down = commit_takedown(Entries(frozenset({IMAGES[0][0]})), DomainFolder(uri=str(tmp_path)), info={}).reference
    slim = []
    for where in ('url like "%circle%"', 'url like "%square%"'):
        rows = subset(whole, where, DomainFolder(uri=str(tmp_path / "part"), cache=tmp_path)).embeddings.reference
        slim.append(compact(images_of(rows), rows, down, DomainFolder(uri=str(tmp_path / "part"), cache=tmp_path))[0])
    one, other = (outcome.reference.manifest() for outcome in slim)
    assert [shard.files for shard in one.shards] == [shard.files for shard in other.shards]
    assert (slim[1].skipped, one.digest == other.digest) == (False, False)
    assert [manifest.identity["where"] for manifest in (one, other)] == ['url like "%circle%"', 'url like "%square%"']


def test_merge_different_encoders_raises_naming_both(tmp_path: Path) -> None:
    a = database(tmp_path / "a", IMAGES[:3]).manifest()
    encoder = {**IDENTITY["encoder"], "name": "other", "weights_digest": "v" * 64}
    other = artifacts.ArtifactBuilder(str(tmp_path), "database", inputs={}, config={}).commit(
        [], identity={"encoder": encoder}, info={}
    )
    with pytest.raises(EncoderMismatchError, match=r"a was made by made.*, \./b by other.*rebuild one") as caught:
        require_same_encoder(**{"a": a, "./b": other})
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot merge a; give two or more different databases"):
        merge({"a": database(tmp_path / "a", IMAGES[:3])}, DomainFolder(uri=str(tmp_path), cache=tmp_path))


def test_subset_finds_same_rows_as_fresh_build(tmp_path: Path) -> None:
    whole = database(tmp_path / "a", IMAGES[:6], IMAGES[6:9], IMAGES[9:12])
    part = subset(
        whole, 'url like "%red%" or url like "%green-c%"', DomainFolder(uri=str(tmp_path / "b"), cache=tmp_path)
    )
    wanted = [n for n in range(12) if "red" in IMAGES[n][0] or "green-c" in IMAGES[n][0]]
    assert 6 < len(wanted) < 12
    assert urls_of(part.embeddings.reference) == [IMAGES[n][0] for n in wanted]
    folders = [shard.folder for shard in part.embeddings.reference.manifest().shards]
    assert folders[0] is not None  # all of its rows match, so it is reused
    assert None in folders
    combined = indexed(part, tmp_path / "b")
    fresh = database(tmp_path / "fresh", [IMAGES[n] for n in wanted])
    assert found(combined, tmp_path) == found(fresh, tmp_path)
    images = fetch_images(combined, list(range(len(wanted))), tmp_path / "cache")
    assert [encoded(image) for image in images] == [IMAGES[n][1] for n in wanted]
    with pytest.raises(InputError, match=r"no row of .* matches the filter 'width > 48'; use a less restrictive"):
        subset(whole, "width > 48", DomainFolder(uri=str(tmp_path / "b"), cache=tmp_path))


ROWS = pa.table(
    {
        "row": [0, 1, 2, 3],
        "url": ["http://a/cat.png", "http://a/dog.png", "http://b/cat.jpg", "http://b/'q'.png"],
        "key": ["1", "2", "3", "4"],
        "sha256": ["aa", "bb", "cc", None],
        "width": [64, 32, 128, None],
        "height": [64, 64, 16, 8],
    }
)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("width >= 64", [0, 2]),
        ('width >= 64 and url like "%cat%"', [0, 2]),
        ('width<64 or height = 16', [1, 2]),
        ("not (width < 64 OR height == 16)", [0]),
        ("not width < 64 and height != 16", [0]),
        ('key in ("1", \'4\')', [0, 3]),
        ('key not in ("1", "4") and url not like "%.png"', [2]),
        ("height IN (8, 16)", [2, 3]),
        ('url = "http://b/\'q\'.png"', [3]),
        ('sha256 <> "aa"', [1, 2]),
        ("width > -1", [0, 1, 2]),
        ("width < 999999999999999999 and height > -999999999999999999", [0, 1, 2]),
        ("width in (00000000000000000000064, 999999999999999999)", [0]),
        ("width < 99999999999999999999999", [0, 1, 2]),
        ("width > height * 1.5 and width * height * width * height > 0", [2]),
        ("width BETWEEN 32 AND 64 and sha256 is not null", [0, 1]),
        ("width is null", [3]),
        ('sha256 not in ("aa")', [1, 2, 3]),
        ('not (sha256 in ("aa"))', [1, 2, 3]),
        ('sha256 not like "a%" or sha256 != "aa"', [1, 2]),
        ("not (width > 64) or height = 8", [0, 1, 3]),
        ('key = "key" or url = "width"', []),
        (r'url like "http://a/\_at.png" or url like "%\%"', []),
        (r'url ilike "HTTP://A/_at.png" and length(key) = 1', [0]),
        ('"it\'s" = "it\'s" and key = "1"', [0]),
        (" or ".join(["width = 64"] * 700), [0]),
        ('url like "http://_/dog.png"', [1]),
    ],
)  # fmt: skip
def test_parse_where_valid_filter_selects_rows(where: str, rows: list[int]) -> None:
    assert ROWS.filter(parse_where(where).mask(ROWS))["row"].to_pylist() == rows


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "has 0 characters"),
        ("width = 1 or " * 50_000 + "width = 1", "has 650,009 characters; use 1 to 10,000"),
        ("depth > 3", "uses an unknown column: depth; the columns are url, key, sha256, width, height"),
        ("row > 3", "uses an unknown column: row"),
        ("width", "is not a condition"),
        ("null", "is not a condition"),
        ("width > 'x'", "compares text with a number"),
        ("url = 3", "compares text with a number"),
        ("width like '3%'", "compares text with a number"),
        ("width in (3, '4')", "compares text with a number"),
        ("height between 1 and 'x'", "compares text with a number"),
        ("url + 1 > 3", "compares text with a number"),
        ("width > 3 height > 4", "has a syntax error at 'height > 4'"),
        ("(width > 3", "has a syntax error at '3'"),
        ("width > 3) or (height > 4", "has a syntax error at ') or (height > 4'"),
        ("width not > 3", "has a syntax error at"),
        ("url = 'x", 'has a syntax error at "\'x"'),
        ("__import__('os')", "uses __import__, which is not allowed"),
        ("random() > 0.5", "uses random, which is not allowed"),
        ("current_setting('home_directory') = 'x'", "uses current_setting, which is not allowed"),
        ("width > 3; drop", "has a syntax error at 'drop'"),
        ("width > 3; select 1", "is not one condition"),
        ("width > 3 limit 1", "is not one condition"),
        ("width > 3 group by key", "is not one condition"),
        ("width > 3 union select 1", "is not one condition"),
        ("width > (select 1)", "uses subquery, which is not allowed"),
        ("exists (from read_text('/etc/passwd'))", "is not allowed"),
        ("key in (select content from read_text('/etc/passwd'))", "is not allowed"),
        ("width = ?", "is not one condition"),
        ("url::integer > 3", "uses operator_cast, which is not allowed"),
        ("not " * 200 + "width > 3", "is nested too deeply"),
        ("(" * 5_000 + "width > 3" + ")" * 4_000, "is nested too deeply"),
        ("width = " + "1 + " * 2_000 + "1", "is nested too deeply"),
    ],
)
def test_parse_where_invalid_filter_raises(where: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_where(where)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
