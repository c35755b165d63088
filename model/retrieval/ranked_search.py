"""Nearest rows of a database: an index proposes candidates, and the stored float16 rows give their scores and order.

Legend: ``Q`` queries, ``K`` neighbours, ``C`` candidates, ``D`` embedding width.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from model.errors import ModelError
from model.retrieval.concatenated_rows import ConcatenatedRows
from model.retrieval.searchable import Hits, NearestIds
from model.retrieval.shard_search import CandidateSearch

_BLOCK_ROWS = 65_536
_GATHERED_VALUES = 1 << 26  # values of candidate rows in memory at once, 6 bytes each
_COPY_MARGIN = 1e-4


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

    @classmethod
    def of_copies(cls, rows: NDArray[np.float16]) -> "Exclusion":
        """Return the exclusion of exact copies of ``rows`` (Q, D) from outside the database."""
        return cls(ids=np.full(len(rows), -1, np.int64), rows=rows)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RankedSearch:
    """Search for the nearest of ``rows``.

    Attributes:
        name: Name of the database in messages.
        rows: Stored rows of all shards (N, D).
        candidates: Search for candidates, which precedes ranking.
        effort: Cells to visit and candidates to rank.
        hidden: Sorted ids of rows that are never returned.
    """

    name: str
    rows: ConcatenatedRows
    candidates: CandidateSearch
    effort: SearchEffort
    hidden: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of rows that a search may return."""
        return len(self.rows) - len(self.hidden)

    def nearest(self, queries: NDArray[np.float32], width: int, exclusion: Exclusion | None) -> NearestIds:
        """Return the ``width`` nearest rows of each query; fewer if no more may be returned."""
        width, extra, nprobe = min(width, len(self)), int(exclusion is not None), self.effort.nprobe
        if width == 0:
            return NearestIds.empty(len(queries), 0)
        found = self._search_candidates(queries, width, exclusion, extra=extra, nprobe=nprobe)
        # If the visited cells have too few rows for a query, visit more cells and finally compare all rows.
        while len(short := _incomplete(found)) and nprobe < self.candidates.cells:
            nprobe = min(8 * nprobe, self.candidates.cells)
            excluded = _select(exclusion, short)
            found.put(short, self._search_candidates(queries[short], width, excluded, extra=extra, nprobe=nprobe))
        if not self.candidates.exact:
            for query in _incomplete(found):
                one = np.array([query])
                found.put(one, self._compare_all(queries[one], _select(exclusion, one), width))
        return found

    def with_embeddings(self, found: NearestIds) -> Hits:
        """Return the results with the embeddings, read from the stored rows."""
        embeddings = self.rows[np.maximum(found.ids, 0)].astype(np.float32)
        embeddings[found.ids < 0] = 0
        self._require_finite(found.ids, embeddings)
        return Hits(scores=found.scores, ids=found.ids, embeddings=embeddings)

    def _search_candidates(
        self, queries: NDArray[np.float32], width: int, exclusion: Exclusion | None, *, extra: int, nprobe: int
    ) -> NearestIds:
        """Search and rank ``width + extra`` candidates. Search for more where too many of them are excluded."""
        wanted = width + extra
        count = min(len(self.rows), wanted if self.candidates.exact else max(wanted, self.effort.candidates))
        batch = max(1, _GATHERED_VALUES // (count * queries.shape[1]))
        if len(queries) > batch:  # bound the memory for the candidates' rows
            found = NearestIds.empty(len(queries), width)
            for some in np.array_split(np.arange(len(queries)), -(-len(queries) // batch)):
                excluded = _select(exclusion, some)
                found.put(some, self._search_candidates(queries[some], width, excluded, extra=extra, nprobe=nprobe))
            return found
        ids, scores = self.candidates.propose(queries, count, nprobe)
        if ids.size and ids.max() >= len(self.rows):
            raise ModelError(
                f"an index of database {self.name} contains row {int(ids.max())} of only {len(self.rows)} stored rows; "
                "rebuild the database"
            )
        padding = ((0, 0), (0, max(0, width - ids.shape[1])))
        ids = np.pad(ids, padding, constant_values=-1)
        scores = None if scores is None else np.pad(scores, padding)
        found, excluded_count = self._rank(queries, ids, exclusion, width, scores)
        short = np.flatnonzero(excluded_count > count - width)
        if len(short) and count < len(self.rows):
            more = max(2 * count, width + int(excluded_count.max())) - width
            excluded = _select(exclusion, short)
            found.put(short, self._search_candidates(queries[short], width, excluded, extra=more, nprobe=nprobe))
        return found

    def _compare_all(self, query: NDArray[np.float32], exclusion: Exclusion | None, width: int) -> NearestIds:
        """Return the best of all rows for one query (1, D), read in blocks."""
        best = np.full((1, width), -1, dtype=np.int64)
        for start in range(0, len(self.rows), _BLOCK_ROWS):
            block = np.arange(start, min(start + _BLOCK_ROWS, len(self.rows)))[None]
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
            rows = self.rows[np.maximum(candidates, 0)].astype(np.float32)
            scores = np.einsum("qd,qkd->qk", queries, rows)
        absent = candidates < 0
        excluded = np.zeros_like(absent)
        if len(self.hidden):
            positions = np.minimum(np.searchsorted(self.hidden, candidates), len(self.hidden) - 1)
            excluded |= self.hidden[positions] == candidates
        if exclusion is not None:
            excluded |= candidates == exclusion.ids[:, None]
            # A copy has the score of the row itself, up to rounding. Only such rows are read and compared bit by bit.
            itself = np.einsum("qd,qd->q", queries, exclusion.rows.astype(np.float32))
            query, column = np.nonzero(~(absent | excluded) & (np.abs(scores - itself[:, None]) < _COPY_MARGIN))
            if len(query):
                near = self.rows[candidates[query, column]]
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

    def _require_finite(self, ids: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """Raise ``ModelError`` for the first of the rows ``ids`` (Q, K) whose ``values`` (Q, K, D) are not finite."""
        wrong = ~np.isfinite(values).all(axis=2)
        if wrong.any():
            row = int(ids[wrong][0])
            path = self.rows.path_of(row)
            raise ModelError(
                f"row {row} of database {self.name} is not finite: {path}; embed the images of its shard again"
            )


def _incomplete(found: NearestIds) -> NDArray[np.int64]:
    """Return the numbers of the queries with fewer results than requested."""
    return np.flatnonzero((found.ids < 0).any(axis=1))


def _select(exclusion: Exclusion | None, queries: NDArray[np.int64]) -> Exclusion | None:
    return None if exclusion is None else exclusion.select(queries)
