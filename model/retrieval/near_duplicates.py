"""Near-duplicates: rows so close to an earlier row that a search should return only one of them.

Legend: ``Q`` query rows, ``D`` embedding width, ``P`` cells visited by each.

A few rows are searched like any query. With many rows each cell is visited often, and FAISS would read it for each
visit. One matrix product of all its visitors with all its rows finds the same pairs faster.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from model.retrieval.database import Database
from model.retrieval.shard_search import StackedIVF

NEAREST = 10
"""Neighbours searched for each row: enough to connect a group of copies, since each row has others of it nearby."""
_VISITORS = 16  # mean visitors per cell from which one product per cell is faster
_BLOCK_SCORES = 1 << 22  # scores in memory at once
_ROUNDING = 1e-6
_BATCH = 1024


def find_pairs(database: Database, rows: NDArray[np.float16], first: int, bound: float) -> NDArray[np.int64]:
    """Return pairs (n, 2) of ids, lower first, with a cosine of at least ``bound``; one of each pair is in ``rows``.

    Args:
        database: the database, which contains ``rows``.
        rows: (Q, D) float16, as stored, with consecutive ids.
        first: id of the first row.
        bound: minimum cosine, in [−1, 1].
    """
    cells, nprobe = database.proposer, database.effort.nprobe
    whole = len(database) == database.stored  # hidden rows need a search, which leaves them out
    if whole and isinstance(cells, StackedIVF) and cells.exact and len(rows) * nprobe >= _VISITORS * cells.cells:
        found = _by_cell(cells, rows, first, bound, nprobe)
    else:
        found = _by_search(database, rows, first, bound)
    return np.unique(np.concatenate([np.zeros((0, 2), np.int64), *found]), axis=0)


def _by_search(database: Database, rows: NDArray[np.float16], first: int, bound: float) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        hits = database.nearest(batch, min(NEAREST + 1, len(database)))
        own = first + start + np.arange(len(hits.ids))[:, None]
        near = (hits.scores >= _least(batch.astype(np.float32), bound)) & (hits.ids >= 0) & (hits.ids != own)
        yield np.sort(np.stack([np.broadcast_to(own, near.shape)[near], hits.ids[near]], axis=1), axis=1)


def _by_cell(
    cells: StackedIVF, rows: NDArray[np.float16], first: int, bound: float, nprobe: int
) -> Iterator[NDArray[np.int64]]:
    queries = rows.astype(np.float32)
    least = _least(queries, bound)
    visited = cells.visited(queries, nprobe)
    order = np.argsort(visited, axis=None)
    numbers, starts = np.unique(visited.reshape(-1)[order], return_index=True)
    for number, places in zip(numbers, np.split(order // visited.shape[1], starts[1:]), strict=True):
        if number < 0:
            continue
        there, ids = cells.cell(int(number))
        for visitors in np.array_split(places, 1 + len(places) * len(ids) // _BLOCK_SCORES):
            near = queries[visitors] @ there.T >= least[visitors]
            near &= ids != first + visitors[:, None]
            crowded = np.flatnonzero(np.count_nonzero(near, axis=1) > NEAREST)
            near[crowded] = _few(near[crowded], ids < first + visitors[crowded, None])
            one, other = np.nonzero(near)
            yield np.sort(np.stack([first + visitors[one], ids[other]], axis=1), axis=1)


def _few(near: NDArray[np.bool_], lower: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Limit near rows (Q, n) to the first ones, and the last ones with a ``lower`` id.

    A group then stays connected when some of its rows are taken down: each row links to the group's first rows and to
    the rows just before it.
    """
    lower = near & lower
    next_to = np.cumsum(lower[:, ::-1], axis=1)[:, ::-1] <= NEAREST // 2
    few: NDArray[np.bool_] = near & (np.cumsum(near, axis=1) <= NEAREST // 2) | lower & next_to
    return few


def _least(rows: NDArray[np.float32], bound: float) -> NDArray[np.float32]:
    """Return the minimum score (Q, 1) of a near-duplicate of each of ``rows``.

    It is scaled by the squared length, since float16 rows are not exactly unit vectors and exact copies must count.
    """
    least: NDArray[np.float32] = bound * np.square(rows).sum(axis=1, keepdims=True) - _ROUNDING
    return least


def duplicates_to_hide(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return all ids but the lowest of every group connected by ``pairs`` (n, 2), sorted."""
    if not len(pairs):
        return np.empty(0, dtype=np.int64)
    ids, nodes = np.unique(pairs, return_inverse=True)
    one, other = nodes.reshape(-1, 2).T
    graph = coo_array((np.ones(len(one), dtype=np.bool_), (one, other)), shape=(len(ids), len(ids)))
    _, groups = connected_components(graph, directed=False)
    _, lowest = np.unique(groups, return_index=True)  # the ids are sorted, so the first of a group is the lowest
    hidden: NDArray[np.int64] = np.delete(ids, lowest)
    return hidden
