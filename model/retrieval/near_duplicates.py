"""Near-duplicates: rows so close to an earlier row that a search should return only one of them.

Legend: ``Q`` query rows, ``D`` embedding width, ``P`` cells visited by each.

A few query rows are searched like any query. With many, each cell is visited often, and FAISS would read it for each
visit. One matrix product of all query rows that visit a cell with all its rows finds the same pairs faster.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from model.retrieval.database import Database
from model.retrieval.shard_search import StackedIVF

NEAREST = 10
"""Neighbours searched for each row: enough to connect a group of copies through its members' nearest ones."""
_VISITORS = 16  # minimum mean number of query rows per cell for which one product per cell is faster
_BLOCK_SCORES = 1 << 22  # scores in memory at once
_ROUNDING = 1e-6
_BATCH = 1024


def find_pairs(database: Database, rows: NDArray[np.float16], first: int, bound: float) -> NDArray[np.int64]:
    """Return pairs (n, 2) of ids, lower first, with a cosine of at least ``bound``; one of each pair is in ``rows``.

    Args:
        database: The database, which contains ``rows``.
        rows: (Q, D) float16, as stored, with consecutive ids.
        first: Id of the first row.
        bound: Minimum cosine, in [−1, 1].
    """
    index, nprobe = database.candidate_search, database.effort.nprobe
    all_visible = len(database) == database.stored  # only a search excludes hidden rows
    if all_visible and isinstance(index, StackedIVF) and index.exact and len(rows) * nprobe >= _VISITORS * index.cells:
        found = _pairs_by_cell(index, rows, first, bound, nprobe)
    else:
        found = _pairs_by_search(database, rows, first, bound)
    return np.unique(np.concatenate([np.zeros((0, 2), np.int64), *found]), axis=0)


def _pairs_by_search(
    database: Database, rows: NDArray[np.float16], first: int, bound: float
) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        hits = database.nearest(batch, min(NEAREST + 1, len(database)))
        own = first + start + np.arange(len(hits.ids))[:, None]
        near = (hits.scores >= _minimum_scores(batch.astype(np.float32), bound)) & (hits.ids >= 0) & (hits.ids != own)
        yield np.sort(np.stack([np.broadcast_to(own, near.shape)[near], hits.ids[near]], axis=1), axis=1)


def _pairs_by_cell(
    index: StackedIVF, rows: NDArray[np.float16], first: int, bound: float, nprobe: int
) -> Iterator[NDArray[np.int64]]:
    queries = rows.astype(np.float32)
    minimum = _minimum_scores(queries, bound)
    visited = index.visited_cells(queries, nprobe)
    order = np.argsort(visited, axis=None)
    cells, starts = np.unique(visited.reshape(-1)[order], return_index=True)
    for cell, visitors in zip(cells, np.split(order // visited.shape[1], starts[1:]), strict=True):
        if cell < 0:
            continue
        cell_rows, ids = index.read_cell(int(cell))
        for some in np.array_split(visitors, 1 + len(visitors) * len(ids) // _BLOCK_SCORES):
            near = queries[some] @ cell_rows.T >= minimum[some]
            near &= ids != first + some[:, None]
            many = np.flatnonzero(np.count_nonzero(near, axis=1) > NEAREST)
            near[many] = _limit_links(near[many], ids < first + some[many, None])
            one, other = np.nonzero(near)
            yield np.sort(np.stack([first + some[one], ids[other]], axis=1), axis=1)


def _limit_links(near: NDArray[np.bool_], lower: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Limit the near-duplicates (Q, n) of each query row to the first ones, and the last ones with a ``lower`` id.

    Each row then links to the first rows of its group and to the rows just before it. The group thus remains connected
    when some of its rows are taken down.
    """
    lower = near & lower
    just_before = np.cumsum(lower[:, ::-1], axis=1)[:, ::-1] <= NEAREST // 2
    limited: NDArray[np.bool_] = near & (np.cumsum(near, axis=1) <= NEAREST // 2) | lower & just_before
    return limited


def _minimum_scores(rows: NDArray[np.float32], bound: float) -> NDArray[np.float32]:
    """Return the minimum score (Q, 1) of a near-duplicate of each of ``rows``.

    It is scaled by the squared length, since float16 rows are not exactly unit vectors and exact copies must count.
    """
    minimum: NDArray[np.float32] = bound * np.square(rows).sum(axis=1, keepdims=True) - _ROUNDING
    return minimum


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
