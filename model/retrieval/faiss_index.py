"""Choice of the FAISS index by size, and training of its quantizer.

Legend: ``n`` rows, ``D`` embedding width, ``b`` bytes per row in the memory budget, without the id.

| rows | b | factory string | why |
| --- | --- | --- | --- |
| up to 32,768 | any | ``Flat`` | exact within a millisecond; no training or tuning |
| more | 2D | ``IVF{4√n},SQfp16`` | visits a few cells; codes equal the stored rows, so recall depends on nprobe alone |
| more | D | ``IVF{4√n},SQ8`` | as fast in half the memory; re-ranking 20 candidates compensates for rounding |
| more | less | ``OPQ{M},IVF{4√n},PQ{M}x8`` | M = D/2, D/4 or D/8 bytes, the largest that fits |

More than 8,192 cells are trained by two-level clustering, and their centroids are searched with a graph (``_HNSW32``).
Comparing each query with all centroids would cost more than comparing it with the rows of the visited cells.

PQ fast-scan is never chosen. Its 4 bits per subvector reach a recall of 0.82 where 8 bits reach 0.99, and its blocks
cannot be searched across shards at once. A factory string given by the user is used unchanged. Rows are unit vectors:
the inner product is the cosine.
"""

import math
import re
from typing import Any

import faiss
import numpy as np
from faiss.contrib.clustering import two_level_clustering
from numpy.typing import NDArray

from model.errors import ModelError
from model.retrieval.limits import MAX_CELLS

FLAT_ROWS = 32_768
GRAPH_CELLS = 8_192
GRAPH_EFFORT = 64  # efSearch: 99.3% of rows find their cell; FAISS's default of 16 finds 88%, at any nprobe
TRAIN_ROWS_PER_CELL = 40  # FAISS warns below 39
PQ_TRAIN_ROWS = 16_384  # 64 for each of a subvector's 256 centroids; more do not help and cost minutes
MEMORY_BYTES = 8 << 30

_UNSUPPORTED = {
    "IDMap": "ids are already the rows' positions",
    "NSG": "rows cannot be added to its graph in batches",
}
"""Parts of factory strings that FAISS accepts and sharded databases do not support, with the reason."""


def choose_index(rows: int, dimension: int, memory_bytes: int = MEMORY_BYTES) -> str:
    """Return the factory string for ``rows`` × ``dimension`` by the table above. Raise ``ModelError`` if none fits.

    ``memory_bytes`` limits the index's size in the memory of a searching process; stored rows are read from disk.
    """
    if rows <= FLAT_ROWS:
        return "Flat"
    cells = 1 << round(math.log2(4 * math.sqrt(rows)))
    coarse = f"IVF{cells}" + ("_HNSW32" if cells > GRAPH_CELLS else "")
    budget = memory_bytes / rows - 8  # 8 bytes for the id
    if budget >= 2 * dimension:
        return f"{coarse},SQfp16"
    if budget >= dimension:
        return f"{coarse},SQ8"
    for width in (2, 4, 8):
        subvectors = dimension // width
        if 0 < subvectors <= budget:
            return f"OPQ{subvectors}_{subvectors * width},{coarse},PQ{subvectors}x8"
    raise ModelError(
        f"memory_bytes is too small: {memory_bytes >> 20} MiB, but an index of {rows} rows of {dimension} values needs "
        f"at least {(dimension // 8 + 8) * rows >> 20} MiB; raise it (--memory), or split the database over machines"
    )


def train_index(factory: str, dimension: int, sample: NDArray[np.float32]) -> faiss.Index:
    """Return an empty index whose quantizer is trained on ``sample`` (n, D) float32, on all GPUs that FAISS finds.

    The trained index is the template of every shard, so shards are comparable and can be searched as one.

    Raises:
        ModelError: The factory string is unknown or unsupported, or there are too few rows to train it.
    """
    index = require_factory(factory, dimension)
    cells = ivf_of(index)
    if isinstance(cells, faiss.IndexIVFScalarQuantizer) and is_lossless(index):
        cells.by_residual = False  # makes the code of a row the row itself
    _bound_training(index, cells)
    if cells is not None and isinstance(graph := faiss.downcast_index(cells.quantizer), faiss.IndexHNSW):
        graph.hnsw.efSearch = GRAPH_EFFORT  # saved with the template, so shards are filled with it, too
    if index.is_trained:
        return index
    try:
        if cells is not None and faiss.get_num_gpus():
            flat = faiss.IndexFlatIP(cells.d)
            cells.clustering_index = faiss.index_cpu_to_all_gpus(flat)
        if isinstance(cells, faiss.IndexIVF) and cells.nlist > GRAPH_CELLS:
            _cluster_in_two_levels(index, cells, sample)
        index.train(sample)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"index {factory!r} cannot be trained on {len(sample)} rows: {_faiss_reason(error)}; use a smaller index"
        ) from error
    return index


