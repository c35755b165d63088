"""Near-duplicates: rows so close to an earlier one that a search returning both would say the same thing twice.

Legend: ``Q`` rows asked about, ``D`` embedding width, ``P`` cells that each visits.

A few rows are looked for as any query is. Of many, a cell has many visitors, and FAISS would read it once for each: one
matrix product of all visitors with all rows of the cell finds the same sooner.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from model.retrieval.database import Database
from model.retrieval.shard_search import StackedIVF

NEAREST = 10
"""Neighbours looked at of each row: enough to connect a group of copies, for each of its rows has others of it near."""
_VISITORS = 16  # so many a cell make it worthwhile to read it for all of them at once
_BLOCK_SCORES = 1 << 22  # held at once
_ROUNDING = 1e-6
_BATCH = 1024


def find_pairs(database: Database, rows: NDArray[np.float16], first: int, bound: float) -> NDArray[np.int64]:
    """Pairs (n, 2) of ids, lower first, whose cosine is at least ``bound``; one of each is among ``rows``.

    Args:
        database: where to look; it holds ``rows``.
        rows: (Q, D) as stored.
        first: the id of the first of them.
        bound: cosine.
    """
    cells, nprobe = database.proposer, database.effort.nprobe
    whole = len(database) == database.stored  # a search alone knows what is hidden
    if whole and isinstance(cells, StackedIVF) and cells.exact and len(rows) * nprobe >= _VISITORS * cells.cells:
        found = _by_cell(cells, rows, first, bound, nprobe)
    else:
        found = _by_search(database, rows, first, bound)
    return np.unique(np.concatenate([np.zeros((0, 2), np.int64), *found]), axis=0)


def _by_search(database: Database, rows: NDArray[np.float16], first: int, bound: float) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(rows), _BATCH):
        asked = rows[start : start + _BATCH]
        hits = database.nearest(asked, min(NEAREST + 1, len(database)))
        own = first + start + np.arange(len(hits.ids))[:, None]
        near = (hits.scores >= _least(asked.astype(np.float32), bound)) & (hits.ids >= 0) & (hits.ids != own)
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
    """Of the rows (Q, n) that are near, the first ones, and the last ones of a ``lower`` id.

    So a group stays connected when rows of it are taken down: by whom all are near to, and from each to the next.
    """
    lower = near & lower
    next_to = np.cumsum(lower[:, ::-1], axis=1)[:, ::-1] <= NEAREST // 2
    few: NDArray[np.bool_] = near & (np.cumsum(near, axis=1) <= NEAREST // 2) | lower & next_to
    return few


def _least(rows: NDArray[np.float32], bound: float) -> NDArray[np.float32]:
    """(Q, 1) the score at which a row is near each of ``rows``.

    float16 leaves rows a little off length 1: exact copies must count under any bound.
    """
    least: NDArray[np.float32] = bound * np.square(rows).sum(axis=1, keepdims=True) - _ROUNDING
    return least


def duplicates_to_hide(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of every group that ``pairs`` (n, 2) connect, all ids but the lowest: what is left out to keep one of each."""
    lowest: dict[int, int] = {}

    def root(node: int) -> int:
        while lowest.setdefault(node, node) != node:
            lowest[node] = lowest[lowest[node]]
            node = lowest[node]
        return node

    for one, other in pairs.tolist():
        a, b = root(one), root(other)
        lowest[max(a, b)] = min(a, b)
    return np.array(sorted(node for node in list(lowest) if root(node) != node), dtype=np.int64)
