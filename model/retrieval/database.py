"""An open database: an index proposes, the stored float16 rows decide.

Legend: ``Q`` queries, ``K`` neighbours, ``C`` candidates, ``D`` embedding width, ``N`` rows over all shards.

Row ids are global: shard after shard in order, position within the shard. What a search returns is always scored with
the stored rows, never with an index's reconstruction, so an approximate index costs recall but never precision. Where
the index holds the stored rows themselves, its scores are those.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from model.encoder.identity import EncoderIdentity
from model.errors import ModelError
from model.retrieval.arguments import checked_count, checked_exclusion, checked_queries, checked_rows
from model.retrieval.shard_search import CandidateSearch, StackedIVF, open_proposer
from model.retrieval.stored_rows import Located, StoredRows

if TYPE_CHECKING:
    import torch

_BLOCK_ROWS = 65_536
_GATHERED_VALUES = 1 << 26  # of candidates' rows at once, 6 bytes each
_COPY_MARGIN = 1e-4
_FEW_ROWS = 64  # so few are read one by one sooner than gathered by the part that holds them


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardFiles:
    """Local files of one index shard: the FAISS index, and the (n, D) float16 rows it was built from, in their order.

    ``ordinal`` is the argument of :func:`model.retrieval.faiss_index.fill_shard`; ``rows`` is n of each file, if known.
    """

    index: Path
    embeddings: tuple[Located, ...]
    ordinal: int = 0
    rows: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchEffort:
    """How hard to look: cells visited, and candidates re-ranked for each query (at least the neighbours wanted).

    An index that scores rows as they are stored re-ranks only the neighbours wanted.
    """

    nprobe: int = 1
    candidates: int = 100

    def __post_init__(self) -> None:
        """Refuse a search that finds nothing."""
        if self.nprobe < 1 or self.candidates < 1:
            raise ModelError(f"nprobe is {self.nprobe} and candidates {self.candidates}; give at least 1 of each")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NearestIds:
    """Neighbours, best first: scores (Q, K) float32 cosines, ids (Q, K) int64."""

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]

    @classmethod
    def nothing(cls, queries: int, width: int) -> "NearestIds":
        """No neighbour found yet."""
        return cls(scores=np.full((queries, width), -np.inf, np.float32), ids=np.full((queries, width), -1, np.int64))

    def put(self, queries: NDArray[np.int64], better: "NearestIds") -> None:
        """Put the answers ``better`` in the place of those to ``queries``."""
        self.scores[queries], self.ids[queries] = better.scores, better.ids


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exclusion:
    """What a query must not find: the row that it is, and exact copies of it.

    ``ids`` (Q,) int64, −1 where that row lies elsewhere; ``rows`` (Q, D) float16, as they are stored.
    """

    ids: NDArray[np.int64]
    rows: NDArray[np.float16]

    def of(self, queries: NDArray[np.int64]) -> "Exclusion":
        """Those of some queries."""
        return Exclusion(ids=self.ids[queries], rows=self.rows[queries])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """Neighbours, best first: scores (Q, K) float32 cosines, ids (Q, K) int64, embeddings (Q, K, D) float32."""

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]
    embeddings: NDArray[np.float32]


class Searchable(Protocol):
    """What a pipeline needs of a database, wherever its shards are."""

    name: str
    encoder: EncoderIdentity

    def __len__(self) -> int:
        """Rows that a search may return."""
        ...

    def search(self, queries: NDArray[Any], k: int, *, exclude: NDArray[np.int64] | None = None) -> Hits:
        """The ``k`` nearest rows of each query; see :meth:`Database.search`."""
        ...


class Database:
    """A searchable, read-only database. Opening maps files into memory; it reads no rows."""

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
        part: bool = False,
    ) -> None:
        """Open the shards, in row order.

        Args:
            shards: local files.
            encoder: whose space the rows live in.
            name: for messages and pictures.
            quantizer: the trained template of shards that hold inverted lists alone.
            effort: as tuned when the database was built.
            hidden: sorted ids of rows that are never returned: taken down, or near-duplicates of others.
            describe: metadata (key, url, …) of global row ids.
            part: whether it is searched as one of several, and finds nothing where all its rows are hidden.

        Raises:
            ModelError: nothing to search, or index and rows of a shard do not agree.
        """
        self.name, self.encoder, self.effort = name, encoder, effort or SearchEffort()
        self._describe = describe
        self._hidden = np.zeros(0, np.int64) if hidden is None else np.asarray(hidden, dtype=np.int64)
        self._proposer = open_proposer([s.index for s in shards], [s.ordinal for s in shards], quantizer)
        self._parts: list[StoredRows] = []
        for shard, rows in zip(shards, self._proposer.rows, strict=True):
            known = shard.rows or [None] * len(shard.embeddings)
            held = [StoredRows(file, encoder.dimension, n) for file, n in zip(shard.embeddings, known, strict=True)]
            if sum(map(len, held)) != rows:
                raise ModelError(
                    f"{shard.index} indexes {rows} rows, but beside it are {sum(map(len, held))}; rebuild the database"
                )
            self._parts += held
        self._starts = np.array([0, *itertools.accumulate(map(len, self._parts))], dtype=np.int64)
        if len(self) < 1 and not part:
            raise ModelError(
                f"database {name} is empty: there is nothing to retrieve; build it from at least one image"
            )

    def __len__(self) -> int:
        """Rows that a search may return."""
        return self.stored - len(self._hidden)

    @property
    def stored(self) -> int:
        """Rows over all shards, hidden ones included; ids are below it."""
        return int(self._starts[-1])

    @property
    def exact(self) -> bool:
        """Whether every row is compared as it is stored."""
        return self._proposer.exact and not self._proposer.cells

    @property
    def parts(self) -> list[StoredRows]:
        """The stored rows of each file, in order."""
        return list(self._parts)

    @property
    def proposer(self) -> CandidateSearch:
        """Where candidates come from."""
        return self._proposer

    def ids(self) -> NDArray[np.int64]:
        """Ids of all rows that a search may return, ascending."""
        return np.setdiff1d(np.arange(self.stored, dtype=np.int64), self._hidden, assume_unique=True)

    def with_effort(self, effort: SearchEffort) -> "Database":
        """The same open files, searched harder or less hard."""
        other = object.__new__(Database)
        other.__dict__.update(self.__dict__)
        other.effort = effort
        return other

    def to(self, device: "torch.device | str") -> "Database":
        """The same database searched on an accelerator; files stay mapped.

        Where faiss-gpu is installed the cells of the index are copied there, if it has any that a GPU can search; else
        the rows are, and all of them compared.
        """
        from model.retrieval.brute_force import (  # workers that search with FAISS never load torch
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
        """The ``k`` nearest rows of each query by cosine, as they are stored.

        Every query gets min(k, rows that may be returned) places; where copies of the query leave nothing to fill
        one with, the id is −1, the score −inf and the embedding zero, which is how a hidden neighbour looks.

        Args:
            queries: (Q, D) unit rows.
            k: neighbours wanted, at least 1.
            exclude: (Q,) a row id for each query that must not be returned, nor any exact copy of it: the query itself.

        Raises:
            ModelError: queries that are no finite unit rows of the database's width, k below 1, an unknown row id.
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
        """What :meth:`search` finds, without the rows, which are not read where the index holds them itself.

        ``excluded`` are the rows (Q, D) of ``exclude``, where they are at hand; alone, they are rows from elsewhere of
        which no exact copy must be returned.
        """
        k, queries = checked_count(k), checked_queries(queries, self.name, self.encoder)
        if exclude is None:
            own = None if excluded is None else _copies_only(excluded)
            return self._nearest(queries, k, own)
        ids = checked_exclusion(exclude, len(queries), self.stored, self.name)
        own = Exclusion(ids=ids, rows=self.rows(ids) if excluded is None else excluded)
        return self._nearest(queries, max(1, min(k, len(self) - 1)), own)

    def search_without(self, queries: NDArray[np.float32], width: int, excluded: NDArray[np.float16] | None) -> Hits:
        """``width`` neighbours as :meth:`search` has them; what to exclude (Q, D) may lie in another database."""
        return self._with_rows(self._nearest(queries, width, None if excluded is None else _copies_only(excluded)))

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float16]:
        """Stored rows (*ids.shape, D) float16 of global ids."""
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
        """What is known of rows (key, url, …); only the id where the database was opened without metadata.

        Raises:
            ModelError: there is no such row.
        """
        rows = checked_rows(ids, self.stored, self.name)
        if self._describe is None:
            return [{"id": row} for row in rows]
        return [{"id": row, **known} for row, known in zip(rows, self._describe(rows), strict=True)]

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
                f"row {row} of database {self.name} is not finite, in {part.path}; embed the images of its shard again"
            )

    def _nearest(self, queries: NDArray[np.float32], width: int, own: Exclusion | None) -> NearestIds:
        width, extra, nprobe = min(width, len(self)), int(own is not None), self.effort.nprobe
        if width == 0:
            return NearestIds.nothing(len(queries), 0)
        found = self._proposed(queries, width, own, extra=extra, nprobe=nprobe)
        # Cells without enough rows leave a query short: then more cells are visited, and at last all rows looked at.
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
        """Propose ``width + extra`` and rank; where rows that may not be returned took places, deeper."""
        wanted = width + extra
        count = min(self.stored, wanted if self._proposer.exact else max(wanted, self.effort.candidates))
        most = max(1, _GATHERED_VALUES // (count * self.encoder.dimension))
        if len(queries) > most:  # so that the rows of all candidates fit into memory, however many there are
            found = NearestIds.nothing(len(queries), width)
            for few in np.array_split(np.arange(len(queries)), -(-len(queries) // most)):
                theirs = None if own is None else own.of(few)
                found.put(few, self._proposed(queries[few], width, theirs, extra=extra, nprobe=nprobe))
            return found
        ids, scores = self._proposer.propose(queries, count, nprobe)
        if ids.size and ids.max() >= self.stored:
            raise ModelError(
                f"an index of database {self.name} names row {int(ids.max())}, but {self.stored} are stored; "
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
        """The best of all rows for one query (1, D), a block at a time."""
        kept = np.full((1, width), -1, dtype=np.int64)
        for start in range(0, self.stored, _BLOCK_ROWS):
            block = np.arange(start, min(start + _BLOCK_ROWS, self.stored))[None]
            found, _ = self._ranked(query, np.concatenate([kept, block], axis=1), own, width)
            kept = found.ids
        return found

    def _ranked(
        self,
        queries: NDArray[np.float32],
        candidates: NDArray[np.int64],
        own: Exclusion | None,
        width: int,
        scores: NDArray[np.float32] | None = None,
    ) -> tuple[NearestIds, NDArray[np.int64]]:
        """The best ``width`` of the candidates (Q, C) in exact order, and how many of each query's were barred.

        ``scores`` are given where they are those of the stored rows already.
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
            # A copy scores as the row itself, to rounding: only what does is read and compared value by value.
            itself = np.einsum("qd,qd->q", queries, own.rows.astype(np.float32))
            query, place = np.nonzero(~(absent | barred) & (np.abs(scores - itself[:, None]) < _COPY_MARGIN))
            if len(query):
                near = self.rows(candidates[query, place])
                same = (near.view(np.uint16) == own.rows[query].view(np.uint16)).all(axis=1)
                barred[query[same], place[same]] = True
        barred &= ~absent
        self._require_finite(candidates, np.where(absent | barred, 0, scores)[..., None])
        scores = np.where(absent | barred, -np.inf, scores)
        # Of candidates that score alike, the lower id comes first.
        order = np.lexsort((candidates, -scores), axis=1)[:, :width]
        best = np.take_along_axis(scores, order, axis=1)
        ids = np.where(np.isneginf(best), -1, np.take_along_axis(candidates, order, axis=1))
        return NearestIds(scores=best, ids=ids), barred.sum(axis=1)


def _copies_only(rows: NDArray[np.float16]) -> Exclusion:
    """Rows (Q, D) of which the database may hold copies, and which are none of its own."""
    return Exclusion(ids=np.full(len(rows), -1, np.int64), rows=rows)
