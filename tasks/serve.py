"""Serve: from names to things that answer. What a user of the registry calls, and what the commands are made of."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infra.errors import InputError
from infra.registry import GENERATOR_NAME, Registry
from infra.settings import Settings
from model.clip import encoder_for
from model.pipeline import KNNDiffusionPipeline, pretrained_folder
from model.retrieval.database import Database
from tasks.contracts import DatabaseVersion, Generator
from tasks.databases import open_database
from tasks.fetch import fetch_pictures
from tasks.train import PIPELINE, generator_folder

DEFAULT_MODEL = GENERATOR_NAME


def pull_database(reference: str, settings: Settings) -> Database:
    """The open database that ``reference`` (MLflow URI, short name or folder) names.

    Raises ``NotFoundError`` listing what there is, and ``IntegrityError`` for damaged files.
    """
    pulled = Registry(settings).pull(reference, kind="database")
    version = DatabaseVersion.of(pulled.manifest, pulled.folder_uri)
    return open_database(version, settings.cache_folder)


def search_text(reference: str, query: str, k: int, settings: Settings) -> list[dict[str, Any]]:
    """The ``k`` nearest rows of a text as {rank, score, id, key, url, …}, best first."""
    if not query.strip():
        raise InputError("the query is empty; write what to look for")
    database = pull_database(reference, settings)
    hits = database.search(encoder_for(database.encoder).embed_texts([query]).numpy(), k)
    found = hits.ids[0] >= 0
    rows = database.describe(hits.ids[0, found].tolist())
    return [
        {"rank": rank, "score": float(score), **row}
        for rank, (score, row) in enumerate(zip(hits.scores[0, found], rows, strict=True), start=1)
    ]


def open_pipeline(model: str, database: str, settings: Settings) -> KNNDiffusionPipeline:
    """A pipeline of the generator and the database named. Raises ``ModelError`` when their encoders differ."""
    plain = pretrained_folder(model)
    if (plain / "model_index.json").exists():  # the embedded one, or what save_pretrained wrote
        return KNNDiffusionPipeline.open(plain, pull_database(database, settings))
    pulled = Registry(settings).pull(model, kind="generator")
    if pulled.local is not None:
        folder = pulled.local / "artifacts" / PIPELINE
    else:
        folder = generator_folder(Generator.of(pulled.manifest, pulled.folder_uri), settings.cache_folder)
    return KNNDiffusionPipeline.open(folder, pull_database(database, settings))


def stored_pictures(reference: str, ids: NDArray[np.int64], settings: Settings) -> list[list[Image.Image]]:
    """The pictures behind rows (Q, K) of a database, read from its image shards."""
    pulled = Registry(settings).pull(reference, kind="database")
    version = DatabaseVersion.of(pulled.manifest, pulled.folder_uri)
    pictures = iter(fetch_pictures(version, ids.reshape(-1).tolist(), settings.cache_folder))
    return [[next(pictures) for _ in rows] for rows in ids]
