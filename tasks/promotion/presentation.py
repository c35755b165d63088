"""Presentation of versions and promotion decisions in MLflow: descriptions, metrics, figures and pages."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from infra.artifacts import Manifest
from infra.promotions import Decision
from infra.registration import Presentation
from tasks import pages
from tasks.promotion.database_gates import failed_share
from tasks.references.types import DatabaseVersion, encoder_of

_EXAMPLE = pd.DataFrame({"prompt": ["a red heart"]})
_SCORES = ("clip_score_knn", "clip_score_no_knn", "fd_knn", "copy_rate_knn")


def database_presentation(
    version: DatabaseVersion, cache: Path, seconds: Mapping[str, float] | None = None
) -> Presentation:
    """Return the presentation of a database: rows, recall, failed downloads, index, folder, and seconds by stage."""
    manifest = version.manifest()
    info = manifest.info
    metrics = {"rows": float(manifest.rows - info["hidden"]), "hidden": float(info["hidden"])}
    for query in ("image", "text"):
        if info[f"recall_at_10_{query}"] is not None:  # None if there were no queries to measure it
            metrics[f"recall_at_10_{query}"] = float(info[f"recall_at_10_{query}"])
    if (share := failed_share(version)) is not None:
        metrics["failed_downloads"] = share
    facts = {name.replace("_", " "): f"{value:g}" for name, value in metrics.items()}
    facts |= {"index": info["factory"], "encoder": encoder_of(manifest).name, "folder": version.uri}
    metrics |= {f"seconds_{stage}": value for stage, value in (seconds or {}).items()}

    def figures(folder: Path) -> Sequence[Path]:
        from tasks.promotion.figures import database_figures  # imports torch

        return database_figures(version, folder, cache)

    return _presentation("Database of image embeddings.", facts, metrics, figures)


def generator_presentation(
    manifest: Manifest, database_uri: str, scores: Mapping[str, float], sheet: Path | None = None
) -> Presentation:
    """Return the presentation of a generator: its scores, default database and sample sheet.

    It has no metrics, because the training run has them already.
    """
    facts = {name.replace("_", " "): f"{scores[name]:.4f}" for name in _SCORES if name in scores}
    facts |= {"training images": str(manifest.rows), "default database": database_uri}
    return _presentation(
        "Generator of images from a prompt and its neighbours.",
        facts,
        {},
        lambda folder: () if sheet is None else (sheet,),
    )


def decision_page(decision: Decision) -> str:
    """Return a decision as a self-contained HTML page."""
    return pages.render(
        "decision.html.j2",
        title=f"{decision.name}, version {decision.version}: {decision.outcome}",
        facts={
            "Champion before": decision.before or "none",
            "Champion after": decision.after or "none",
            "Requested by": decision.requester,
            "Forced": "yes" if decision.force else "no",
            "Reason": decision.reason or "not given",
        },
        gates=decision.gates,
    )


def _presentation(
    title: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, float],
    figures: Callable[[Path], Sequence[Path]],
) -> Presentation:
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return Presentation(
        description=f"{title}\n\n| | |\n| --- | --- |\n{rows}\n",
        input_example=_EXAMPLE,
        metrics=metrics,
        figures=figures,
    )
