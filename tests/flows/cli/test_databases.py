"""Tests of the commands search and databases, in process."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.command import refused, run
from support.tiny_domain import drawn

from flows.cli.console import age


def test_search_with_json_prints_only_json(domain: Any) -> None:
    result = run("search", "shapes", "a red circle", "--k", "3", "--json", "--root", str(domain.root))
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["rank"] for row in found] == [1, 2, 3]
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    assert {"rank", "score", "id", "key", "url"} <= set(found[0])
    assert "red" in found[0]["url"]


def test_search_by_any_name_of_a_database_returns_the_same(domain: Any) -> None:
    names = ("shapes", "models:/knn-database.shapes@champion", "models:/knn-database.shapes/1")
    names += (domain.result.database.reference.uri,)
    outputs = {run("search", name, "blue ring", "--json", "--root", str(domain.root)).stdout for name in names}
    assert len(outputs) == 1
    assert "blue" in outputs.pop()


def test_search_without_query_names_the_options() -> None:
    message = " ".join(run("search", "shapes").stderr.replace("│", " ").split())
    assert "give exactly one query: QUERY, --text TEXT or --image FILE" in message


def test_search_with_text_option_equals_query_argument(domain: Any) -> None:
    options = ["--json", "--root", str(domain.root)]
    result = run("search", "shapes", "--text", "a red circle", *options)
    assert result.stdout == run("search", "shapes", "a red circle", *options).stdout
    assert len(json.loads(result.stdout)) == 10


def test_search_by_image_of_any_mode_finds_that_image(domain: Any, tmp_path: Path) -> None:
    circle = drawn("blue", "circle")
    circle.save(tmp_path / "plain.png")
    circle.convert("RGBA").save(tmp_path / "alpha.webp", lossless=True)
    turned = circle.getexif()
    turned[0x0112] = 6
    drawn("purple", "triangle").rotate(90).save(tmp_path / "turned.png", exif=turned)
    for name, found in (("plain.png", "blue-circle"), ("alpha.webp", "blue-circle"), ("turned.png", "purple-triangle")):
        options = ["--image", str(tmp_path / name), "--json", "--k", "2", "--root", str(domain.root)]
        result = run("search", "shapes", *options)
        assert result.exit_code == 0, result.stderr
        first, second = json.loads(result.stdout)
        assert first["url"].endswith(f"/{found}.png")
        assert first["score"] > 0.99
        assert first["score"] > second["score"]


def test_search_with_html_writes_a_page_of_the_images(domain: Any, tmp_path: Path) -> None:
    page, root = tmp_path / "page.html", ["--root", str(domain.root)]
    result = run("search", "shapes", "a red circle", "--k", "3", "--html", str(page), *root)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(page)
    written = page.read_text(encoding="utf-8")
    assert written.count("data:image/webp;base64,") == 3
    result = run("search", "shapes", "a red circle", "--k", "3", "--html", str(page), "--json", *root)
    assert page.read_text(encoding="utf-8") == written
    for row in json.loads(result.stdout):
        assert f'href="{row["url"]}"' in written
        assert f"{row['score']:.3f}" in written
        assert row["key"] in written
    drawn("red", "circle").save(tmp_path / "mine.png")
    run("search", "shapes", "--image", str(tmp_path / "mine.png"), "--k", "3", "--html", str(page), *root)
    assert page.read_text(encoding="utf-8").count("data:image/webp;base64,") == 4
    assert "mine.png" in page.read_text(encoding="utf-8")


def test_search_with_invalid_query_or_output_fails_on_one_line(domain: Any, tmp_path: Path) -> None:
    root = ["--root", str(domain.root)]
    refused(run("search", "shapes", "--text", " ", *root), "the query is empty")
    refused(run("search", "shapes", "--image", f"{tmp_path}/no.png", *root), "image does not exist", "no.png")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused(run("search", "shapes", "--image", f"{tmp_path}/torn.png", *root), "image cannot be read", "torn.png")
    refused(
        run("search", "shapes", "a", "--html", f"{tmp_path}/page.png", *root), "page has an unknown suffix", "use .html"
    )
    refused(
        run("search", "shapes", "a", "--html", f"{tmp_path}/no/page.html", *root),
        f"folder does not exist: {tmp_path}/no;",
    )
    page = ["--html", f"{tmp_path}/page.html"]
    refused(run("search", "shapes", "a", "--k", "501", *page, *root), "500", "501")
    assert not (tmp_path / "page.html").exists()


def test_databases_lists_registered_versions(domain: Any) -> None:
    (entry,) = json.loads(run("databases", "--json", "--root", str(domain.root)).stdout)
    assert (entry["name"], entry["version"], entry["aliases"]) == ("knn-database.shapes", 1, ["champion"])
    version = domain.result.database.reference.manifest()
    embeddings = Path(version.inputs["embeddings"]["uri"])
    stored = [Path(domain.result.database.reference.uri) / file.name for file in version.files]
    stored += [*embeddings.glob("img_emb/*"), *embeddings.glob("metadata/*")]
    assert entry["bytes"] == sum(path.stat().st_size for path in stored)
    heads, row = run("databases", "--root", str(domain.root)).stdout.splitlines()
    for head in ("name", "rows", "recall@10 image", "recall@10 text", "encoder", "aliases", "size", "age"):
        assert head in heads
    for part in ("knn-database.shapes", str(entry["rows"]), "1.000", "sticker-clip", "champion", "kB"):
        assert part in row
    assert row.split()[-1] in {"s", "min"}


def test_databases_of_version_without_size_shows_a_dash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from infra.registry import Registry

    entry = {"name": "knn-database.old", "version": 1, "rows": 9, "aliases": [], "encoder": "[red]x", "created_ms": 0}
    monkeypatch.setattr(Registry, "versions", lambda self, kind: [entry])
    _, row = run("databases", "--root", str(tmp_path)).stdout.splitlines()
    assert row.split()[:6] == ["knn-database.old", "1", "9", "–", "–", "[red]x"]
    assert row.split()[6] == "–"
    assert row.split()[-1] == "d"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (59, "59 s"), (3 * 60 + 1, "3 min"), (2.5 * 3600, "2 h"), (86_400, "1 d"), (400 * 86_400, "400 d")],
)
def test_age_of_timestamp_returns_rounded_number_with_unit(seconds: float, text: str) -> None:
    assert age(int((time.time() - seconds) * 1000)) == text


def test_search_by_image_that_fails_in_a_pillow_plugin_fails_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.ppm").write_bytes(b"P6 x 3 255\n")
    with pytest.raises(ValueError, match="invalid literal"):
        Image.open(tmp_path / "bad.ppm")
    refused(run("search", "shapes", "--image", f"{tmp_path}/bad.ppm"), "image cannot be read", "bad.ppm (inv")


def test_search_in_unknown_database_lists_registered_ones(domain: Any) -> None:
    refused(
        run("search", "shape", "a", "--root", str(domain.root)),
        "no database is registered as models:/knn-database.shape@champion",
        "knn-database.shapes@champion",
    )
