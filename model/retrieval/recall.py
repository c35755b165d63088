"""Recall@k against brute force on the stored rows, for held-out queries.

Legend: ``Q`` queries, ``P`` true neighbours per query, ``D`` embedding width, ``N`` rows.

Image queries are leave-one-out: a row is searched with itself and its exact copies excluded, both in the index and in
the ground truth. Text queries are not rows of the database. CLIP's modality gap makes them the harder of the two.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.retrieval.database import Database
from model.retrieval.stored_rows import StoredRows

DEPTH = 32
"""True neighbours stored per query: more than recall@10 needs, since some may be taken down later."""
_BLOCK_ROWS = 65_536
_TIE = 1e-5
_COPY_MARGIN = 1e-2  # the score of an exact copy is within float16 rounding of the best score


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GroundTruth:
    """Queries and their true neighbours, to measure the recall of a database as it grows.

    Attributes:
        queries: (Q, D) float32 unit rows.
        own: (Q,) int64 id of the query's own row, −1 for a text.
        ids: (Q, P) int64 ids of the true neighbours, best first, −1 if there are fewer than P.
        scores: (Q, P) float32 cosines of the true neighbours.
    """

    queries: NDArray[np.float32]
    own: NDArray[np.int64]
    ids: NDArray[np.int64]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.queries)

    @property
    def own_rows(self) -> NDArray[np.float16] | None:
        """The queries' own rows (Q, D) as stored in float16; None for text queries."""
        return None if (self.own < 0).all() else self.queries.astype(np.float16)

    def select(self, queries: NDArray[np.int64] | NDArray[np.bool_]) -> "GroundTruth":
        """Return the ground truth of some of the queries."""
        return GroundTruth(
            queries=self.queries[queries], own=self.own[queries], ids=self.ids[queries], scores=self.scores[queries]
        )


def exact_neighbours(
    parts: Sequence[NDArray[np.float16] | StoredRows],
    queries: NDArray[np.float32],
    *,
    own: NDArray[np.int64] | None = None,
    own_rows: NDArray[np.float16] | None = None,
    hidden: NDArray[np.int64] | None = None,
    depth: int = DEPTH,
    grown_from: tuple[GroundTruth, int] | None = None,
) -> GroundTruth:
    """Return the ``depth`` nearest rows of each query by brute force.

    Args:
        parts: (n, D) each, all rows in order; may be memory-mapped.
        queries: (Q, D) unit rows.
        own: (Q,) id of each query's own row. Default: None.
        own_rows: (Q, D) those rows, as stored; they and their exact copies are excluded. Default: None.
        hidden: Sorted ids of rows that are excluded for all queries. Default: None.
        depth: P. Default: 32.
        grown_from: Ground truth of the same queries, with at least ``depth`` neighbours, and the number of rows it was
            computed for. Only later rows are compared. Default: None.
    """
    count = len(queries)
    scores = np.full((count, depth), -np.inf, dtype=np.float32)
    ids = np.full((count, depth), -1, dtype=np.int64)
    compared = 0
    if grown_from is not None:
        before, compared = grown_from
        scores, ids = before.scores.copy(), before.ids.copy()
    hidden = np.zeros(0, np.int64) if hidden is None else hidden
    now_hidden = np.isin(ids, hidden)
    scores[now_hidden], ids[now_hidden] = -np.inf, -1
    first = 0
    for part in parts:
        rows = None  # open a file only if it has rows to compare, and do not keep it mapped
        for start in range(0, len(part), _BLOCK_ROWS):
            begin, end = first + start, first + min(start + _BLOCK_ROWS, len(part))
            if end <= compared:
                continue
            begin = max(begin, compared)
            rows = np.asarray(part) if rows is None else rows
            block = np.ascontiguousarray(rows[begin - first : end - first])
            found = queries @ block.astype(np.float32).T
            found[:, hidden[(hidden >= begin) & (hidden < end)] - begin] = -np.inf
            if own_rows is not None:
                _exclude_copies(found, block, own_rows)
            better = np.flatnonzero((found > scores.min(axis=1, keepdims=True)).any(axis=0))
            scores = np.concatenate([scores, found[:, better]], axis=1)
            ids = np.concatenate([ids, np.broadcast_to(better + begin, (count, len(better)))], axis=1)
            if len(better):
                best = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
                scores, ids = np.take_along_axis(scores, best, axis=1), np.take_along_axis(ids, best, axis=1)
        first += len(part)
    ids[np.isneginf(scores)] = -1
    order = np.lexsort((ids, -scores), axis=1)[:, :depth]
    return GroundTruth(
        queries=queries,
        own=np.full(count, -1, np.int64) if own is None else own,
        ids=np.take_along_axis(ids, order, axis=1),
        scores=np.take_along_axis(scores, order, axis=1),
    )


def recall(database: Database, truth: GroundTruth, k: int = 10) -> float:
    """Return recall@``k`` of ``database``: the mean share of true neighbours found, in [0, 1]; 1 without queries.

    A row counts as found if its score is at least that of the last true neighbour, so the order of ties is irrelevant.
    """
    if not len(truth):
        return 1.0
    own_rows = truth.own_rows
    own = None if own_rows is None else truth.own
    found = database.nearest(truth.queries, k, exclude=own, excluded=own_rows)
    wanted, scores = truth.ids[:, :k] >= 0, truth.scores[:, :k]
    last = np.where(wanted, scores, np.inf).min(axis=1, keepdims=True)
    good = (found.scores >= last - _TIE).sum(axis=1)
    count = wanted.sum(axis=1)
    return float((np.minimum(good, count)[count > 0] / count[count > 0]).mean()) if wanted.any() else 1.0


def brute_force(
    rows: NDArray[np.float16], queries: NDArray[np.float32], k: int, *, exclude: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Return ids (Q, K) of the exact top ``k`` of rows (N, D) for queries (Q, D), −1 if there are fewer rows."""
    own_rows = None if exclude is None else rows[exclude]
    return exact_neighbours([rows], queries, own=exclude, own_rows=own_rows, depth=k).ids


def _exclude_copies(scores: NDArray[np.float32], block: NDArray[np.float16], own: NDArray[np.float16]) -> None:
    """Set the scores (Q, n) of rows of ``block`` (n, D) that equal a query's own row to −inf."""
    bits = block.view(np.uint16)
    near = scores > scores.max(axis=1, keepdims=True) - _COPY_MARGIN
    for query, row in np.argwhere(near):
        if (bits[row] == own[query].view(np.uint16)).all():
            scores[query, row] = -np.inf
