"""An open version of a database, as the service uses it: search, rows, images, filters and takedowns."""

import dataclasses
import io
import threading
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infra import artifacts, logs, storage
from infra.download.images import shrink_to_fit
from infra.errors import InputError, KNNDiffusionError, NotFoundError
from infra.formats import tables
from model.retrieval.database import Database
from tasks.references.database import Metadata, open_database
from tasks.references.domain_folder import DomainFolder
from tasks.references.filter_expression import parse_where, referenced_columns
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.takedown import inherited_takedown, list_takedowns, match_shards
from tasks.references.types import DatabaseVersion, EmbeddingShards
from tasks.references.user_columns import UserColumns
from tasks.serve.load import stored_side_px
from tasks.serve.service.responses import Hit, ServedVersion
from tasks.serve.service.stored_images import StoredImages

_COLUMNS = ["key", "url", "sha256", "width", "height"]
_KEPT_FILTERS = 16
_KEPT_THUMBNAILS = 512
_KEPT_TABLES = 512
"""Shards whose URLs and columns are kept in memory: about 1 MB each."""
_PRELOADED_TARS = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Origin of the rows of an open version.

    ``images`` and ``columns`` are None if the image shards cannot be read.
    """

    version: DatabaseVersion
    embeddings: EmbeddingShards
    shards: tuple[artifacts.Shard, ...]
    lookup: Metadata
    images: StoredImages | None
    columns: UserColumns | None
    cache: Path
    side_px: int


class OpenDatabase:
    """An open version. A swap replaces it as a whole; only a takedown changes it, and only by hiding rows. Thread-safe.

    Attributes:
        name: Short name.
        version: Registered version, or None for a folder.
        generation: Number of swaps of the name before this version.
        has_images: True if generated images may start from stored ones.
        side_px: Longer side to which stored images were reduced.
    """

    def __init__(
        self, database: Database, *, name: str, version: int | None, generation: int = 0, source: Source | None = None
    ) -> None:
        """Wrap an open database. Without a ``source`` there are no filters, columns and takedowns."""
        self.name, self.version, self.generation = name, version, generation
        self.side_px = 512 if source is None else source.side_px
        self._database, self._source = database, source
        self._takedowns: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        # Caches of bound methods would be reference cycles: a replaced version would keep its memory and its files.
        self.matching = lru_cache(_KEPT_FILTERS)(partial(_matching, name, source))
        self._encoded = lru_cache(_KEPT_THUMBNAILS)(partial(_encode, database))
        self.hide_taken_down()
        self.has_images = self._database.has_images

    @classmethod
    def open(
        cls, version: DatabaseVersion, cache: Path, *, name: str, number: int | None, generation: int = 0
    ) -> "OpenDatabase":
        """Open and verify a version.

        Raises:
            IntegrityError: A file is missing or damaged.
            InputError: The embeddings have changed since the version was made.
        """
        embeddings = embeddings_of(version)
        manifest = embeddings.manifest()
        lookup = Metadata(embeddings.uri, manifest, cache, columns=["key", "url"], kept=_KEPT_TABLES)
        images: StoredImages | None = None
        columns: UserColumns | None = None
        try:
            shards = images_of(embeddings)
            images, columns = StoredImages(shards, cache), UserColumns(shards, cache, kept=_KEPT_TABLES)
        except KNNDiffusionError as error:  # a copy of a database may lack them; searches do not need them
            logs.get("serve").warning("%s is served without images: %s", name, error)
        source = Source(
            version=version,
            embeddings=embeddings,
            shards=manifest.shards,
            lookup=lookup,
            images=images,
            columns=columns,
            cache=cache,
            side_px=stored_side_px(version),
        )
        database = open_database(version, cache, name=name).with_descriptions(lookup)
        if images is not None:
            database = database.with_images(lambda ids: images(_places(lookup, ids)), errors=(KNNDiffusionError,))
        opened = cls(database, name=name, version=number, generation=generation, source=source)
        opened._preload()
        return opened

    @property
    def database(self) -> Database:
        """The database without the rows that were taken down until now."""
        return self._database

    @property
    def info(self) -> ServedVersion:
        """Name, version, rows and generation for a response."""
        return ServedVersion(name=self.name, version=self.version, rows=len(self._database), generation=self.generation)

    def is_hidden(self, row: int) -> bool:
        """Return True if no row has that id, or it may not be shown."""
        hidden = self._database.hidden
        place = int(np.searchsorted(hidden, row))
        return not 0 <= row < self._database.stored or (place < len(hidden) and int(hidden[place]) == row)

    def hits(self, found: Sequence[tuple[Sequence[int], Sequence[float]]]) -> list[list[Hit]]:
        """Return the hits of searches that found (ids, scores), best first, without hidden rows.

        A hit has metadata and the columns of the URL list. Those of all searches are looked up together.
        """
        hidden = {row for row in {int(row) for ids, _ in found for row in ids} if self.is_hidden(row)}
        shown = [[(row, score) for row, score in zip(*one, strict=True) if row not in hidden] for one in found]
        rows = list(dict.fromkeys(row for one in shown for row, _ in one))
        described = self._database.describe(rows)
        known = dict(zip(rows, zip(described, self._columns(described), strict=True), strict=True))
        return [[_hit(rank, score, *known[row]) for rank, (row, score) in enumerate(one, start=1)] for one in shown]

    def thumbnail(self, row: int, side_px: int) -> bytes:
        """Return a stored image as WebP. Raises ``NotFoundError`` for an unknown or hidden row."""
        if self.is_hidden(row):
            raise NotFoundError(f"database {self.name} has no row {row}; search again")
        return self._encoded(row, side_px)

    def hide_taken_down(self) -> bool:
        """Hide the rows of all takedowns of the domain, also of those that no registered version applies yet.

        Return True if there was a new takedown. Raises ``KNNDiffusionError`` if the takedowns cannot be read.
        """
        if self._source is None or self._source.version.uri.rsplit("/", 2)[-2:-1] != [DatabaseVersion.kind]:
            return False
        source = self._source
        folder = DomainFolder(uri=source.version.uri.rsplit("/", 2)[0], cache=source.cache)
        with self._lock:
            listed = frozenset(list_takedowns(folder))
            if listed <= self._takedowns:
                return False
            entries = inherited_takedown(source.version, source.cache)
            masks = match_shards(entries, source.embeddings, source.shards, source.cache)
            self._database = self._database.without(np.flatnonzero(np.concatenate(masks)))
            self._takedowns = listed
            return True

    def is_deleted(self) -> bool:
        """Return True if the files are no longer where they were opened. Open files remain readable."""
        uri = None if self._source is None else self._source.version.uri
        return uri is not None and not storage.exists(storage.join(uri, artifacts.MANIFEST))

    def _columns(self, described: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the columns of the URL list of described rows; empty where the image shard cannot be read."""
        own = None if self._source is None else self._source.columns
        if own is None or self._source is None:
            return [{} for _ in described]
        places = [(self._source.lookup.shard(record["id"]), record["key"]) for record in described]
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for shard in dict.fromkeys(name for name, _ in places):
            keys = list(dict.fromkeys(key for name, key in places if name == shard))
            try:
                found |= {(shard, key): row for key, row in zip(keys, own.rows(shard, keys), strict=True)}
            except KNNDiffusionError as error:
                logs.get("serve").warning("the columns of the URL list are not shown: %s", error)
        return [found.get(place, {}) for place in places]

    def _preload(self) -> None:
        """Read what is kept in memory, so that the first searches are fast, and a small database outlives its files."""
        assert self._source is not None, "open has a source"  # noqa: S101 - for the type checker
        first = 0
        for number, shard in enumerate(self._source.shards[:_KEPT_TABLES]):
            if shard.rows:
                self._columns([{"id": first, **record} for record in self._source.lookup([first])])
                if self.has_images and number < _PRELOADED_TARS:
                    self._database.images([first])
            first += shard.rows


