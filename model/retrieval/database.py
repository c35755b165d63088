"""Embedding database: FAISS finds candidates, and the stored float16 rows give their scores and order.

Legend: ``Q`` queries, ``K`` neighbours, ``C`` candidates, ``D`` embedding width, ``N`` rows over all shards.

Row ids are global: they number the rows of all shards in order. Scores are always those of the stored
rows, never of an index's reconstruction, so an approximate index can only lower recall. An index that contains the
stored rows themselves returns these scores directly.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.encoder.identity import EncoderIdentity
from model.errors import ModelError
from model.retrieval.arguments import checked_count, checked_exclusion, checked_queries, checked_rows
from model.retrieval.concatenated_rows import ConcatenatedRows
from model.retrieval.ranked_search import Exclusion, RankedSearch, SearchEffort
from model.retrieval.searchable import Hits, NearestIds
from model.retrieval.shard_search import CandidateSearch, StackedIVF, open_candidate_search
from model.retrieval.stored_rows import FileSource, StoredRows

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardFiles:
    """Local files of one index shard.

    Attributes:
        index: The FAISS index.
        embeddings: Files of (n, D) float16 rows that the index was built from, in order.
        ordinal: Number of the shard, as passed to :func:`model.retrieval.index_files.fill_shard`.
        rows: Number of rows n of each embeddings file, or None if unknown.
    """

    index: Path
    embeddings: tuple[FileSource, ...]
    ordinal: int = 0
    rows: tuple[int, ...] | None = None


class Database:
    """A searchable, read-only database. Opening it memory-maps files and reads no rows."""

    def __init__(
        self,
        shards: Sequence[ShardFiles],
        *,
        encoder: EncoderIdentity,
        name: str = "database",
        quantizer: Path | None = None,
        effort: SearchEffort | None = None,
        hidden: NDArray[np.int64] | None = None,
        describe: Callable[[Sequence[int]], list[dict[str, Any]]] | None = None,
        images: Callable[[Sequence[int]], list[Image.Image]] | None = None,
    ) -> None:
        """Open the shards, in row order. All rows may be hidden; searches then return nothing.

        Args:
            shards: Local files of each shard.
            encoder: Encoder of the rows; queries must come from the same encoder.
            name: Name used in messages and figures. Default: "database".
            quantizer: Trained template of stackable shards, which contain only inverted lists. Default: None.
            effort: Tuned search effort. Default: ``SearchEffort()``.
            hidden: Sorted ids of rows that are never returned: taken down, or near-duplicates of others. Default: none.
            describe: Function that returns the metadata (key, url, …) of global row ids. Default: None.
            images: Function that returns the RGB images of global row ids. Default: None.

        Raises:
            ModelError: There is no shard, or index and rows of a shard do not match.
        """
        self.name, self.encoder = name, encoder
        self._describe, self._images = describe, images
        self._image_errors: tuple[type[Exception], ...] = ()
        if not shards:
            raise ModelError(f"database has no shard: {name}; build it from at least one image")
        candidates = open_candidate_search([s.index for s in shards], [s.ordinal for s in shards], quantizer)
        self._parts: list[StoredRows] = []
        for shard, rows in zip(shards, candidates.rows, strict=True):
            counts = shard.rows or [None] * len(shard.embeddings)
            parts = [StoredRows(file, encoder.dimension, n) for file, n in zip(shard.embeddings, counts, strict=True)]
            if sum(map(len, parts)) != rows:
                raise ModelError(
                    f"index and rows do not match: {shard.index} indexes {rows} rows, its embeddings have "
                    f"{sum(map(len, parts))}; rebuild the database"
                )
            self._parts += parts
        self._ranked = RankedSearch(
            name=name,
            rows=ConcatenatedRows(self._parts),
            candidates=candidates,
            effort=effort or SearchEffort(),
            hidden=np.zeros(0, np.int64) if hidden is None else np.asarray(hidden, dtype=np.int64),
        )

    def __len__(self) -> int:
        """Return the number of rows that a search may return."""
        return len(self._ranked)

    @property
    def stored(self) -> int:
        """Number of rows over all shards, including hidden ones; all ids are below it."""
        return len(self._ranked.rows)

    @property
    def hidden(self) -> NDArray[np.int64]:
        """Sorted ids of the rows that are never returned."""
        return self._ranked.hidden

    @property
    def effort(self) -> SearchEffort:
        """Search effort per query."""
        return self._ranked.effort

    @property
    def exact(self) -> bool:
        """True if every search compares all rows, by their stored values."""
        return self.candidate_search.exact and not self.candidate_search.cells

    @property
    def parts(self) -> list[StoredRows]:
        """The stored rows of each file, in order."""
        return list(self._parts)

    @property
    def candidate_search(self) -> CandidateSearch:
        """The search for candidates, which precedes re-ranking."""
        return self._ranked.candidates

    def ids(self) -> NDArray[np.int64]:
        """Return the ids of all rows that a search may return, ascending."""
        return np.setdiff1d(np.arange(self.stored, dtype=np.int64), self.hidden, assume_unique=True)

    def with_effort(self, effort: SearchEffort) -> "Database":
        """Return the same open database with another search effort."""
        return self._with_search(effort=effort)

    def without(self, ids: NDArray[np.int64]) -> "Database":
        """Return the same open database with the rows ``ids`` hidden too."""
        added = np.array(checked_rows(ids.tolist(), self.stored, self.name), np.int64)
        return self._with_search(hidden=np.union1d(self.hidden, added))

    def to(self, device: "torch.device | str") -> "Database":
        """Return the same database, searched on ``device``; files stay memory-mapped.

        On CUDA, inverted lists that faiss-gpu supports are copied to the GPU. Otherwise all rows are copied to the
        device, and every search compares all of them. Raises ``ModelError`` if the device is missing or too small.
        """
        from model.retrieval.brute_force import (  # imported here: workers that search with FAISS need no torch
            TorchBruteForce,
            available,
        )

        target, lists = available(device), None
        if target.type == "cuda" and faiss.get_num_gpus() and isinstance(self.candidate_search, StackedIVF):
            from model.retrieval.gpu_index import lists_on_gpu

            lists = lists_on_gpu(self.candidate_search, target.index or 0)
        return self._with_search(candidates=lists or TorchBruteForce(self._parts, target))

    def search(self, queries: NDArray[Any], k: int, *, exclude: NDArray[np.int64] | None = None) -> Hits:
        """Return the ``k`` nearest rows of each query by cosine of the stored rows.

        The results have K = min(k, returnable rows) columns. If too few rows remain after the exclusion, the last
        columns have id −1, score −inf and a zero embedding, which networks treat as a hidden neighbour.

        Args:
            queries: (Q, D) unit rows.
            k: Number of neighbours, at least 1.
            exclude: (Q,) row ids, usually of the queries' own rows. These rows and their exact copies are not returned.
                Default: None.

        Raises:
            ModelError: Queries are not finite unit rows of the database's width, k is below 1, or a row id is unknown.
        """
        return self._ranked.with_embeddings(self.nearest(queries, k, exclude=exclude))

    def nearest(
        self,
        queries: NDArray[Any],
        k: int,
        *,
        exclude: NDArray[np.int64] | None = None,
        excluded: NDArray[np.float16] | None = None,
    ) -> NearestIds:
        """Return the scores and ids of :meth:`search` without reading the embeddings, if the index allows it.

        With ``exclude``, ``excluded`` has the rows (Q, D) of those ids, if the caller has already read them. Without
        ``exclude``, it has rows from outside the database whose exact copies must not be returned.
        """
        k, queries = checked_count(k), checked_queries(queries, self.name, self.encoder)
        if exclude is None:
            return self._ranked.nearest(queries, k, None if excluded is None else Exclusion.of_copies(excluded))
        ids = checked_exclusion(exclude, len(queries), self.stored, self.name)
        exclusion = Exclusion(ids=ids, rows=self.rows(ids) if excluded is None else excluded)
        return self._ranked.nearest(queries, max(1, min(k, len(self) - 1)), exclusion)

    def search_without(self, queries: NDArray[np.float32], width: int, excluded: NDArray[np.float16] | None) -> Hits:
        """Return the ``width`` nearest rows of each query, without exact copies of the rows ``excluded`` (Q, D)."""
        exclusion = None if excluded is None else Exclusion.of_copies(excluded)
        return self._ranked.with_embeddings(self._ranked.nearest(queries, width, exclusion))

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """Return the stored rows (*ids.shape, D) float16 of global ids."""
        return self._ranked.rows[ids]

    def describe(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Return the metadata (id, key, url, …) of rows; only the id if the database was opened without metadata.

        Raises:
            ModelError: A row id is unknown.
        """
        rows = checked_rows(ids, self.stored, self.name)
        if self._describe is None:
            return [{"id": row} for row in rows]
        return [{"id": row, **metadata} for row, metadata in zip(rows, self._describe(rows), strict=True)]

    def with_descriptions(self, describe: Callable[[Sequence[int]], list[dict[str, Any]]]) -> "Database":
        """Return the same open database with ``describe`` as the source of metadata by global row id."""
        other = copy.copy(self)
        other._describe = describe
        return other

    def with_images(
        self, images: Callable[[Sequence[int]], list[Image.Image]], *, errors: tuple[type[Exception], ...] = ()
    ) -> "Database":
        """Return the same open database with ``images`` as the source of stored images by global row id.

        ``errors`` are the exceptions that ``images`` raises if the images cannot be read.
        """
        other = copy.copy(self)
        other.__dict__.pop("has_images", None)
        other._images, other._image_errors = images, errors
        return other

    @functools.cached_property
    def has_images(self) -> bool:
        """True if the stored images can be read. This is tried once, with the first row that a search may return."""
        if not len(self):
            return False
        first = next((row for row, hidden in enumerate(self.hidden) if row != hidden), len(self.hidden))
        errors: tuple[type[Exception], ...] = (ModelError, *self._image_errors)
        try:
            return bool(self.images([first]))
        except errors:
            return False

    def images(self, ids: Sequence[int]) -> list[Image.Image]:
        """Return the stored RGB images of rows, in the order of ``ids``, which may repeat.

        Raises:
            ModelError: A row id is unknown, or the database was opened without images.
        """
        rows = checked_rows(ids, self.stored, self.name)
        if self._images is None:
            raise ModelError(f"database {self.name} was opened without images; open it with load_database")
        return self._images(rows)

    def _with_search(self, **changes: Any) -> "Database":
        """Return the same open database with ``changes`` to the fields of its search."""
        other = copy.copy(self)
        other._ranked = dataclasses.replace(self._ranked, **changes)
        return other
