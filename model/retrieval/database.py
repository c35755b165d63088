"""An open embedding database: FAISS finds candidates, the stored float16 rows give their scores and order.

Legend: ``Q`` queries, ``K`` neighbours, ``C`` candidates, ``D`` embedding width, ``N`` rows over all shards.

Row ids are global: they number the rows of all shards in order. Results are always scored with the stored rows, never
with an index's reconstruction, so an approximate index can only lower recall. If the index contains the stored rows
themselves, its own scores are used.
"""

import dataclasses
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
from model.retrieval.shard_search import CandidateSearch, StackedIVF, open_proposer
from model.retrieval.stored_rows import Located, StoredRows

if TYPE_CHECKING:
    import torch

_BLOCK_ROWS = 65_536
_GATHERED_VALUES = 1 << 26  # values of candidate rows in memory at once, 6 bytes each
_COPY_MARGIN = 1e-4
_FEW_ROWS = 64  # up to this number, reading rows one by one is faster than grouping them by part


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardFiles:
    """Local files of one index shard: the FAISS index, and the (n, D) float16 rows it was built from, in order.

    ``ordinal`` is the one passed to :func:`model.retrieval.faiss_index.fill_shard`; ``rows`` is n of each file, if
    known.
    """

    index: Path
    embeddings: tuple[Located, ...]
    ordinal: int = 0
    rows: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchEffort:
    """Search effort per query: number of cells visited and number of candidates re-ranked.

    At least as many candidates are re-ranked as neighbours are requested. An index that scores rows as stored
    re-ranks only those.
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
    def nothing(cls, queries: int, width: int) -> "NearestIds":
        """Return a result without neighbours: scores −inf, ids −1."""
        return cls(scores=np.full((queries, width), -np.inf, np.float32), ids=np.full((queries, width), -1, np.int64))

    def put(self, queries: NDArray[np.int64], better: "NearestIds") -> None:
        """Replace the results of ``queries`` by ``better``."""
        self.scores[queries], self.ids[queries] = better.scores, better.ids


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exclusion:
    """Rows to exclude from the results: for each query a row and all exact copies of it.

    ``ids`` (Q,) int64, −1 if the row is not in this database; ``rows`` (Q, D) float16, as stored.
    """

    ids: NDArray[np.int64]
    rows: NDArray[np.float16]

    def of(self, queries: NDArray[np.int64]) -> "Exclusion":
        """Return the exclusions of the given queries."""
        return Exclusion(ids=self.ids[queries], rows=self.rows[queries])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """Neighbours, best first: scores (Q, K) float32 cosines, ids (Q, K) int64, embeddings (Q, K, D) float32."""

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]
    embeddings: NDArray[np.float32]


class Searchable(Protocol):
    """The search interface that a pipeline needs of a database, local or distributed."""

    name: str
    encoder: EncoderIdentity

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
        part: bool = False,
    ) -> None:
        """Open the shards, in row order.

        Args:
            shards: local files.
            encoder: encoder of the rows; queries must come from it.
            name: name used in messages and figures.
            quantizer: trained template of stackable shards, which contain only inverted lists.
            effort: tuned search effort; ``SearchEffort()`` by default.
            hidden: sorted ids of rows that are never returned: taken down, or near-duplicates of others.
            describe: returns the metadata (key, url, …) of global row ids.
            images: returns the RGB images of global row ids.
            part: True for one of several parts searched together; all its rows may be hidden.

        Raises:
            ModelError: the database is empty, or index and rows of a shard do not match.
        """
        self.name, self.encoder, self.effort = name, encoder, effort or SearchEffort()
        self._describe, self._images = describe, images
        self._hidden = np.zeros(0, np.int64) if hidden is None else np.asarray(hidden, dtype=np.int64)
        self._proposer = open_proposer([s.index for s in shards], [s.ordinal for s in shards], quantizer)
        self._parts: list[StoredRows] = []
        for shard, rows in zip(shards, self._proposer.rows, strict=True):
            counts = shard.rows or [None] * len(shard.embeddings)
            parts = [StoredRows(file, encoder.dimension, n) for file, n in zip(shard.embeddings, counts, strict=True)]
            if sum(map(len, parts)) != rows:
                raise ModelError(
                    f"index and rows do not match: {shard.index} indexes {rows} rows, its embeddings have "
                    f"{sum(map(len, parts))}; rebuild the database"
                )
            self._parts += parts
        self._starts = np.array([0, *itertools.accumulate(map(len, self._parts))], dtype=np.int64)
        if len(self) < 1 and not part:
            raise ModelError(f"database is empty: {name}; build it from at least one image")

    def __len__(self) -> int:
        """Return the number of rows that a search may return."""
        return self.stored - len(self._hidden)

    @property
    def stored(self) -> int:
        """Number of rows over all shards, including hidden ones; all ids are below it."""
        return int(self._starts[-1])

    @property
    def exact(self) -> bool:
        """Return True if every row is compared, with its stored value."""
        return self._proposer.exact and not self._proposer.cells

    @property
    def parts(self) -> list[StoredRows]:
        """The stored rows of each file, in order."""
        return list(self._parts)

    @property
    def proposer(self) -> CandidateSearch:
        """The source of candidates."""
        return self._proposer

    def ids(self) -> NDArray[np.int64]:
        """Return the ids of all rows that a search may return, ascending."""
        return np.setdiff1d(np.arange(self.stored, dtype=np.int64), self._hidden, assume_unique=True)

    def with_effort(self, effort: SearchEffort) -> "Database":
        """Return the same open database with another search effort."""
        other = object.__new__(Database)
        other.__dict__.update(self.__dict__)
        other.effort = effort
        return other

    def to(self, device: "torch.device | str") -> "Database":
        """Return the same database, searched on ``device``; files stay memory-mapped.

        On CUDA, inverted lists that faiss-gpu supports are copied to the GPU. Otherwise the rows are copied to the
        device and all of them are compared.
        """
        from model.retrieval.brute_force import (  # so that workers that search with FAISS do not import torch
            TorchBruteForce,
            available,
        )

        other, place, cells = self.with_effort(self.effort), available(device), None
        if place.type == "cuda" and faiss.get_num_gpus() and isinstance(self._proposer, StackedIVF):
            from model.retrieval.gpu_index import cells_on_gpu

            cells = cells_on_gpu(self._proposer, place.index or 0)
        other._proposer = cells or TorchBruteForce(self._parts, place)
        return other

    def search(self, queries: NDArray[Any], k: int, *, exclude: NDArray[np.int64] | None = None) -> Hits:
        """Return the ``k`` nearest rows of each query by cosine of the stored rows.

        Every query gets K = min(k, returnable rows) places. If too few rows remain after excluding copies of the
        query, the last places have id −1, score −inf and a zero embedding, which networks read as a hidden neighbour.

        Args:
            queries: (Q, D) unit rows.
            k: number of neighbours, at least 1.
            exclude: (Q,) row ids; that row and its exact copies are not returned. Usually the query's own row.

        Raises:
            ModelError: queries that are not finite unit rows of the database's width, k below 1, or an unknown row id.
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

        ``excluded`` are the rows (Q, D) of ``exclude``, which saves reading them. Without ``exclude`` they are rows
        from outside the database whose exact copies must not be returned.
        """
        k, queries = checked_count(k), checked_queries(queries, self.name, self.encoder)
        if exclude is None:
            own = None if excluded is None else _copies_only(excluded)
            return self._nearest(queries, k, own)
        ids = checked_exclusion(exclude, len(queries), self.stored, self.name)
        own = Exclusion(ids=ids, rows=self.rows(ids) if excluded is None else excluded)
        return self._nearest(queries, max(1, min(k, len(self) - 1)), own)

    def search_without(self, queries: NDArray[np.float32], width: int, excluded: NDArray[np.float16] | None) -> Hits:
        """Search for ``width`` neighbours, excluding copies of ``excluded`` (Q, D), rows of any database."""
        return self._with_rows(self._nearest(queries, width, None if excluded is None else _copies_only(excluded)))

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """Return the stored rows (*ids.shape, D) float16 of global ids."""
        flat = ids.reshape(-1)
        if len(self._parts) == 1:
            return np.take(self._parts[0].array, flat, axis=0).reshape(*ids.shape, self.encoder.dimension)
        output = np.empty((len(flat), self.encoder.dimension), dtype=np.float16)
        holder = np.searchsorted(self._starts, flat, side="right") - 1
        if len(flat) <= _FEW_ROWS:
            for place, (number, position) in enumerate(zip(holder, flat - self._starts[holder], strict=True)):
                output[place] = self._parts[number][position]
            return output.reshape(*ids.shape, self.encoder.dimension)
        order = np.argsort(holder, kind="stable")
        numbers, firsts = np.unique(holder[order], return_index=True)
        for number, here in zip(numbers, np.split(order, firsts[1:]), strict=True):
            output[here] = self._parts[number][flat[here] - self._starts[number]]
        return output.reshape(*ids.shape, self.encoder.dimension)

    def describe(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Return the metadata (id, key, url, …) of rows; only the id if the database was opened without metadata.

        Raises:
            ModelError: unknown row id.
        """
        rows = checked_rows(ids, self.stored, self.name)
        if self._describe is None:
            return [{"id": row} for row in rows]
        return [{"id": row, **metadata} for row, metadata in zip(rows, self._describe(rows), strict=True)]

    def with_images(self, images: Callable[[Sequence[int]], list[Image.Image]]) -> "Database":
        """Return the same open database, which reads the images of global row ids by ``images``."""
        other = self.with_effort(self.effort)
        other._images = images
        return other

    def images(self, ids: Sequence[int]) -> list[Image.Image]:
        """Return the stored RGB images of rows, in the order of ``ids``, which may repeat.

        Raises:
            ModelError: unknown row id, or the database was opened without images.
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

    def _nearest(self, queries: NDArray[np.float32], width: int, own: Exclusion | None) -> NearestIds:
        width, extra, nprobe = min(width, len(self)), int(own is not None), self.effort.nprobe
        if width == 0:
            return NearestIds.nothing(len(queries), 0)
        found = self._proposed(queries, width, own, extra=extra, nprobe=nprobe)
        # If the visited cells have too few rows for a query, visit more cells and finally compare all rows.
        while len(short := np.flatnonzero((found.ids < 0).any(axis=1))) and nprobe < self._proposer.cells:
            nprobe = min(8 * nprobe, self._proposer.cells)
            theirs = None if own is None else own.of(short)
            found.put(short, self._proposed(queries[short], width, theirs, extra=extra, nprobe=nprobe))
        if not self._proposer.exact:
            for query in np.flatnonzero((found.ids < 0).any(axis=1)):
                one = np.array([query])
                theirs = None if own is None else own.of(one)
                found.put(one, self._look_at_all(queries[one], theirs, width))
        return found

    def _proposed(
        self, queries: NDArray[np.float32], width: int, own: Exclusion | None, *, extra: int, nprobe: int
    ) -> NearestIds:
        """Propose and rank ``width + extra`` candidates; propose more where excluded rows took their places."""
        wanted = width + extra
        count = min(self.stored, wanted if self._proposer.exact else max(wanted, self.effort.candidates))
        most = max(1, _GATHERED_VALUES // (count * self.encoder.dimension))
        if len(queries) > most:  # bound the memory for the candidates' rows
            found = NearestIds.nothing(len(queries), width)
            for few in np.array_split(np.arange(len(queries)), -(-len(queries) // most)):
                theirs = None if own is None else own.of(few)
                found.put(few, self._proposed(queries[few], width, theirs, extra=extra, nprobe=nprobe))
            return found
        ids, scores = self._proposer.propose(queries, count, nprobe)
        if ids.size and ids.max() >= self.stored:
            raise ModelError(
                f"an index of database {self.name} contains row {int(ids.max())} of only {self.stored} stored rows; "
                "rebuild the database"
            )
        lacking = ((0, 0), (0, max(0, width - ids.shape[1])))
        ids = np.pad(ids, lacking, constant_values=-1)
        scores = None if scores is None else np.pad(scores, lacking)
        found, barred = self._ranked(queries, ids, own, width, scores)
        crowded = np.flatnonzero(barred > count - width)
        if len(crowded) and count < self.stored:
            more = max(2 * count, width + int(barred.max())) - width
            theirs = None if own is None else own.of(crowded)
            found.put(crowded, self._proposed(queries[crowded], width, theirs, extra=more, nprobe=nprobe))
        return found

    def _look_at_all(self, query: NDArray[np.float32], own: Exclusion | None, width: int) -> NearestIds:
        """Return the best of all rows for one query (1, D), read in blocks."""
        best = np.full((1, width), -1, dtype=np.int64)
        for start in range(0, self.stored, _BLOCK_ROWS):
            block = np.arange(start, min(start + _BLOCK_ROWS, self.stored))[None]
            found, _ = self._ranked(query, np.concatenate([best, block], axis=1), own, width)
            best = found.ids
        return found

    def _ranked(
        self,
        queries: NDArray[np.float32],
        candidates: NDArray[np.int64],
        own: Exclusion | None,
        width: int,
        scores: NDArray[np.float32] | None = None,
    ) -> tuple[NearestIds, NDArray[np.int64]]:
        """Return the best ``width`` candidates of (Q, C) in exact order, and the number of excluded ones per query.

        ``scores`` (Q, C) may be passed if they are already those of the stored rows.
        """
        if scores is None:
            rows = self.rows(np.maximum(candidates, 0)).astype(np.float32)
            scores = np.einsum("qd,qkd->qk", queries, rows)
        absent = candidates < 0
        barred = np.zeros_like(absent)
        if len(self._hidden):
            places = np.minimum(np.searchsorted(self._hidden, candidates), len(self._hidden) - 1)
            barred |= self._hidden[places] == candidates
        if own is not None:
            barred |= candidates == own.ids[:, None]
            # A copy has the score of the row itself, up to rounding. Only such rows are read and compared bit by bit.
            itself = np.einsum("qd,qd->q", queries, own.rows.astype(np.float32))
            query, place = np.nonzero(~(absent | barred) & (np.abs(scores - itself[:, None]) < _COPY_MARGIN))
            if len(query):
                near = self.rows(candidates[query, place])
                same = (near.view(np.uint16) == own.rows[query].view(np.uint16)).all(axis=1)
                barred[query[same], place[same]] = True
        barred &= ~absent
        self._require_finite(candidates, np.where(absent | barred, 0, scores)[..., None])
        scores = np.where(absent | barred, -np.inf, scores)
        # Ties are broken by the lower id.
        order = np.lexsort((candidates, -scores), axis=1)[:, :width]
        best = np.take_along_axis(scores, order, axis=1)
        ids = np.where(np.isneginf(best), -1, np.take_along_axis(candidates, order, axis=1))
        return NearestIds(scores=best, ids=ids), barred.sum(axis=1)


def _copies_only(rows: NDArray[np.float16]) -> Exclusion:
    """Return the exclusion of exact copies of ``rows`` (Q, D) from outside the database."""
    return Exclusion(ids=np.full(len(rows), -1, np.int64), rows=rows)