def _hit(rank: int, score: float, record: dict[str, Any], columns: dict[str, Any]) -> Hit:
    """Return a described row as a hit."""
    url, key = record.get("url"), record.get("key")
    return Hit(id=record["id"], rank=rank, score=score, url=url, key=key, columns=columns)


def _matching(name: str, source: Source | None, where: str) -> NDArray[np.int64]:
    """Return the ids of the rows that match a filter, hidden ones included. Raises ``InputError``."""
    wanted = referenced_columns(where)
    if source is None or (wanted and source.columns is None):
        raise InputError(f"database {name} has no columns to filter by; remove the filter")
    own = source.columns if wanted else None
    types = own.types() if own is not None else {}
    row_filter = parse_where(where, types)

    def match(shard: artifacts.Shard) -> NDArray[np.bool_]:
        path = artifacts.fetch_shard(source.embeddings.uri, shard, ".parquet", source.cache)
        table = tables.read_table(path, _COLUMNS)
        if own is not None:
            added = own.table(shard.name, table["key"].to_pylist(), types)
            table = pa.table([*table.columns, *added.columns], names=[*_COLUMNS, *added.column_names])
        return row_filter.mask(table)

    masks = list(storage.read_all(match, source.shards))
    return np.flatnonzero(np.concatenate(masks)) if masks else np.empty(0, np.int64)


def _encode(database: Database, row: int, side_px: int) -> bytes:
    """Return a stored image as WebP."""
    (image,) = database.images([row])
    buffer = io.BytesIO()
    shrink_to_fit(image, side_px).save(buffer, format="WEBP", quality=85)
    return buffer.getvalue()


def _places(lookup: Metadata, ids: Sequence[int]) -> list[tuple[str, str]]:
    return [(lookup.shard(row), record["key"]) for row, record in zip(ids, lookup(ids), strict=True)]
