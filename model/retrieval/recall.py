"""Recall@k against brute force on the stored rows, for queries the index was not built from.

Legend: ``Q`` queries, ``P`` true neighbours kept of each, ``D`` embedding width, ``N`` rows.

Image queries are left out one at a time: a row is searched with itself (and its exact copies) excluded, in the index as
in the truth. Text queries are no rows of any database; they lie across CLIP's text gap and are the harder of the two.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model.retrieval.database import Database

DEPTH = 32
"""True neighbours that are kept of each query: more than recall looks at, so that some can be taken down."""
_BLOCK_ROWS = 65_536
_TIE = 1e-5
_COPY_MARGIN = 1e-2  # an exact copy scores within float16 rounding of the best score there is


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """Queries and their true neighbours, to measure a database with, now and after it grew.

    ``queries`` (Q, D) float32; ``own`` (Q,) int64, the query's own row, −1 for a text; ``ids`` (Q, P) int64, −1 where
    nothing is left, and ``scores`` (Q, P) float32, best first.
    """

    queries: NDArray[np.float32]
    own: NDArray[np.int64]
    ids: NDArray[np.int64]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        """Q."""
        return len(self.queries)

    def only(self, queries: NDArray[np.int64] | NDArray[np.bool_]) -> "Truth":
        """Some of the queries."""
        return Truth(
            queries=self.queries[queries], own=self.own[queries], ids=self.ids[queries], scores=self.scores[queries]
        )


def find_truth(
    parts: Sequence[NDArray[np.float16]],
    queries: NDArray[np.float32],
    *,
    own: NDArray[np.int64] | None = None,
    own_rows: NDArray[np.float16] | None = None,
    hidden: NDArray[np.int64] | None = None,
    depth: int = DEPTH,
    grown_from: tuple[Truth, int] | None = None,
) -> Truth:
    """The ``depth`` nearest rows of each query by brute force.

    Args:
        parts: (n, D) each, all rows in order; may be memory-mapped.
        queries: (Q, D) unit rows.
        own: (Q,) rows that must not be found for a query, nor exact copies of them.
        own_rows: (Q, D) those rows as they are stored.
        hidden: sorted ids that must not be found at all.
        depth: P.
        grown_from: what was true of these queries when there were so many rows: only later ones are looked at.
    """
    count = len(queries)
    scores = torch.full((count, depth), -torch.inf)
    ids = torch.full((count, depth), -1)
    known = 0
    if grown_from is not None:
        before, known = grown_from
        scores, ids = torch.from_numpy(before.scores.copy()), torch.from_numpy(before.ids.copy())
    barred = np.zeros(0, np.int64) if hidden is None else hidden
    gone = torch.from_numpy(np.isin(ids.numpy(), barred))
    scores[gone], ids[gone] = -torch.inf, -1
    asked, first = torch.from_numpy(queries), 0
    for part in parts:
        for start in range(0, len(part), _BLOCK_ROWS):
            begin, end = first + start, first + min(start + _BLOCK_ROWS, len(part))
            if end <= known:
                continue
            begin = max(begin, known)
            block = np.ascontiguousarray(part[begin - first : end - first])
            found = asked @ torch.from_numpy(block.astype(np.float32)).T
            found[:, barred[(barred >= begin) & (barred < end)] - begin] = -torch.inf
            if own_rows is not None:
                _leave_out_copies(found, block, own_rows)
            best, places = found.topk(min(depth, end - begin), dim=1)
            scores, order = torch.cat([scores, best], dim=1).topk(depth, dim=1)
            ids = torch.cat([ids, places + begin], dim=1).gather(1, order)
        first += len(part)
    ids[scores == -torch.inf] = -1
    order_ = np.lexsort((ids.numpy(), -scores.numpy()), axis=1)
    return Truth(
        queries=queries,
        own=np.full(count, -1, np.int64) if own is None else own,
        ids=np.take_along_axis(ids.numpy(), order_, axis=1),
        scores=np.take_along_axis(scores.numpy(), order_, axis=1),
    )


def recall(database: Database, truth: Truth, k: int = 10) -> float:
    """Share of the ``k`` true neighbours that ``database`` finds.

    A found row counts when it scores as high as the last true one: which of several equal rows comes last is no merit.
    """
    if not len(truth):
        return 1.0
    own = None if (truth.own < 0).all() else truth.own
    found = database.search(truth.queries, k, exclude=own)
    wanted, scores = truth.ids[:, :k] >= 0, truth.scores[:, :k]
    last = np.where(wanted, scores, np.inf).min(axis=1, keepdims=True)
    good = (found.scores >= last - _TIE).sum(axis=1)
    asked = wanted.sum(axis=1)
    return float((np.minimum(good, asked)[asked > 0] / asked[asked > 0]).mean()) if wanted.any() else 1.0


def brute_force(
    rows: NDArray[np.float16], queries: NDArray[np.float32], k: int, *, exclude: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Ids (Q, K) of the exact top ``k``, −1 where nothing is left: rows (N, D) may be memory-mapped, queries (Q, D)."""
    own_rows = None if exclude is None else rows[exclude]
    return find_truth([rows], queries, own=exclude, own_rows=own_rows, depth=k).ids


def _leave_out_copies(scores: torch.Tensor, block: NDArray[np.float16], own: NDArray[np.float16]) -> None:
    """Give the rows of ``block`` (n, D) that equal a query's own row no chance in its scores (Q, n)."""
    bits = block.view(np.uint16)
    near = scores > scores.amax(dim=1, keepdim=True) - _COPY_MARGIN
    for query, place in near.nonzero().tolist():
        if (bits[place] == own[query].view(np.uint16)).all():
            scores[query, place] = -torch.inf
