"""Evaluation report: score tables, CSV, figure and HTML page."""

import base64
import csv
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.html_pages import Page

from infra import artifacts
from tasks.evaluate.config import SAMPLES
from tasks.evaluate.figure import EvaluationView, plot_page
from tasks.evaluate.report import Report, report_evaluations, tables, write_report
from tasks.evaluate.tables import aligned, markdown, score_rows, swap_heads, swap_rows, table, table_line
from tasks.evaluate.task import Evaluation
from tasks.pages import preview
from tasks.references.domain_folder import DomainFolder

SCORES = {
    "clip_score_knn": 0.4, "clip_score_knn_low": 0.375, "clip_score_knn_high": 0.4249, "clip_score_no_knn": 0.1,
    "clip_score_real": 0.5, "fd_knn": 0.02, "fd_no_knn": 0.13, "fd_real_split": 0.011, "copy_rate_knn": 0.125,
    "copy_rate_real": 0.05,
}  # fmt: skip
ABLATIONS = {
    name: {"clip_score": value, "clip_score_low": value - 0.01, "clip_score_high": value + 0.01, "fd": 0.1}
    for name, value in {"no_neighbours": 0.123, "query_both": 0.25, "k_4": 0.375}.items()
}


def solid_image(colour: str) -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


def make_view(name: str = "emoji", **changes: Any) -> EvaluationView:
    details = {"cosine": 0.987, "copy": True, "prompt": "a <b>red</b> heart", "row": 7, "url": "http://x/heart.png"}
    sheets = {"knn": Image.new("RGB", (64, 32), "blue"), "no_knn": Image.new("RGB", (64, 32), "green")}
    view = EvaluationView(
        name=name,
        samples=32,
        compared=32,
        threshold=0.9,
        scores=SCORES,
        ablations=ABLATIONS,
        swap={"emoji": 0.02, "animals": 0.3},
        sheets=sheets,
        shown=["a red heart", "a <green> frog"],
        copies=[
            (solid_image("red"), solid_image("orange"), details),
            (solid_image("red"), solid_image("pink"), {**details, "copy": False}),
        ],
    )
    return dataclasses.replace(view, **changes)


def test_table_has_one_row_per_measured_metric() -> None:
    lines = table(SCORES).splitlines()
    assert lines[0].split() == ["with", "neighbours", "without", "real", "images"]
    assert lines[1].split() == ["CLIP", "score", "↑", "0.400", "(0.375–0.425)", "0.100", "0.500"]
    assert lines[2].split() == ["Fréchet", "distance", "↓", "0.020", "0.130", "0.011"]
    assert [row[0] for row in score_rows(SCORES)] == ["CLIP score ↑", "Fréchet distance ↓", "copy rate ↓"]
    assert table_line(SCORES) == (
        "CLIP score 0.400 with neighbours, 0.100 without; Fréchet distance 0.020 and 0.130; 12.5% copies"
    )


def test_table_of_earlier_release_with_few_scores_is_rendered() -> None:
    old = {name: SCORES[name] for name in ("clip_score_knn", "clip_score_no_knn", "fd_knn", "fd_no_knn")}
    assert len(table(old).splitlines()) == 3
    assert "copies" not in table_line(old)


def test_aligned_and_markdown_format_columns() -> None:
    assert aligned([["", "ab"], ["long", "c"]]) == "       ab\nlong    c"
    assert markdown(["", "a"], [["x|y", "1"]]) == "|  | a |\n| --- | ---: |\n| x\\|y | 1 |"


def test_swap_rows_marks_nearest_domain_with_star() -> None:
    swap = {"a": {"a": 0.1, "b": 0.5}, "b": {"b": 0.25, "a": 0.2}}
    assert swap_rows(swap) == [["a", "0.100 *", "0.500"], ["b", "0.200 *", "0.250"]]
    wider = {"b": {"a": 0.2, "b": 0.25}}
    assert swap_heads(wider)[1:] == ["b", "a"]
    assert swap_rows(wider) == [["b", "0.250", "0.200 *"]]


def test_write_report_csv_contains_every_score(tmp_path: Path) -> None:
    write_report([make_view(), make_view("animals")], "a title", tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "evaluation.csv").read_text())))
    found = {(row["database"], row["condition"], row["metric"]): row for row in rows}
    assert len(found) == len(rows) == 2 * (8 + 3 * 2 + 2)
    numbers = [found["emoji", "knn", "clip_score"][name] for name in ("value", "low", "high")]
    assert numbers == ["0.4", "0.375", "0.4249"]
    assert found["animals", "real", "fd"]["value"] == "0.011"
    assert found["animals", "k_4", "clip_score"]["low"] == "0.365"
    assert found["emoji", "against animals", "fd"]["value"] == "0.3"


