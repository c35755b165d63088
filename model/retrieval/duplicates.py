"""Near-duplicates: rows so close to an earlier one that a search returning both would say the same thing twice.

Legend: ``Q`` rows asked about, ``D`` embedding width.
"""

import numpy as np
from numpy.typing import NDArray

from model.retrieval.database import Database

NEAREST = 10
"""Neighbours looked at of each row: enough to connect a group of copies, for each of its rows has others of it near."""


def find_pairs(
    database: Database, rows: NDArray[np.float16], first: int, bound: float, *, batch: int = 1024
) -> NDArray[np.int64]:
    """Pairs (n, 2) of ids, lower first, whose cosine is at least ``bound``; one of each is among ``rows``.

    Args:
        database: where to look; it holds ``rows``.
        rows: (Q, D) as stored.
        first: the id of the first of them.
        bound: cosine.
        batch: rows searched at once.
    """
    found = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(rows), batch):
        hits = database.nearest(rows[start : start + batch], min(NEAREST + 1, len(database)))
        own = first + start + np.arange(len(hits.ids))[:, None]
        # float16 leaves rows a little off length 1: exact copies must count under any bound.
        length = np.square(rows[start : start + batch].astype(np.float32)).sum(axis=1, keepdims=True)
        near = (hits.scores >= bound * length - 1e-6) & (hits.ids >= 0) & (hits.ids != own)
        pairs = np.stack([np.broadcast_to(own, near.shape)[near], hits.ids[near]], axis=1)
        found.append(np.sort(pairs, axis=1))
    return np.unique(np.concatenate(found), axis=0)


def later_ones(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
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