def require_factory(factory: str, dimension: int) -> faiss.Index:
    """Return the untrained index of a factory string. Raise ``ModelError`` if sharded databases do not support it."""
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ModelError(
            f"invalid FAISS factory string for {dimension} dimensions: {factory!r} ({_faiss_reason(error)}); "
            "use auto, or a string such as IVF1024,SQfp16"
        ) from error
    if (cells := ivf_of(index)) is not None and cells.nlist > MAX_CELLS:
        raise ModelError(f"index {factory!r} has too many cells: {cells.nlist}; use at most {MAX_CELLS}")
    for name, why in _UNSUPPORTED.items():
        if re.search(rf"\b{name}", factory):
            raise ModelError(f"index {factory!r} is not supported: {why}; use auto, or leave {name} out")
    return index


def code_type(factory: str) -> str:
    """Return the factory string without its number of cells: the type of its codes."""
    return re.sub(r"IVF\d+(_HNSW\d+)?", "IVF", factory)


def memory_needed(factory: str, rows: int, dimension: int) -> int:
    """Return the bytes of codes and ids in an index of ``rows`` × ``dimension``; 0 for an index without cells."""
    cells = ivf_of(faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT))
    return 0 if cells is None else rows * (int(cells.code_size) + 8)


def _faiss_reason(error: Exception) -> str:
    """Return the reason in FAISS's message, without the location in its source code."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return re.sub(r"^Error in .*? at \S+:\d+: ", "", lines[-1]).removeprefix("Error: ").strip()


def training_rows(factory: str, rows: int) -> int:
    """Return the number of training rows for the quantizer of ``factory``: at most ``rows``, 0 for ``Flat``."""
    if factory == "Flat":
        return 0
    cells = [int(number) for number in re.findall(r"IVF(\d+)", factory)]
    wanted = max(256 * TRAIN_ROWS_PER_CELL, *(number * TRAIN_ROWS_PER_CELL for number in cells), 0)
    return min(rows, max(wanted, PQ_TRAIN_ROWS) if "PQ" in factory else wanted)


def ivf_of(index: Any) -> Any:
    """Return the IVF part of an index, downcast to its own class, or None if it has no cells."""
    cells = faiss.try_extract_index_ivf(index)
    return None if cells is None else faiss.downcast_index(cells)


def is_lossless(index: Any) -> bool:
    """Return True if the index scores rows as stored: as float32, or as the same float16 values."""
    if isinstance(index, faiss.IndexFlat):
        return True
    if isinstance(index, faiss.IndexPreTransform):
        return False
    cells = ivf_of(index)
    if isinstance(cells, faiss.IndexIVFScalarQuantizer):
        return bool(cells.sq.qtype == faiss.ScalarQuantizer.QT_fp16)
    return isinstance(cells, faiss.IndexIVFFlat)


def is_stackable(index: Any) -> bool:
    """Return True if shards of this index can be searched as one: inverted lists of plain codes with one quantizer."""
    cells = ivf_of(index)
    plain = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
    return isinstance(cells, plain) and not isinstance(index, faiss.IndexRefine)


def quantization_error(index: Any, sample: NDArray[np.float32]) -> float:
    """Return the mean of 1 − cosine between rows of ``sample`` (n, D) and their centroids; 0 without cells or rows."""
    cells = ivf_of(index)
    if cells is None or not len(sample):
        return 0.0
    return float((1 - cells.quantizer.search(_transformed(index, sample), 1)[0]).mean())


def _transformed(index: Any, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Apply the index's rotation (OPQ), if it has one."""
    rotation = _rotation(index)
    return rows if rotation is None else rotation.apply(rows)


def _rotation(index: Any) -> Any:
    """Return the transform applied to rows before the inverted lists, or None."""
    return faiss.downcast_VectorTransform(index.chain.at(0)) if hasattr(index, "chain") else None


def _bound_training(index: Any, cells: Any) -> None:
    """Limit PQ and OPQ training to ``PQ_TRAIN_ROWS`` rows: more give no measurable gain and cost minutes."""
    if isinstance(cells, faiss.IndexIVFPQ):
        cells.pq.cp.max_points_per_centroid = PQ_TRAIN_ROWS // cells.pq.ksub
    rotation = _rotation(index)
    if isinstance(rotation, faiss.OPQMatrix):
        rotation.max_train_points, rotation.niter = PQ_TRAIN_ROWS, 10


def _cluster_in_two_levels(index: Any, cells: Any, sample: NDArray[np.float32]) -> None:
    """Train the centroids in two levels: √nlist clusters, each split again. Much cheaper than all at once."""
    if (rotation := _rotation(index)) is not None:
        rotation.train(sample)
    centroids, _ = two_level_clustering(
        _transformed(index, sample),
        round(math.sqrt(cells.nlist)),
        cells.nlist,
        clustering_niter=10,
        spherical=True,
        gpu=faiss.get_num_gpus() > 0,
    )
    centroids = np.ascontiguousarray(centroids, dtype=np.float32)
    cells.quantizer.train(centroids)
    cells.quantizer.add(centroids)
