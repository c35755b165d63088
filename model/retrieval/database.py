"""An open embedding database: FAISS finds candidates, the stored float16 rows give their scores and order.

Legend: ``Q`` queries, ``K`` neighbours, ``C`` candidates, ``D`` embedding width, ``N`` rows over all shards.

Row ids are global: they number the rows of all shards in order. Results are always scored with the stored rows, never
with an index's reconstruction, so an approximate index can only lower recall. If the index contains the stored rows
themselves, its own scores are used.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.encoder.identity import EncoderIdentity
from model.errors import ModelError
from model.retrieval.arguments import checked_count, checked_exclusion, checked_queries, checked_rows
from model.retrieval.shard_search import CandidateSearch, StackedIVF, open_candidate_search
from model.retrieval.stored_rows import FileSource, StoredRows

if TYPE_CHECKING:
    import torch

_BLOCK_ROWS = 65_536
_GATHERED_VALUES = 1 << 26  # values of candidate rows in memory at once, 6 bytes each
_COPY_MARGIN = 1e-4
_FEW_ROWS = 64  # up to this number, reading rows one by one is faster than grouping them by part


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardFiles:
    """Local files of one index shard.

    Attributes:
        index: The FAISS index.
        embeddings: Files of (n, D) float16 rows that the index was built from, in order.
        ordinal: As passed to :func:`model.retrieval.index_files.fill_shard`.
        rows: n of each file of embeddings, or None if unknown.
    """

    index: Path
    embeddings: tuple[FileSource, ...]
    ordinal: int = 0
    rows: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchEffort:
    """Search effort per query: number of cells (inverted lists) visited, and number of candidates re-ranked.

    At least as many candidates are re-ranked as neighbours are requested. An index that scores rows as stored
    needs no more than that.
    """

    nprobe: int = 1
    candidates: int = 100

    def __post_init__(self) -> None:
        """Raise ``ModelError`` unless both are at least 1."""
        if self.nprobe < 1 or self.candidates < 1:
            raise ModelError(f"nprobe or candidates is below 1: {self.nprobe}, {self.candidates}; use at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NearestIds:
    """Neighbours, best first: scores (Q, K) float32 cosines, ids (Q, K) int64."""

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]

    @classmethod
    def empty(cls, queries: int, width: int) -> "NearestIds":
        """Return a result without neighbours: scores −inf, ids −1."""
        return cls(scores=np.full((queries, width), -np.inf, np.float32), ids=np.full((queries, width), -1, np.int64))

    def put(self, queries: NDArray[np.int64], better: "NearestIds") -> None:
        """Replace the results of ``queries`` by ``better``."""
        self.scores[queries], self.ids[queries] = better.scores, better.ids


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exclusion:
    """Rows to exclude from the results: for each query one row and all exact copies of it.

    Attributes:
        ids: (Q,) int64 id of the row, −1 if it is not in this database.
        rows: (Q, D) float16, the row as stored.
    """

    ids: NDArray[np.int64]
    rows: NDArray[np.float16]

    def select(self, queries: NDArray[np.int64]) -> "Exclusion":
        """Return the exclusions of some of the queries."""
        return Exclusion(ids=self.ids[queries], rows=self.rows[queries])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """Neighbours, best first: scores (Q, K) float32 cosines, ids (Q, K) int64, embeddings (Q, K, D) float32."""

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]
    embeddings: NDArray[np.float32]


class Searchable(Protocol):
    """Search interface of a database, local or distributed, as pipelines use it."""

    name: str
    encoder: EncoderIdentity

    @property
    def has_images(self) -> bool:
        """True if the stored images can be read."""
        ...

    def __len__(self) -> int:
        """Return the number of rows that a search may return."""
        ...

    def search(self, queries: NDArray[Any], k: int, *, exclude: NDArray[np.int64] | None = None) -> Hits:
        """Return the ``k`` nearest rows of each query; see :meth:`Database.search`."""
        ...

    def images(self, ids: Sequence[int]) -> list[Image.Image]:
        """Return the stored images of rows; see :meth:`Database.images`."""
        ...


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
            describe: Returns the metadata (key, url, …) of global row ids. Default: None.
            images: Returns the RGB images of global row ids. Default: None.

        Raises:
            ModelError: There is no shard, or index and rows of a shard do not match.
        """
        self.name, self.encoder, self.effort = name, encoder, effort or SearchEffort()
        self._describe, self._images = describe, images
        self._image_errors: tuple[type[Exception], ...] = ()
        self._hidden = np.zeros(0, np.int64) if hidden is None else np.asarray(hidden, dtype=np.int64)
        if not shards:
            raise ModelError(f"database has no shard: {name}; build it from at least one image")
        self._candidate_search = open_candidate_search(
            [s.index for s in shards], [s.ordinal for s in shards], quantizer
        )
        self._parts: list[StoredRows] = []
        for shard, rows in zip(shards, self._candidate_search.rows, strict=True):
            counts = shard.rows or [None] * len(shard.embeddings)
            parts = [StoredRows(file, encoder.dimension, n) for file, n in zip(shard.embeddings, counts, strict=True)]
            if sum(map(len, parts)) != rows:
                raise ModelError(
                    f"index and rows do not match: {shard.index} indexes {rows} rows, its embeddings have "
                    f"{sum(map(len, parts))}; rebuild the database"
                )
            self._parts += parts
        self._starts = np.array([0, *itertools.accumulate(map(len, self._parts))], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of rows that a search may return."""
        return self.stored - len(self._hidden)

    @property
    def stored(self) -> int:
        """Number of rows over all shards, including hidden ones; all ids are below it."""
        return int(self._starts[-1])

    @property
    def hidden(self) -> NDArray[np.int64]:
        """Sorted ids of the rows that are never returned."""
        return self._hidden

    @property
    def exact(self) -> bool:
        """True if every search compares all rows, by their stored values."""
        return self._candidate_search.exact and not self._candidate_search.cells

    @property
    def parts(self) -> list[StoredRows]:
        """The stored rows of each file, in order."""
        return list(self._parts)

    @property
    def candidate_search(self) -> CandidateSearch:
        """The search for candidates, which precedes re-ranking."""
        return self._candidate_search

    def ids(self) -> NDArray[np.int64]:
        """Return the ids of all rows that a search may return, ascending."""
        return np.setdiff1d(np.arange(self.stored, dtype=np.int64), self._hidden, assume_unique=True)

    def with_effort(self, effort: SearchEffort) -> "Database":
        """Return the same open database with another search effort."""
        other = object.__new__(Database)
        other.__dict__.update(self.__dict__)
        other.effort = effort
        return other

    def without(self, ids: NDArray[np.int64]) -> "Database":
        """Return the same open database, which never returns the rows ``ids`` either."""
        other = self.with_effort(self.effort)
        other._hidden = np.union1d(self._hidden, np.array(checked_rows(ids.tolist(), self.stored, self.name), np.int64))
        return other

    def to(self, device: "torch.device | str") -> "Database":
        """Return the same database, searched on ``device``; files stay memory-mapped.

        On CUDA, inverted lists that faiss-gpu supports are copied to the GPU. Otherwise all rows are copied to the
        device, and every search compares all of them. Raises ``ModelError`` if the device is missing or too small.
        """
        from model.retrieval.brute_force import (  # imported here: workers that search with FAISS need no torch
            TorchBruteForce,
            available,
        )

        other, target, lists = self.with_effort(self.effort), available(device), None
        if target.type == "cuda" and faiss.get_num_gpus() and isinstance(self._candidate_search, StackedIVF):
            from model.retrieval.gpu_index import lists_on_gpu

            lists = lists_on_gpu(self._candidate_search, target.index or 0)
        other._candidate_search = lists or TorchBruteForce(self._parts, target)
        return other

    def search(self, queries: NDArray[Any], k: int, *, exclude: NDArray[np.int64] | None = None) -> Hits:
        """Return the ``k`` nearest rows of each query by cosine of the stored rows.

        The results have K = min(k, returnable rows) columns. If too few rows remain after the exclusion of copies of
        the query, the last columns have id −1, score −inf and a zero embedding: a hidden neighbour for a network.

        Args:
            queries: (Q, D) unit rows.
            k: Number of neighbours, at least 1.
            exclude: (Q,) row ids, usually of the queries' own rows. These rows and their exact copies are not returned.
                Default: None.

        Raises:
            ModelError: Queries are not finite unit rows of the database's width, k is below 1, or a row id is unknown.
        """
        return self._with_rows(self.nearest(queries, k, exclude=exclude))

    def nearest(
        self,
        queries: NDArray[Any],
        k: int,
        *,
        exclude: NDArray[np.int64] | None = None,
        excluded: NDArray[np.float16] | None = None,
    ) -> NearestIds:
        """Return the scores and ids of :meth:`search` without reading the embeddings, if the index allows it.

        ``excluded`` are the rows (Q, D) of ``exclude``, if the caller has already read them. Without ``exclude`` they
        are rows from outside the database whose exact copies must not be returned.
        """
        k, queries = checked_count(k), checked_queries(queries, self.name, self.encoder)
        if exclude is None:
            return self._nearest(queries, k, None if excluded is None else _copies_only(excluded))
        ids = checked_exclusion(exclude, len(queries), self.stored, self.name)
        exclusion = Exclusion(ids=ids, rows=self.rows(ids) if excluded is None else excluded)
        return self._nearest(queries, max(1, min(k, len(self) - 1)), exclusion)

    def search_without(self, queries: NDArray[np.float32], width: int, excluded: NDArray[np.float16] | None) -> Hits:
        """Search for ``width`` neighbours, without exact copies of ``excluded`` (Q, D), rows of any database."""
        return self._with_rows(self._nearest(queries, width, None if excluded is None else _copies_only(excluded)))

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """Return the stored rows (*ids.shape, D) float16 of global ids."""
        flat = ids.reshape(-1)
        if len(self._parts) == 1:
            return np.take(self._parts[0].array, flat, axis=0).reshape(*ids.shape, self.encoder.dimension)
        output = np.empty((len(flat), self.encoder.dimension), dtype=np.float16)
        part_of_row = np.searchsorted(self._starts, flat, side="right") - 1
        if len(flat) <= _FEW_ROWS:
            for row, (number, position) in enumerate(zip(part_of_row, flat - self._starts[part_of_row], strict=True)):
                output[row] = self._parts[number][position]
            return output.reshape(*ids.shape, self.encoder.dimension)
        order = np.argsort(part_of_row, kind="stable")
        numbers, firsts = np.unique(part_of_row[order], return_index=True)
        for number, rows in zip(numbers, np.split(order, firsts[1:]), strict=True):
            output[rows] = self._parts[number][flat[rows] - self._starts[number]]
        return output.reshape(*ids.shape, self.encoder.dimension)

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
        """Return the same open database, whose metadata ``describe`` returns by global row id."""
        other = self.with_effort(self.effort)
        other._describe = describe
        return other

    def with_images(
        self, images: Callable[[Sequence[int]], list[Image.Image]], *, errors: tuple[type[Exception], ...] = ()
    ) -> "Database":
        """Return the same open database, whose stored images ``images`` returns by global row id.

        ``errors`` are those that it raises if the images cannot be read.
        """
        other = self.with_effort(self.effort)
        other.__dict__.pop("has_images", None)
        other._images, other._image_errors = images, errors
        return other

    @functools.cached_property
    def has_images(self) -> bool:
        """True if the stored images can be read: tried once, with the first row that a search may return."""
        if not len(self):
            return False
        first = next((row for row, hidden in enumerate(self._hidden) if row != hidden), len(self._hidden))
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

    def _with_rows(self, found: NearestIds) -> Hits:
        embeddings = self.rows(np.maximum(found.ids, 0)).astype(np.float32)
        embeddings[found.ids < 0] = 0
        self._require_finite(found.ids, embeddings)
        return Hits(scores=found.scores, ids=found.ids, embeddings=embeddings)

    def _require_finite(self, ids: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """Raise ``ModelError`` for the first of the rows ``ids`` (Q, K) whose ``values`` (Q, K, D) are not finite."""
        wrong = ~np.isfinite(values).all(axis=2)
        if wrong.any():
            row = int(ids[wrong][0])
            part = self._parts[int(np.searchsorted(self._starts, row, side="right")) - 1]
            raise ModelError(
                f"row {row} of database {self.name} is not finite: {part.path}; embed the images of its shard again"
            )

    def _nearest(self, queries: NDArray[np.float32], width: int, exclusion: Exclusion | None) -> NearestIds:
        width, extra, nprobe = min(width, len(self)), int(exclusion is not None), self.effort.nprobe
        if width == 0:
            return NearestIds.empty(len(queries), 0)
        found = self._search_candidates(queries, width, exclusion, extra=extra, nprobe=nprobe)
        # If the visited cells have too few rows for a query, visit more cells and finally compare all rows.
        while len(short := _incomplete(found)) and nprobe < self._candidate_search.cells:
            nprobe = min(8 * nprobe, self._candidate_search.cells)
            excluded = _select(exclusion, short)
            found.put(short, self._search_candidates(queries[short], width, excluded, extra=extra, nprobe=nprobe))
        if not self._candidate_search.exact:
            for query in _incomplete(found):
                one = np.array([query])
                found.put(one, self._compare_all(queries[one], _select(exclusion, one), width))
        return found

    def _search_candidates(
        self, queries: NDArray[np.float32], width: int, exclusion: Exclusion | None, *, extra: int, nprobe: int
    ) -> NearestIds:
        """Search and rank ``width + extra`` candidates. Search for more where too many of them are excluded."""
        wanted = width + extra
        count = min(self.stored, wanted if self._candidate_search.exact else max(wanted, self.effort.candidates))
        batch = max(1, _GATHERED_VALUES // (count * self.encoder.dimension))
        if len(queries) > batch:  # bound the memory for the candidates' rows
            found = NearestIds.empty(len(queries), width)
            for some in np.array_split(np.arange(len(queries)), -(-len(queries) // batch)):
                excluded = _select(exclusion, some)
                found.put(some, self._search_candidates(queries[some], width, excluded, extra=extra, nprobe=nprobe))
            return found
        ids, scores = self._candidate_search.propose(queries, count, nprobe)
        if ids.size and ids.max() >= self.stored:
            raise ModelError(
                f"an index of database {self.name} contains row {int(ids.max())} of only {self.stored} stored rows; "
                "rebuild the database"
            )
        padding = ((0, 0), (0, max(0, width - ids.shape[1])))
        ids = np.pad(ids, padding, constant_values=-1)
        scores = None if scores is None else np.pad(scores, padding)
        found, excluded_count = self._rank(queries, ids, exclusion, width, scores)
        short = np.flatnonzero(excluded_count > count - width)
        if len(short) and count < self.stored:
            more = max(2 * count, width + int(excluded_count.max())) - width
            excluded = _select(exclusion, short)
            found.put(short, self._search_candidates(queries[short], width, excluded, extra=more, nprobe=nprobe))
        return found

    def _compare_all(self, query: NDArray[np.float32], exclusion: Exclusion | None, width: int) -> NearestIds:
        """Return the best of all rows for one query (1, D), read in blocks."""
        best = np.full((1, width), -1, dtype=np.int64)
        for start in range(0, self.stored, _BLOCK_ROWS):
            block = np.arange(start, min(start + _BLOCK_ROWS, self.stored))[None]
            found, _ = self._rank(query, np.concatenate([best, block], axis=1), exclusion, width)
            best = found.ids
        return found

    def _rank(
        self,
        queries: NDArray[np.float32],
        candidates: NDArray[np.int64],
        exclusion: Exclusion | None,
        width: int,
        scores: NDArray[np.float32] | None = None,
    ) -> tuple[NearestIds, NDArray[np.int64]]:
        """Return the best ``width`` of candidates (Q, C) in exact order, and the number of excluded ones per query.

        ``scores`` (Q, C) are those of the stored rows, if they are known.
        """
        if scores is None:
            rows = self.rows(np.maximum(candidates, 0)).astype(np.float32)
            scores = np.einsum("qd,qkd->qk", queries, rows)
        absent = candidates < 0
        excluded = np.zeros_like(absent)
        if len(self._hidden):
            positions = np.minimum(np.searchsorted(self._hidden, candidates), len(self._hidden) - 1)
            excluded |= self._hidden[positions] == candidates
        if exclusion is not None:
            excluded |= candidates == exclusion.ids[:, None]
            # A copy has the score of the row itself, up to rounding. Only such rows are read and compared bit by bit.
            itself = np.einsum("qd,qd->q", queries, exclusion.rows.astype(np.float32))
            query, column = np.nonzero(~(absent | excluded) & (np.abs(scores - itself[:, None]) < _COPY_MARGIN))
            if len(query):
                near = self.rows(candidates[query, column])
                same = (near.view(np.uint16) == exclusion.rows[query].view(np.uint16)).all(axis=1)
                excluded[query[same], column[same]] = True
        excluded &= ~absent
        self._require_finite(candidates, np.where(absent | excluded, 0, scores)[..., None])
        scores = np.where(absent | excluded, -np.inf, scores)
        # Ties are broken by the lower id.
        order = np.lexsort((candidates, -scores), axis=1)[:, :width]
        best = np.take_along_axis(scores, order, axis=1)
        ids = np.where(np.isneginf(best), -1, np.take_along_axis(candidates, order, axis=1))
        return NearestIds(scores=best, ids=ids), excluded.sum(axis=1)


def _incomplete(found: NearestIds) -> NDArray[np.int64]:
    """Return the numbers of the queries with fewer results than requested."""
    return np.flatnonzero((found.ids < 0).any(axis=1))


def _select(exclusion: Exclusion | None, queries: NDArray[np.int64]) -> Exclusion | None:
    return None if exclusion is None else exclusion.select(queries)


def _copies_only(rows: NDArray[np.float16]) -> Exclusion:
    """Return the exclusion of exact copies of ``rows`` (Q, D) from outside the database."""
    return Exclusion(ids=np.full(len(rows), -1, np.int64), rows=rows)
