"""Serve: from names to things that answer. What a user of the registry calls, and what the commands are made of."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infra.download.images import to_rgb
from infra.errors import InputError
from infra.registry import Registry
from infra.settings import Settings
from model.encoder.clip import encoder_for
from model.pipeline import KNNDiffusionPipeline
from model.retrieval.database import Database
from model.saved_generator import pretrained_folder
from tasks.references.database import open_database
from tasks.references.images import fetch_pictures
from tasks.references.types import DatabaseVersion, Generator
from tasks.train.task import PIPELINE, generator_folder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a search found: the version that was searched, its name, and its nearest rows, best first.

    A row is {rank, score, id, key, url, …}; ``score`` is the cosine to the query.
    """

    version: DatabaseVersion
    name: str
    rows: list[dict[str, Any]]


def pull_database(reference: str, settings: Settings) -> Database:
    """The open database that ``reference`` (MLflow URI, short name or folder) names.

    Raises ``NotFoundError`` listing what there is, and ``IntegrityError`` for damaged files.
    """
    version, _ = _pull_version(reference, settings)
    return open_database(version, settings.cache_folder)


def search_database(reference: str, query: str | Image.Image, k: int, settings: Settings) -> Found:
    """The ``k`` nearest rows of a text or a picture, in the database named.

    Raises ``InputError`` for an empty text, ``NotFoundError`` and ``IntegrityError`` as :func:`pull_database`.
    """
    if isinstance(query, str) and not query.strip():
        raise InputError("the query is empty; write what to look for")
    version, name = _pull_version(reference, settings)
    database = open_database(version, settings.cache_folder)
    encoder = encoder_for(database.encoder)
    # As the pictures of the database were made when they were downloaded: 8 bit, on white.
    embedded = encoder.embed_texts([query]) if isinstance(query, str) else encoder.embed_images([to_rgb(query)])
    hits = database.search(embedded.numpy(), k)
    found = hits.ids[0] >= 0
    described = database.describe(hits.ids[0, found].tolist())
    rows = [
        {"rank": rank, "score": float(score), **row}
        for rank, (score, row) in enumerate(zip(hits.scores[0, found], described, strict=True), start=1)
    ]
    return Found(version=version, name=name, rows=rows)


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
    version, _ = _pull_version(reference, settings)
    pictures = iter(fetch_pictures(version, ids.reshape(-1).tolist(), settings.cache_folder))
    return [[next(pictures) for _ in rows] for rows in ids]


def _pull_version(reference: str, settings: Settings) -> tuple[DatabaseVersion, str]:
    """The version that ``reference`` names, and what it is called: models:/NAME/VERSION, or its folder."""
    pulled = Registry(settings).pull(reference, kind="database")
    version = DatabaseVersion.of(pulled.manifest, pulled.folder_uri)
    return version, pulled.folder_uri if pulled.name is None else f"models:/{pulled.name}/{pulled.version}"
