"""Figures of a database for its pages in MLflow and Prefect: the recall curve and a sheet of sample images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from infra import logs, storage
from infra.errors import KNNDiffusionError
from model.images import image_grid
from tasks.index.tuning import CURVE
from tasks.references.database import HIDDEN, hidden_ids
from tasks.references.images import fetch_images
from tasks.references.lineage import embeddings_of
from tasks.references.types import DatabaseVersion

SHEET = "samples.jpg"
_COLUMNS, _ROWS = 8, 3
_SIDE_PX = 96
_SHARDS = 2
"""Number of image shards that are read for the sheet. A shard may have gigabytes."""


def database_figures(version: DatabaseVersion, folder: Path, cache: Path) -> Sequence[Path]:
    """Write the recall curve and the sheet of samples to ``folder``, and return their paths.

    A figure that cannot be made is left out, with a warning: it must not prevent a registration.
    """
    written = []
    for name, render in ((CURVE, _curve), (SHEET, _sheet)):
        try:
            if data := render(version, cache):
                (folder / name).write_bytes(data)
                written.append(folder / name)
        except (KNNDiffusionError, OSError) as error:
            logs.get("stage").warning("%-11s the page has no %s: %s", "register", name, error)
    return written


def _curve(version: DatabaseVersion, cache: Path) -> bytes | None:
    """Return the recall curve, or None for a pushed database, which has no copy of it."""
    uri = storage.join(version.uri, CURVE)
    return storage.read_bytes(uri) if storage.exists(uri) else None


def _sheet(version: DatabaseVersion, cache: Path) -> bytes | None:
    """Return a JPEG of visible images, evenly spaced over a few shards, or None if all of them are hidden."""
    ids = _sample_ids(version, cache)
    if not ids:
        return None
    with storage.scratch() as scratch:
        images = [
            ImageOps.pad(image, (_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS, color="white")
            for image in fetch_images(version, ids, cache)
        ]
        image_grid(images, columns=_COLUMNS).save(scratch / SHEET, "JPEG", quality=85)
        return (scratch / SHEET).read_bytes()


def _sample_ids(version: DatabaseVersion, cache: Path) -> list[int]:
    manifest = version.manifest()
    (shard,) = (one for one in manifest.shards if one.name == HIDDEN)
    hidden = hidden_ids(version.uri, shard, cache)
    sizes = [one.rows for one in embeddings_of(version).manifest().shards]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    chosen = np.unique(np.linspace(0, len(sizes) - 1, min(_SHARDS, len(sizes))).astype(int))
    rows = np.concatenate([np.arange(starts[number], starts[number + 1]) for number in chosen])
    shown = np.setdiff1d(rows, hidden)
    picked = np.unique(np.linspace(0, len(shown) - 1, min(_COLUMNS * _ROWS, len(shown))).astype(int))
    return [int(row) for row in shown[picked]]
