"""Recall@k against brute force on the stored rows, for queries the index was not built from.

Image queries are left out one at a time: a row is searched with itself (and its exact copies) excluded, in the index as
in the truth. Text queries are no rows of any database; they lie across CLIP's text gap and are the harder of the two.
"""

import numpy as np
from numpy.typing import NDArray

from model.retrieval.database import Database

_BLOCK_ROWS = 65_536
_TIE = 1e-5
_COPY_MARGIN = 1e-2  # an exact copy scores within float16 rounding of the best score there is


def recall(
    database: Database, queries: NDArray[np.float32], found: NDArray[np.int64], truth: NDArray[np.int64]
) -> float:
    """Share of the true neighbours that were found: ids (Q, K) both, in any order.

    A found row counts when it scores as high as the last true one: which of several equal rows comes last is no merit.
    """
    best = _scores(database, queries, truth)
    last = np.where(truth < 0, np.inf, best).min(axis=1, keepdims=True)
    good = (_scores(database, queries, found) >= last - _TIE).sum(axis=1)
    wanted = (truth >= 0).sum(axis=1)
    return float((good[wanted > 0] / wanted[wanted > 0]).mean()) if wanted.any() else 1.0


def brute_force(
    rows: NDArray[np.float16], queries: NDArray[np.float32], k: int, *, exclude: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Ids (Q, K) of the exact top ``k``, −1 where nothing is left: rows (N, D) may be memory-mapped, queries (Q, D)."""
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    own = None if exclude is None else rows[exclude]
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        scores = queries @ block.astype(np.float32).T
        if own is not None:
            for position, row in enumerate(own):
                same = scores[position] > scores[position].max() - _COPY_MARGIN
                copies = np.flatnonzero(same)
                scores[position, copies[(block[copies] == row).all(axis=1)]] = -np.inf
        scores = np.concatenate([best, scores], axis=1)
        known = np.concatenate(
            [ids, np.broadcast_to(np.arange(start, start + len(block)), (len(ids), len(block)))], axis=1
        )
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best, ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(known, order, axis=1)
    return np.where(np.isneginf(best), -1, ids)


def recall_at_k(
    database: Database,
    rows: NDArray[np.float16],
    queries: NDArray[np.float32],
    *,
    k: int = 10,
    exclude: NDArray[np.int64] | None = None,
) -> float:
    """Recall of ``database`` for queries (Q, D), the truth found in ``rows`` (N, D), all of the database's."""
    k = min(k, len(rows) - (exclude is not None))
    if k < 1 or not len(queries):
        return 1.0
    found = database.search(queries, k, exclude=exclude).ids
    return recall(database, queries, found, brute_force(rows, queries, k, exclude=exclude))


def _scores(database: Database, queries: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    scores = np.einsum("qd,qkd->qk", queries, database.rows(np.maximum(ids, 0)), dtype=np.float32)
    return np.where(ids < 0, -np.inf, scores).astype(np.float32)
