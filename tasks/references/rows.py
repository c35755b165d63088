"""Stored embeddings of a shard, checked when they are opened."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infra import artifacts
from infra.formats.arrays import read_array, require_finite

PART = "part"
"""Key in the info of an embedding shard that omits images of its tar on purpose, as in a subset."""


def stored_rows(uri: str, shard: artifacts.Shard, cache: Path) -> NDArray[np.float16]:
    """Return the (rows, D) float16 embeddings of a shard at ``uri``, verified and memory-mapped.

    Raises ``IntegrityError`` if the file differs from the committed one, or its dtype or number of rows is wrong.
    """
    return read_array(artifacts.fetch_shard(uri, shard, ".npy", cache), np.float16, (shard.rows, None))


def finite_rows(uri: str, shard: artifacts.Shard, cache: Path) -> NDArray[np.float16]:
    """Return :func:`stored_rows` after checking every value. Raises ``IntegrityError`` for NaN or infinite values.

    For callers that read all rows anyway.
    """
    rows = stored_rows(uri, shard, cache)
    require_finite(rows, f"shard {shard.name} of {uri}")
    return rows
