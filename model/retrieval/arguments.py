"""What a search may be asked, checked before anything is looked for: every database takes the same, and says the same.

Legend: ``Q`` queries, ``K`` neighbours, ``D`` embedding width, ``N`` rows.
"""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.encoder.identity import EncoderIdentity
from model.errors import ModelError

_UNIT_MARGIN = 1e-2  # float16 rows stray from unit length by a thousandth


def checked_queries(queries: Any, name: str, encoder: EncoderIdentity) -> NDArray[np.float32]:
    """``queries`` as (Q, D) float32. Raises ``ModelError`` unless they are unit rows of the width of ``encoder``."""
    given = np.asarray(queries)
    if given.dtype.kind not in "fiu":
        raise ModelError(f"queries to database {name} are {given.dtype}, not numbers; embed texts and pictures first")
    if given.ndim != 2 or given.shape[1] != encoder.dimension:
        raise ModelError(f"queries {given.shape} do not fit database {name} of {encoder}")
    rows = np.ascontiguousarray(given, dtype=np.float32)
    if not len(rows) or not np.isfinite(rows).all():
        raise ModelError("there is no query, or one that is not finite; look at what was embedded")
    lengths = np.sqrt(np.einsum("qd,qd->q", rows, rows))
    if len(wrong := np.flatnonzero(np.abs(lengths - 1) > _UNIT_MARGIN)):
        raise ModelError(
            f"query {wrong[0]} to database {name} has length {lengths[wrong[0]]:.3g}, a cosine takes unit rows; "
            "divide each row by its length"
        )
    return rows


def checked_count(k: Any) -> int:
    """``k`` as a whole number. Raises ``ModelError`` unless it is one, and at least 1."""
    try:
        count = operator.index(k)
    except TypeError:
        raise ModelError(f"k is {k!r}; ask for a whole number of neighbours") from None
    if count < 1:
        raise ModelError(f"k is {count}; ask for at least one neighbour")
    return count


def checked_ids(ids: Any, rows: int, name: str) -> NDArray[np.int64]:
    """``ids`` as int64. Raises ``ModelError`` unless all are ids of a database of ``rows`` rows."""
    given = np.asarray(ids)
    if given.size and given.dtype.kind not in "iu":
        raise ModelError(f"row ids of database {name} are whole numbers, not {given.dtype}")
    wrong = given[(given < 0) | (given >= rows)] if given.size else given
    if wrong.size:
        raise ModelError(f"database {name} has no row {int(wrong.flat[0])}; its ids go from 0 to {rows - 1}")
    return given.astype(np.int64)


def checked_exclusion(exclude: Any, queries: int, rows: int, name: str) -> NDArray[np.int64]:
    """``exclude`` as (Q,) int64. Raises ``ModelError`` unless it is a row id for each query."""
    given = checked_ids(exclude, rows, name)
    if given.shape != (queries,):
        raise ModelError(f"exclude has shape {given.shape} for {queries} queries; give one row id each")
    return given


def checked_rows(ids: Sequence[int], rows: int, name: str) -> list[int]:
    """Row ids as a list, for what is known of them. Raises ``ModelError`` as :func:`checked_ids` does."""
    return [int(row) for row in checked_ids(list(ids), rows, name)]
