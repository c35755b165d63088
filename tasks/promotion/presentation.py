"""Descriptions, input examples and metrics that MLflow shows of registered versions."""

from collections.abc import Mapping

import pandas as pd

from infra.artifacts import Manifest
from infra.registry import Presentation

_EXAMPLE = pd.DataFrame({"prompt": ["a red heart"]})
_SCORES = ("clip_score_knn", "clip_score_no_knn", "fd_knn", "copy_rate_knn")


def database_presentation(manifest: Manifest, folder_uri: str) -> Presentation:
    """Return the presentation of a database: rows, recall, index and folder."""
    info = manifest.info
    metrics = {"rows": float(manifest.rows - info["hidden"]), "hidden": float(info["hidden"])}
    for query in ("image", "text"):
        if info[f"recall_at_10_{query}"] is not None:  # None if there were no queries to measure it
            metrics[f"recall_at_10_{query}"] = float(info[f"recall_at_10_{query}"])
    facts = {name.replace("_", " "): f"{value:g}" for name, value in metrics.items()}
    return _presentation(
        "Database of image embeddings.", {**facts, "index": info["factory"], "folder": folder_uri}, metrics
    )


def generator_presentation(manifest: Manifest, database_uri: str, scores: Mapping[str, float]) -> Presentation:
    """Return the presentation of a generator: its scores and default database. The run has the metrics already."""
    facts = {name.replace("_", " "): f"{scores[name]:.4f}" for name in _SCORES if name in scores}
    facts |= {"training images": str(manifest.rows), "default database": database_uri}
    return _presentation("Generator of images from a prompt and its neighbours.", facts, {})


def _presentation(title: str, facts: Mapping[str, str], metrics: Mapping[str, float]) -> Presentation:
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return Presentation(
        description=f"{title}\n\n| | |\n| --- | --- |\n{rows}\n", input_example=_EXAMPLE, metrics=metrics
    )
