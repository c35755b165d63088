"""Load databases and generators by name, and search databases. The CLI commands use these functions."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infra import logs
from infra.download.downloader import DownloadPolicy
from infra.download.images import as_stored
from infra.errors import InputError, IntegrityError, KNNDiffusionError, NotFoundError
from infra.registry import PulledVersion
from infra.settings import Settings
from model.encoder.clip import encoder_for
from model.retrieval.database import Database
from model.saved_generator import pretrained_folder
from tasks.references.database import Metadata, open_database
from tasks.references.generator import PIPELINE, generator_folder
from tasks.references.images import fetch_images, with_stored_images
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.trust import open_named, saved_pipeline
from tasks.references.types import DatabaseVersion, Generator
from tasks.references.user_columns import UserColumns

if TYPE_CHECKING:  # a search needs no diffusers, which takes seconds to import
    from model.pipeline import KNNDiffusionPipeline


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """Result of a search: the version that was searched, its name, and the nearest rows, best first.

    A row is {rank, score, id, key, url, …}; ``score`` is the cosine to the query. ``columns`` holds the columns of the
    URL list, if it had any.
    """

    version: DatabaseVersion
    name: str
    rows: list[dict[str, Any]]


def load_database(reference: str, settings: Settings, *, trust: bool = False) -> Database:
    """Open a database by name.

    Args:
        reference: MLflow URI, short name or folder.
        settings: Root, registry and cache.
        trust: Treat a folder outside of the root like one below it; see SECURITY.md. Default: False.

    Raises:
        NotFoundError: There is no such database; the message lists those that exist.
        IntegrityError: A file is damaged.
        InputError: The folder is outside of the root, and needs ``trust``.
    """
    version, _ = _pull_version(reference, settings, trust)
    database = open_database(version, settings.cache_folder)
    return with_stored_images(database, version, settings.cache_folder)


def search_database(
    reference: str, query: str | Image.Image, k: int, settings: Settings, *, trust: bool = False, device: str = "cpu"
) -> SearchResult:
    """Return the ``k`` nearest rows of a text or image in the database that ``reference`` names.

    The encoder runs on ``device``, the search on the CPU.

    Raises:
        InputError: The text is empty, or as for :func:`load_database`.
        NotFoundError: As for :func:`load_database`.
        IntegrityError: As for :func:`load_database`.
    """
    if isinstance(query, str) and not query.strip():
        raise InputError("the query is empty; give a text to search for")
    version, name = _pull_version(reference, settings, trust)
    database = open_database(version, settings.cache_folder)
    encoder = encoder_for(database.encoder, device=device)
    if isinstance(query, str):
        embedded = encoder.embed_texts([query])
    else:
        embedded = encoder.embed_images([as_stored(query, stored_side_px(version))])
    hits = database.search(embedded.numpy(), k)
    found = hits.ids[0] >= 0
    described = database.describe(hits.ids[0, found].tolist())
    own = user_columns_of(version, described, settings.cache_folder)
    rows = [
        {"rank": rank, "score": float(score), **row, **({"columns": columns} if columns else {})}
        for rank, (score, row, columns) in enumerate(zip(hits.scores[0, found], described, own, strict=True), start=1)
    ]
    return SearchResult(version=version, name=name, rows=rows)


def user_columns_of(version: DatabaseVersion, rows: Sequence[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    """Return the user's columns of described rows. They are empty if the image shards cannot be read."""
    try:
        embeddings = embeddings_of(version)
        lookup = Metadata(embeddings.uri, embeddings.manifest(), cache)
        own = UserColumns(images_of(embeddings), cache)
        places = [(lookup.shard(row["id"]), row["key"]) for row in rows]
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for shard in dict.fromkeys(name for name, _ in places):
            keys = list(dict.fromkeys(key for name, key in places if name == shard))
            found |= {(shard, key): row for key, row in zip(keys, own.rows(shard, keys), strict=True)}
    except KNNDiffusionError as error:  # they may be deleted, or outside of an untrusted database's root
        logs.get("search").warning("the columns of the URL list are not shown: %s", error)
        return [{} for _ in rows]
    return [found[place] for place in places]


def load_pipeline(
    model: str, database: str, settings: Settings | None = None, *, trust: bool = False
) -> "KNNDiffusionPipeline":
    """Load a generator together with a database.

    Args:
        model: Short name, ``models:/`` URI or folder of a generator, or the name of a bundled one.
        database: Short name, ``models:/`` URI or folder of a database.
        settings: Root, registry and cache. Default: read from the environment.
        trust: As for :func:`load_database`. Default: False.

    Raises:
        ModelError: The encoders of generator and database differ.
        InputError: A folder is outside of the root, and needs ``trust``.
        NotFoundError: As for :func:`load_database`.
        IntegrityError: As for :func:`load_database`.
    """
    from model.pipeline import KNNDiffusionPipeline

    settings = settings or Settings()
    generator, folder, _ = locate_generator(model, settings, trust=trust)
    pipeline = KNNDiffusionPipeline.open(folder, load_database(database, settings, trust=trust))
    generator.require_known(pipeline.identity)
    return pipeline


def locate_generator(
    model: str, settings: Settings, *, trust: bool = False
) -> tuple[Generator, Path, PulledVersion | None]:
    """Return a generator by name, the local folder of its pipeline, and its registered version if it has one.

    Raises as :func:`load_pipeline`.
    """
    plain = pretrained_folder(model)
    if (plain / "model_index.json").exists():  # a bundled generator, or a folder written by save_pretrained
        return saved_pipeline(model, "", settings, trust=trust), plain, None
    generator, pulled = open_named(Generator, model, settings, trust=trust)
    if pulled.local is not None:
        return generator, pulled.local / "artifacts" / PIPELINE, pulled
    return generator, generator_folder(generator, settings.cache_folder), pulled


def images_of_rows(reference: str, ids: NDArray[np.int64], settings: Settings) -> list[list[Image.Image]]:
    """Return the images of rows ``ids`` (Q, K) int64 of the database that ``reference`` names."""
    version, _ = _pull_version(reference, settings)
    images = iter(fetch_images(version, ids.reshape(-1).tolist(), settings.cache_folder))
    return [[next(images) for _ in rows] for rows in ids]


def stored_side_px(version: DatabaseVersion) -> int:
    """Return the longer side to which the images of a database were reduced, or the default if that is unknown."""
    default = DownloadPolicy().max_side_px
    try:
        config = images_of(embeddings_of(version)).manifest().config
    except (InputError, IntegrityError, NotFoundError):  # a search does not need the images
        return default
    side_px = config.get("policy", {}).get("max_side_px")  # a merged database has none
    return side_px if isinstance(side_px, int) and side_px > 0 else default


def _pull_version(reference: str, settings: Settings, trust: bool = False) -> tuple[DatabaseVersion, str]:
    """Return the version that ``reference`` names, and its name: models:/NAME/VERSION, or its folder."""
    version, pulled = open_named(DatabaseVersion, reference, settings, trust=trust)
    return version, pulled.folder_uri if pulled.name is None else f"models:/{pulled.name}/{pulled.version}"
