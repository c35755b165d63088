"""Stored embeddings of a shard, checked as they are opened."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infra import artifacts
from infra.formats.arrays import read_array, require_finite


def stored_rows(uri: str, shard: artifacts.Shard, cache: Path) -> NDArray[np.float16]:
    """The embeddings (rows, D) of a shard of the embedding shards at ``uri``, verified and memory-mapped.

    Raises ``IntegrityError`` when they are not what was committed, or not as many float16 rows as the shard has.
    """
    return read_array(artifacts.fetch_shard(uri, shard, ".npy", cache), np.float16, (shard.rows, None))


def finite_rows(uri: str, shard: artifacts.Shard, cache: Path) -> NDArray[np.float16]:
    """:func:`stored_rows` for a caller that reads all of them. Raises ``IntegrityError`` for a row with NaN in it."""
    rows = stored_rows(uri, shard, cache)
    require_finite(rows, f"shard {shard.name} of {uri}")
    return rows
