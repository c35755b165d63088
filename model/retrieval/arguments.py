"""Validation of search arguments, shared by all database implementations.

Legend: ``Q`` queries, ``K`` neighbours, ``D`` embedding width, ``N`` rows.
"""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.encoder.identity import EncoderIdentity
from model.errors import ModelError

_UNIT_MARGIN = 1e-2  # float16 rows deviate from unit length by about 1e-3


def checked_queries(queries: Any, name: str, encoder: EncoderIdentity) -> NDArray[np.float32]:
    """Return ``queries`` as (Q, D) float32. Raise ``ModelError`` unless they are unit rows of the right width."""
    given = np.asarray(queries)
    if given.dtype.kind not in "fiu":
        raise ModelError(f"queries to database {name} are not numeric: {given.dtype}; embed texts and images first")
    if given.ndim != 2 or given.shape[1] != encoder.dimension:
        raise ModelError(
            f"queries have the wrong shape: {given.shape} for database {name} of {encoder}; "
            f"pass an array (Q, {encoder.dimension})"
        )
    rows = np.ascontiguousarray(given, dtype=np.float32)
    if not len(rows) or not np.isfinite(rows).all():
        raise ModelError(f"queries to database {name} are empty or not finite; check the embedded texts and images")
    lengths = np.sqrt(np.einsum("qd,qd->q", rows, rows))
    if len(wrong := np.flatnonzero(np.abs(lengths - 1) > _UNIT_MARGIN)):
        raise ModelError(
            f"query {wrong[0]} to database {name} is not a unit vector: length {lengths[wrong[0]]:.3g}; "
            "divide each row by its length"
        )
    return rows


def checked_count(k: Any) -> int:
    """Return ``k`` as an int. Raise ``ModelError`` unless it is an integer of at least 1."""
    try:
        count = operator.index(k)
    except TypeError:
        raise ModelError(f"k is not an integer: {k!r}; pass the number of neighbours") from None
    if count < 1:
        raise ModelError(f"k is below 1: {count}; request at least one neighbour")
    return count


def checked_ids(ids: Any, rows: int, name: str) -> NDArray[np.int64]:
    """Return ``ids`` as int64. Raise ``ModelError`` unless all are integers in [0, ``rows``)."""
    given = np.asarray(ids)
    if given.size and given.dtype.kind not in "iu":
        raise ModelError(f"row ids of database {name} are not integers: {given.dtype}; pass integer ids")
    wrong = given[(given < 0) | (given >= rows)] if given.size else given
    if wrong.size:
        raise ModelError(f"database {name} has no row {int(wrong.flat[0])}; use ids from 0 to {rows - 1}")
    return given.astype(np.int64)


def checked_exclusion(exclude: Any, queries: int, rows: int, name: str) -> NDArray[np.int64]:
    """Return ``exclude`` as (Q,) int64. Raise ``ModelError`` unless it has one row id for each query."""
    given = checked_ids(exclude, rows, name)
    if given.shape != (queries,):
        raise ModelError(f"exclude has the wrong shape: {given.shape} for {queries} queries; pass one row id for each")
    return given


def checked_rows(ids: Sequence[int], rows: int, name: str) -> list[int]:
    """Return row ids as a list of int, for metadata look-ups. Raises ``ModelError`` as :func:`checked_ids` does."""
    return [int(row) for row in checked_ids(list(ids), rows, name)]
