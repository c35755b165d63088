"""Which FAISS index for which size.

| rows | factory string | why |
| --- | --- | --- |
| up to 100,000 | ``Flat`` | exact within milliseconds; nothing to train or tune |
| up to 10 million | ``IVF{4√n},Flat`` | visits a few cells of exact rows; recall is a matter of nprobe alone |
| beyond | ``OPQ{D/4}_{D},IVF{4√n}_HNSW32,PQ{D/4}x8`` | two bits a dimension |

Any other FAISS factory string may be named instead. Rows are unit vectors, so the inner product is the cosine.
"""

import math
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from model.errors import ModelError

FLAT_ROWS = 100_000
IVF_FLAT_ROWS = 10_000_000
TRAIN_ROWS_PER_CELL = 40  # FAISS warns below 39


def choose_index(rows: int, dimension: int) -> str:
    """The factory string for ``rows`` × ``dimension``, by the table above."""
    if rows <= FLAT_ROWS:
        return "Flat"
    cells = 1 << round(math.log2(4 * math.sqrt(rows)))
    if rows <= IVF_FLAT_ROWS:
        return f"IVF{cells},Flat"
    parts = max(1, dimension // 4)
    return f"OPQ{parts}_{parts * 4},IVF{cells}_HNSW32,PQ{parts}x8"


def train_index(factory: str, dimension: int, sample: NDArray[np.float32]) -> faiss.Index:
    """An empty index whose quantizer is trained on ``sample`` (n, D) float32. Raises ``ModelError``.

    One trained index is the template of every shard, so that shards are comparable and can be merged.
    """
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(f"{factory!r} is no FAISS factory string for {dimension} dimensions ({reason})") from error
    if not index.is_trained:
        try:
            index.train(sample)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ModelError(
                f"{factory!r} cannot be trained on {len(sample)} rows ({reason}); take a smaller one"
            ) from error
    return index


def training_rows(factory: str, rows: int) -> int:
    """How many rows the quantizer of ``factory`` wants to see, at most ``rows``; 0 when there is nothing to train."""
    probe = faiss.index_factory(64, factory, faiss.METRIC_INNER_PRODUCT) if factory == "Flat" else None
    if probe is not None and probe.is_trained:
        return 0
    cells = 256
    for part in factory.split(","):
        digits = part.removeprefix("IVF").split("_")[0]
        if part.startswith("IVF") and digits.isdigit():
            cells = max(cells, int(digits))
    return min(rows, cells * TRAIN_ROWS_PER_CELL)


def fill_shard(template: Path, rows: NDArray[np.float16], output: Path) -> None:
    """Add ``rows`` (n, D) to a copy of the trained ``template`` and write it to ``output``; ids are positions."""
    index = faiss.read_index(str(template))
    for start in range(0, len(rows), 65_536):
        index.add(np.ascontiguousarray(rows[start : start + 65_536], dtype=np.float32))
    output.parent.mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(output))
