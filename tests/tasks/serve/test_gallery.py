"""Gallery page: self-contained, safe for untrusted URLs, and bounded in size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.html_pages import Page
from support.tiny_domain import drawn

from infra.errors import InputError, IntegrityError
from infra.settings import Settings
from infra.text import printable
from model.encoder.clip import Encoder
from tasks.references.types import DatabaseVersion, EmbeddingShards
from tasks.serve.gallery import MAX_IMAGES, THUMBNAIL_PX, gallery, write_gallery
from tasks.serve.load import SearchResult, search_database

HOSTILE = 'http://a.example/x"y\'<script>alert(1)</script>.png?a=1&amp;b="onerror="alert(2)'


def found(*urls: str | None, rows: int = 12_345) -> SearchResult:
    version = DatabaseVersion(uri="/data/birds/database/1f0c", rows=rows, digest="d")
    hits = [
        {"rank": rank, "score": 0.5 - rank / 100, "id": 40 + rank, "key": f"00000{rank:04d}", "url": url}
        for rank, url in enumerate(urls, start=1)
    ]
    return SearchResult(version=version, name="models:/knn-database.birds/3", rows=hits)


def sample_images(count: int, side: int = 300) -> list[Image.Image]:
    return [Image.new("RGB", (side, side // 2), (20 * number, 0, 255 - 20 * number)) for number in range(count)]


def test_gallery_shows_query_images_scores_keys_and_links() -> None:
    urls = ["http://a.example/red%20bird.png", "https://b.example/owl.png?size=2"]
    page = Page(gallery("a red bird", found(*urls), sample_images(2)))
    assert [link["href"] for link in page.all("a")] == urls
    assert [image["alt"] for image in page.all("img")] == ["red bird.png", "owl.png"]
    for part in ("a red bird", "2 nearest of 12,345", "models:/knn-database.birds/3", "0.490", "0.480", "000000002"):
        assert part in page.text
    first, second = page.images()
    assert first.size == second.size == (THUMBNAIL_PX, THUMBNAIL_PX // 2)
    assert np.abs(np.asarray(first)[50, 50] - [0, 0, 255.0]).max() < 12
    assert np.abs(np.asarray(second)[50, 50] - [20, 0, 235.0]).max() < 12


def test_gallery_of_image_query_shows_it_first() -> None:
    query = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    page = Page(gallery(query, found("http://a/b.png"), sample_images(1), name="my <bird>.png"))
    shown = page.images()
    assert len(shown) == 2
    assert np.asarray(shown[0]).min() > 250, "transparent pixels become white"
    assert page.all("img")[0]["alt"] == "the query: my <bird>.png"
    assert "my <bird>.png" in page.text


def test_gallery_escapes_file_name_of_query_image() -> None:
    name = '"><script>alert(1)</script><img onerror="alert(2).png'
    page = Page(gallery(sample_images(1)[0], found(), [], name=name))
    assert [image["alt"] for image in page.all("img")] == [f"the query: {name}"]
    assert name in page.text
    assert page.is_harmless()


def test_gallery_escapes_text_of_database_and_query() -> None:
    text = gallery("</title><script>alert(0)</script>", found(HOSTILE, HOSTILE.replace("http:", "")), sample_images(2))
    page = Page(text)
    assert "<script" not in text.lower()
    assert [link["href"] for link in page.all("a")] == [HOSTILE]
    assert page.is_harmless()
    assert page.text.count(HOSTILE[5:]) == 2
    assert len(page.images()) == 2


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "java\nscript:alert(1)",
        " data:text/html,<b>",
        "file:///etc/passwd",
        "//a/b",
        "http://[",
        "",
    ],
)
def test_gallery_links_only_http_and_https(url: str) -> None:
    page = Page(gallery("x", found(url), sample_images(1)))
    assert not page.all("a")
    assert printable(url) in page.text
    assert page.all("img")[0]["alt"] == "image 000000001"


def test_gallery_shows_row_without_url() -> None:
    page = Page(gallery("x", found(None), sample_images(1)))
    assert not page.all("a")
    assert "None" not in page.text


def test_gallery_makes_no_requests_and_forbids_them() -> None:
    text = gallery("a bird", found("http://a/b.png"), sample_images(1))
    page = Page(text)
    sources = [value for _, attributes in page.elements for name, value in attributes.items() if name == "src"]
    assert all(source and source.startswith("data:") for source in sources)
    assert not page.all("link")
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert page.all("html") == [{"lang": "en"}]
    assert "prefers-color-scheme: dark" in text


def test_gallery_size_is_bounded_for_noise_and_long_urls() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8))
    long = "http://a.example/" + "x" * 100_000
    text = gallery("y" * 100_000, found(*[long] * 10), [noise] * 10)
    assert len(text) / 10 * MAX_IMAGES < 40e6
    page = Page(text)
    assert not page.all("a"), "a URL of this length is not linked"
    assert all(len(image["alt"]) <= 120 for image in page.all("img"))


def test_write_gallery_raises_for_too_many_images(tmp_path: Path) -> None:
    many = found(*["http://a/b.png"] * (MAX_IMAGES + 1))
    with pytest.raises(
        InputError,
        match=f"too many images for a page: {MAX_IMAGES + 1}, the maximum is {MAX_IMAGES}; give a smaller --k",
    ):
        write_gallery(tmp_path / "page.html", "x", many, tmp_path)
    assert not list(tmp_path.iterdir())


def test_write_gallery_accepts_empty_result_and_lone_surrogates(tmp_path: Path, domain: Any) -> None:
    version = domain.result.database.reference
    empty = SearchResult(version=version, name="shapes", rows=[])
    write_gallery(tmp_path / "page.html", "a \udce9 bird", empty, tmp_path)
    assert "The 0 nearest of" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_search_database_prepares_a_query_image_as_the_download_does(
    domain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    embed_images = Encoder.embed_images

    def record(self: Encoder, images: Sequence[Image.Image], **options: Any) -> Any:
        sizes.extend(image.size for image in images)
        return embed_images(self, images, **options)

    monkeypatch.setattr(Encoder, "embed_images", record)
    side_px = domain.result.images.reference.manifest().config["policy"]["max_side_px"]
    search_database("shapes", Image.new("RGB", (4000, 60), "red"), 1, _settings(domain))
    assert sizes == [(side_px, round(60 * side_px / 4000))]


def test_search_database_by_image_finds_it_and_gallery_shows_stored_images(domain: Any, tmp_path: Path) -> None:
    query_image = drawn("green", "ring")
    result = search_database("shapes", query_image, 3, _settings(domain))
    assert result.name == "models:/knn-database.shapes/1"
    assert result.rows[0]["url"].endswith("/green-ring.png")
    assert result.rows[0]["score"] == pytest.approx(1, abs=2e-3)
    path = tmp_path / "page.html"
    write_gallery(path, query_image, result, tmp_path, name="green-ring.png")
    query, first, *others = Page(path.read_text(encoding="utf-8")).images()
    assert len(others) == 2
    np.testing.assert_array_equal(np.asarray(query), np.asarray(first))
    distances = [np.abs(np.asarray(one, float) - np.asarray(query_image, float)).mean() for one in (first, *others)]
    assert distances[0] < 8, "equal up to compression"
    assert distances[0] < min(distances[1:])


def test_write_gallery_raises_for_damaged_image_shard(domain: Any, tmp_path: Path) -> None:
    result = search_database("shapes", "a red ring", 1, _settings(domain))
    images = EmbeddingShards.open(result.version.manifest().inputs["embeddings"]["uri"]).manifest().inputs["images"]
    tars = sorted(Path(images["uri"]).glob("*.tar"))
    originals = {tar: tar.read_bytes() for tar in tars}
    try:
        for tar, content in originals.items():
            tar.write_bytes(content[:100] + b"\1" + content[101:])
        with pytest.raises(IntegrityError, match="differs from its committed digest"):
            write_gallery(tmp_path / "page.html", "a red ring", result, tmp_path)
    finally:
        for tar, content in originals.items():
            tar.write_bytes(content)
    assert not (tmp_path / "page.html").exists()


def _settings(domain: Any) -> Settings:
    return Settings(root=str(domain.root))