def test_write_report_page_is_self_contained_and_shows_every_image(tmp_path: Path) -> None:
    write_report([make_view()], "copies & <swaps>", tmp_path)
    page = (tmp_path / "evaluation.html").read_text()
    assert "<title>copies &amp; &lt;swaps&gt;</title>" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    inlined = [base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert inlined[0] == (tmp_path / "evaluation.png").read_bytes()
    colours = [Image.open(io.BytesIO(png)).getpixel((0, 0)) for png in inlined[1:]]
    assert colours == [(255, 0, 0), (255, 165, 0), (255, 0, 0), (255, 192, 203)]
    assert "a &lt;b&gt;red&lt;/b&gt; heart" in page
    assert "a red heart · a &lt;green&gt; frog" in page
    assert page.count('<b class="copy">') == 1
    assert all(cell in page for cell in ("0.400 (0.375–0.425)", "query: text and mean", "k = 4", "0.020 *"))


def test_write_report_page_escapes_captions_urls_and_names(tmp_path: Path) -> None:
    hostile = """</title></style><script>alert(1)</script><img src='x' onerror="alert(2)">"""
    sample, source, details = make_view().copies[0]
    copies = [(sample, source, {**details, "prompt": hostile, "url": url}) for url in ("javascript:alert(3)", hostile)]
    write_report([make_view(hostile, shown=[hostile], copies=copies, swap={hostile: 0.1})], hostile, tmp_path)
    page = Page((tmp_path / "evaluation.html").read_text())
    assert page.is_harmless()
    assert not page.all("a")
    assert "javascript:alert(3)" in page.text
    assert page.text.count(hostile) >= 9, "title, heading, tables, prompts and captions show it as text"
    assert len(page.images()) == 1 + 2 * len(copies)
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_write_report_figure_shows_samples_and_copies(tmp_path: Path) -> None:
    write_report([make_view(), make_view("animals")], "a title", tmp_path)
    with Image.open(tmp_path / "evaluation.png") as image:
        shown = np.asarray(image.convert("RGB"))
    for colour in ((0, 0, 255), (0, 128, 0), (255, 0, 0), (255, 165, 0), (255, 192, 203)):
        assert (shown == colour).all(axis=2).sum() > 1_000, colour
    smaller = preview(tmp_path / "evaluation.png", width=300)
    with Image.open(io.BytesIO(base64.b64decode(smaller.partition(",")[2]))) as image:
        assert image.width == 300
        assert image.height == pytest.approx(shown.shape[0] * 300 / shown.shape[1], abs=1)


def test_tables_heading_names_compared_images_and_source_of_queries() -> None:
    heads = [head for head, _, _ in tables([make_view(compared=20)])]
    assert heads[0] == (
        "Scores on emoji, 32 samples (distances, precision and recall use 20 of them and as many real images)"
    )
    assert tables([make_view()])[0][0] == "Scores on emoji, 32 samples"
    reconstruction = "Scores on emoji, 32 samples, queried with its own images, which retrieve themselves"
    assert tables([make_view(shown=["", ""])])[0][0].startswith(reconstruction)


@pytest.mark.parametrize("missing", [{"ablations": {}}, {"swap": {}}, {"ablations": {}, "swap": {}}, {"copies": []}])
def test_report_omits_parts_that_were_not_measured(missing: dict[str, Any], tmp_path: Path) -> None:
    full, reduced = plot_page([make_view()], "a title"), plot_page([make_view(**missing)], "a title")
    assert (reduced.get_figheight() < full.get_figheight()) == (len(missing) == 2)
    write_report([make_view(**missing)], "a title", tmp_path)
    text = (tmp_path / "evaluation.md").read_text()
    assert ("## Ablations" in text, "## Swap" in text) == ("ablations" not in missing, "swap" not in missing)


def commit_evaluation(base: Path) -> Evaluation:
    """Commit an evaluation in the form of the stage."""
    stage = artifacts.ArtifactBuilder(str(base), "evaluation", inputs={}, config={})
    local = base / "local"
    (local / "copies").mkdir(parents=True)
    for name, image in make_view().sheets.items():
        image.save(local / f"{name}.png")
    copies = []
    for rank, (sample, source, details) in enumerate(make_view().copies):
        sample.save(local / "copies" / f"{rank:02d}_sample.png")
        source.save(local / "copies" / f"{rank:02d}_source.png")
        copies.append(dict(details))
    info = {"scores": SCORES, "ablations": ABLATIONS, "swap": {}, "copies": copies, "copy_threshold": 0.9, "shown": []}
    shard = artifacts.commit_shard(stage.uri, SAMPLES, local, rows=32, info={})
    return Evaluation.of(stage.commit([shard], info=info), stage.uri)


def test_report_evaluations_skips_existing_report_and_fetch_returns_its_files(tmp_path: Path) -> None:
    evaluation = commit_evaluation(tmp_path)
    first, again = (
        report_evaluations({"emoji": evaluation}, DomainFolder(uri=str(tmp_path), cache=tmp_path), "a title")
        for _ in range(2)
    )
    assert (first.skipped, again.skipped, first.reference.rows) == (False, True, 1)
    assert Report.open(first.reference.uri) == again.reference
    (tmp_path / "out").mkdir()
    files = first.reference.fetch(tmp_path / "out", tmp_path)
    assert set(files) == {"evaluation.csv", "evaluation.md", "evaluation.png", "evaluation.html"}
    assert all(path.name == name and path.stat().st_size for name, path in files.items())
    other = report_evaluations({"emoji": evaluation}, DomainFolder(uri=str(tmp_path), cache=tmp_path), "another title")
    assert other.reference.uri != first.reference.uri
