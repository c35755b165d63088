"""Report of evaluations: one table (CSV, Markdown), one figure (PNG) and one self-contained HTML page."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from PIL import Image

from infra import artifacts, storage
from tasks import pages
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
    page = pages.render(
        "report.html.j2",
        title=title,
        tables=sections,
        figure=pages.data_url((folder / FIGURE).read_bytes()),
        views=views,
        most_prompts=SHEET_COLUMNS * SHEET_ROWS,
    )
    (folder / PAGE).write_text(page)


def tables(views: Sequence[EvaluationView]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (title, column headings, rows) of every table: scores, ablations, the swap matrix."""
    found = []
    for view in views:
        samples = f"{view.name}, {view.samples} samples"
        if not any(view.shown):
            samples += (
                ", queried with its own images, which retrieve themselves: CLIP score and copies measure reconstruction"
            )
        if view.compared < view.samples:
            samples += f" (distances, precision and recall use {view.compared} of them and as many real images)"
        found.append((f"Scores on {samples}", ["", *CONDITIONS.values()], score_rows(view.scores)))
        if view.ablations:
            found.append((f"Ablations on {samples}", ablation_heads(view.ablations), ablation_rows(view.ablations)))
    swap = {view.name: view.swap for view in views if view.swap}
    if swap:
        found.append(("Swap matrix: Fréchet distance (* marks the nearest domain)", swap_heads(swap), swap_rows(swap)))
    return found


def _image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
