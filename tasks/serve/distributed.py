"""Distributed databases: Ray actors hold a database that is too large for one machine.

Every actor opens consecutive index shards as a database of its own. A search queries all actors in parallel and merges
their results. A machine fetches only the shards of its actors. The interface is that of a local database.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infra import artifacts, compute
from infra.errors import InputError, KNNDiffusionError
from model.encoder.identity import EncoderIdentity
from model.errors import ModelError
from model.retrieval.arguments import checked_count, checked_exclusion, checked_ids, checked_queries, checked_rows
from model.retrieval.searchable import Hits, NearestIds, Searchable
from tasks.references.database import Metadata, index_shards, open_part
from tasks.references.images import fetch_images
from tasks.references.lineage import embeddings_of
from tasks.references.types import DatabaseVersion, domain_of, encoder_of


@contextmanager
def distributed_database(
    version: DatabaseVersion, cache: Path, *, actors: int, cpus_each: float = 1
) -> Iterator["DistributedDatabase"]:
    """Open a version on ``actors`` workers, at most one per index shard. Call it inside :func:`compute.cluster`.

    Raises:
        InputError: ``actors`` is below 1.
        StageError: The cluster has too few resources for the actors.
    """
    if actors < 1:
        raise InputError(f"too few actors: {actors}; give at least 1")
    parts = _balanced(index_shards(version), actors)
    with compute.actor_group(_Part, [(version, part, cache) for part in parts], cpus_each=cpus_each) as placed:
        yield DistributedDatabase(version, parts, placed, cache)


class DistributedDatabase(Searchable):
    """Database on Ray actors, with the search interface of a local one."""

    def __init__(
        self,
        version: DatabaseVersion,
        parts: Sequence[Sequence[artifacts.Shard]],
        placed: compute.ActorGroup,
        cache: Path,
    ) -> None:
        """Use the actors of ``placed``, which hold ``parts`` in row order."""
        manifest, embeddings = version.manifest(), embeddings_of(version)
        self.name = domain_of(version)
        self.encoder: EncoderIdentity = encoder_of(manifest)
        self._placed, self._rows = placed, manifest.rows - int(manifest.info["hidden"])
        if self._rows < 1:
            raise ModelError(
                f"database {self.name} is empty: all rows of {version.uri} are hidden; use a version with visible rows"
            )
        self._starts = np.cumsum([0, *(sum(shard.rows for shard in part) for part in parts)])
        self._metadata = Metadata(embeddings.uri, embeddings.manifest(), cache)
        self._version, self._cache = version, cache

    def __len__(self) -> int:
        """Return the number of rows that a search may return."""
        return self._rows

    @property
    def stored(self) -> int:
        """Number of rows over all actors, including hidden ones; all ids are below it."""
        return int(self._starts[-1])

    def search(self, queries: NDArray[Any], k: int, *, exclude: NDArray[np.int64] | None = None) -> Hits:
        """Return the ``k`` nearest rows of each query; see :meth:`model.retrieval.database.Database.search`."""
        k, queries, excluded = checked_count(k), checked_queries(queries, self.name, self.encoder), None
        width = max(1, min(k, len(self) - (exclude is not None)))
        if exclude is not None:
            excluded = self.rows(checked_exclusion(exclude, len(queries), self.stored, self.name))
        partial: list[Hits] = self._placed.call(("search", (queries, width, excluded)))
        shifted = [
            np.where(hits.ids < 0, -1, hits.ids + first) for hits, first in zip(partial, self._starts[:-1], strict=True)
        ]
        scores, ids = np.concatenate([hits.scores for hits in partial], axis=1), np.concatenate(shifted, axis=1)
        order = np.lexsort((ids, -scores), axis=1)[:, :width]
        pick = np.arange(len(ids))[:, None], order
        embeddings = np.concatenate([hits.embeddings for hits in partial], axis=1)
        return Hits(scores=scores[pick], ids=ids[pick], embeddings=embeddings[pick])

    def nearest(self, queries: NDArray[Any], k: int, *, exclude: NDArray[np.int64] | None = None) -> NearestIds:
        """Return the scores and ids of :meth:`search`, without the embeddings."""
        found = self.search(queries, k, exclude=exclude)
        return NearestIds(scores=found.scores, ids=found.ids)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """Return the stored rows (*ids.shape, D) float16 of global ids, read from the actors that hold them."""
        flat = checked_ids(ids, self.stored, self.name).reshape(-1)
        actor_of_row = np.searchsorted(self._starts, flat, side="right") - 1
        found = np.empty((len(flat), self.encoder.dimension), dtype=np.float16)
        for number in np.unique(actor_of_row):
            mask = actor_of_row == number
            (found[mask],) = self._placed.call(("rows", (flat[mask] - self._starts[number],)), of=int(number))
        return found.reshape(*np.shape(ids), -1)

    def describe(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Return the metadata (key, url, …) of rows; see :meth:`model.retrieval.database.Database.describe`."""
        rows = checked_rows(ids, self.stored, self.name)
        return [{"id": row, **metadata} for row, metadata in zip(rows, self._metadata(rows), strict=True)]

    @functools.cached_property
    def has_images(self) -> bool:
        """True if the stored images can be read: tried once, with the row nearest to the first one."""
        found = self.search(self.rows(np.zeros(1, np.int64)).astype(np.float32), 1)
        try:
            return bool(self.images(found.ids[0].tolist()))
        except KNNDiffusionError:
            return False

    def images(self, ids: Sequence[int]) -> list[Image.Image]:
        """Return the stored images of rows; see :meth:`model.retrieval.database.Database.images`."""
        return fetch_images(self._version, checked_rows(ids, self.stored, self.name), self._cache)


class _Part:
    """Consecutive index shards, open on an actor."""

    def __init__(self, version: DatabaseVersion, part: Sequence[artifacts.Shard], cache: Path) -> None:
        self._database, _ = open_part(version, part, cache)

    def __call__(self, item: tuple[str, tuple[Any, ...]]) -> Any:
        method, arguments = item
        return self._database.search_without(*arguments) if method == "search" else self._database.rows(*arguments)


def _balanced(shards: Sequence[artifacts.Shard], actors: int) -> list[list[artifacts.Shard]]:
    """Group consecutive shards into at most ``actors`` parts of about the same number of rows."""
    total, assigned = sum(shard.rows for shard in shards), 0
    parts: list[list[artifacts.Shard]] = []
    for shard in shards:
        if not parts or assigned >= total * len(parts) / min(actors, len(shards)):
            parts.append([shard])
        else:
            parts[-1].append(shard)
        assigned += shard.rows
    return parts
