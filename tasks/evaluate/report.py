"""Report of evaluations: one table (CSV, Markdown), one figure (PNG) and one self-contained HTML page."""

import base64
import dataclasses
import html
import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from PIL import Image

from infra import artifacts, storage
from tasks.evaluate.config import SAMPLES
from tasks.evaluate.figure import SHEET_COLUMNS, SHEET_ROWS, EvaluationView, plot_page
from tasks.evaluate.tables import (
    CONDITIONS,
    ablation_heads,
    ablation_rows,
    markdown,
    score_rows,
    swap_heads,
    swap_rows,
    to_csv,
)
from tasks.evaluate.task import Evaluation
from tasks.references.domain_folder import DomainFolder
from tasks.references.types import Reference, StageResult
from tasks.stage import run_stage, stage_task

TABLE, MARKDOWN, FIGURE, PAGE = "evaluation.csv", "evaluation.md", "evaluation.png", "evaluation.html"
_SHARD = "report"
_DPI = 150
_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #191c21; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .6rem 0 1.6rem; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #e3e6ea; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { color: #6e747d; font-weight: 600 }
img.page { width: 100% } .wide { overflow-x: auto }
.copies { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 1rem }
.copies figure { margin: 0 } .copies img { width: 84px; height: 84px; object-fit: contain; image-rendering: auto }
figcaption { font-size: 12.5px; color: #6e747d; overflow-wrap: anywhere } .copy { color: #b3261e }
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report(Reference):
    """Report artifact: ``evaluation.csv``, ``.md``, ``.png`` and ``.html``. ``rows`` is the number of databases."""

    kind: ClassVar[str] = "report"

    def fetch(self, folder: Path, cache: Path) -> dict[str, Path]:
        """Copy the verified files to ``folder`` and return them by name. Raises ``IntegrityError``."""
        for file in self.manifest().files:
            shutil.copyfile(artifacts.fetch_file(self.uri, file, cache), folder / file.name)
        return {file.name: folder / file.name for file in self.manifest().files}


@stage_task(name="report")
def report_evaluations(evaluations: Mapping[str, Evaluation], folder: DomainFolder, title: str) -> StageResult[Report]:
    """Write a report of the evaluations of one generator, by database, to ``<folder>/report/<key>``."""
    inputs = {name: evaluation.as_input() for name, evaluation in evaluations.items()}
    stage = artifacts.ArtifactBuilder(folder.uri, Report.kind, inputs=inputs, config={"title": title})

    def make() -> artifacts.Manifest:
        views = [load_view(name, evaluation, folder.cache) for name, evaluation in evaluations.items()]
        with storage.scratch() as scratch:
            write_report(views, title, scratch)
            return stage.commit([artifacts.commit_shard(stage.uri, _SHARD, scratch, rows=len(views), info={})], info={})

    return run_stage(stage, Report, make)


def load_view(name: str, evaluation: Evaluation, cache: Path) -> EvaluationView:
    """Load an evaluation with its images, fetched and verified."""
    manifest = evaluation.manifest()
    (shard,) = (shard for shard in manifest.shards if shard.name == SAMPLES)
    images = {
        file.name: _image(artifacts.fetch_file(evaluation.uri, file, cache))
        for file in shard.files
        if file.name.endswith(".png")
    }
    copies = [
        (images[f"copies/{rank:02d}_sample.png"], images[f"copies/{rank:02d}_source.png"], details)
        for rank, details in enumerate(manifest.info["copies"])
    ]
    return EvaluationView(
        name=name,
        samples=manifest.rows,
        compared=manifest.info.get("compared", manifest.rows),
        threshold=manifest.info["copy_threshold"],
        scores=evaluation.scores(),
        ablations=evaluation.ablations(),
        swap=evaluation.swap(),
        sheets={condition: images[f"{condition}.png"] for condition in ("knn", "no_knn")},
        shown=manifest.info["shown"],
        copies=copies,
    )


def write_report(views: Sequence[EvaluationView], title: str, folder: Path) -> None:
    """Write the four report files to ``folder``."""
    (folder / TABLE).write_text(to_csv({e.name: (e.scores, e.ablations, e.swap) for e in views}))
    sections = tables(views)
    parts = [f"# {title}", *(f"## {head}\n\n{markdown(heads, rows)}" for head, heads, rows in sections)]
    (folder / MARKDOWN).write_text("\n\n".join(parts) + "\n")
    plot_page(views, title).savefig(folder / FIGURE, dpi=_DPI, metadata={"Software": None})
    (folder / PAGE).write_text(_page(views, title, sections, folder / FIGURE))


def preview(figure: Path, width: int = 1100) -> str:
    """Return the figure scaled to ``width`` px as a JPEG data URI, small enough for a database row."""
    buffer = io.BytesIO()
    with Image.open(figure) as image:
        image.convert("RGB").resize((width, round(image.height * width / image.width))).save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tables(views: Sequence[EvaluationView]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (title, column headings, rows) of every table: scores, ablations, the swap matrix."""
    found = []
    for view in views:
        samples = f"{view.name}, {view.samples} samples"
        if not any(view.shown):
            samples += (
                ", queried with its own images; each retrieves itself: CLIP score and copies measure reconstruction"
            )
        if view.compared < view.samples:
            samples += f" (distances, precision and recall: {view.compared} of them and as many real images)"
        found.append((f"Scores on {samples}", ["", *CONDITIONS.values()], score_rows(view.scores)))
        if view.ablations:
            found.append((f"Ablations on {samples}", ablation_heads(view.ablations), ablation_rows(view.ablations)))
    swap = {view.name: view.swap for view in views if view.swap}
    if swap:
        found.append(("Swap matrix: Fréchet distance (* marks the nearest domain)", swap_heads(swap), swap_rows(swap)))
    return found


def _page(
    views: Sequence[EvaluationView],
    title: str,
    sections: Sequence[tuple[str, list[str], list[list[str]]]],
    figure: Path,
) -> str:
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        "<p>Intervals are 95% bootstrap intervals. Samples of one prompt are resampled together. A rate of exactly 0 "
        "or 1 has no interval. Arrows show the better direction.</p>",
        "<p>Real images are compared with as many other images of their domain if there are enough. They have a CLIP "
        "score if the config names the image that each prompt describes (prompt_urls).</p>",
        *(f"<h2>{html.escape(head)}</h2>{_html_table(heads, rows)}" for head, heads, rows in sections),
        f'<h2>Figure</h2><img class="page" alt="All results as one figure" src="{_inline(figure.read_bytes())}">',
    ]
    for view in views:
        prompts = [prompt for prompt in view.shown[: SHEET_COLUMNS * SHEET_ROWS] if prompt]
        parts.append(f"<h2>Prompts shown: {html.escape(view.name)}</h2><p>{html.escape(' · '.join(prompts))}</p>")
        parts.append(f"<h2>Samples closest to a stored image: {html.escape(view.name)}</h2>")
        parts.append(f"<p>A sample with a cosine above {view.threshold:.3f} counts as a copy.</p>")
        parts.append(f'<div class="copies">{"".join(_copy(*copied) for copied in view.copies)}</div>')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    lines = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _copy(sample: Image.Image, source: Image.Image, details: Mapping[str, object]) -> str:
    images = "".join(
        f'<img alt="{alt}" src="{_inline(_png(p))}">' for alt, p in (("sample", sample), ("stored", source))
    )
    verdict = '<b class="copy">copy</b> · ' if details["copy"] else ""
    caption = html.escape(
        f"cosine {details['cosine']:.3f} · {details['prompt'] or 'no prompt'} · row {details['row']} {details['url']}"
    )
    return f"<figure>{images}<figcaption>{verdict}{caption}</figcaption></figure>"


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
