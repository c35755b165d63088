"""Which FAISS index for which size; training it once, and filling its shards.

Legend: ``n`` rows, ``D`` embedding width, ``b`` bytes a row that the memory budget leaves beside an id.

| rows | b | factory string | why |
| --- | --- | --- | --- |
| up to 32,768 | any | ``Flat`` | exact within a millisecond; nothing to train or tune |
| more | 2D | ``IVF{4√n},SQfp16`` | visits a few cells; codes are the stored rows: only nprobe costs recall |
| more | D | ``IVF{4√n},SQ8`` | as fast in half the memory; 20 candidates re-ranked make up for rounding |
| more | less | ``OPQ{M},IVF{4√n},PQ{M}x8`` | M = D/2, D/4 or D/8 bytes, the most that fits: no effort mends few bits |

Beyond 8,192 cells these are found by clustering in two levels and searched by a graph (``_HNSW32``), since comparing
each query with all of them would cost more than the rows of the cells. PQ fast-scan is not chosen: 4 bits a part stop
at a recall of 0.82 where 8 reach 0.99, and its blocks cannot be searched across shards at once; a FAISS factory string
that names it, or anything else, is taken as it is. Rows are unit vectors, so the inner product is the cosine.
"""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.clustering import two_level_clustering
from numpy.typing import NDArray

from model.errors import ModelError
from model.retrieval.limits import MOST_CELLS

FLAT_ROWS = 32_768
GRAPH_CELLS = 8_192
GRAPH_EFFORT = 64  # efSearch: 99.3% of rows find their cell; with FAISS's 16 only 88%, which no nprobe mends
TRAIN_ROWS_PER_CELL = 40  # FAISS warns below 39
PQ_TRAIN_ROWS = 16_384  # 64 for each of a part's 256 centroids; more bring nothing and cost minutes
MEMORY_BYTES = 8 << 30
FIRST_ID_SHIFT = 32
"""A row's id in a stacked index: its index shard's ordinal above, its position in the shard below."""

_UNFIT = {
    "IDMap": "its ids are the rows' positions already",
    "NSG": "its graph cannot take rows in portions",
}
"""Parts of factory strings that FAISS takes and shards cannot be made of, and why."""
_NO_ROWS = b"sprs" + bytes(8)
"""The sizes of cells that are all empty, in FAISS's files."""


def choose_index(rows: int, dimension: int, memory_bytes: int = MEMORY_BYTES) -> str:
    """The factory string for ``rows`` × ``dimension`` by the table above. Raises ``ModelError`` when nothing fits.

    ``memory_bytes`` is what a process that searches may hold of the index; the stored rows are read from disk.
    """
    if rows <= FLAT_ROWS:
        return "Flat"
    cells = 1 << round(math.log2(4 * math.sqrt(rows)))
    coarse = f"IVF{cells}" + ("_HNSW32" if cells > GRAPH_CELLS else "")
    budget = memory_bytes / rows - 8  # an id each
    if budget >= 2 * dimension:
        return f"{coarse},SQfp16"
    if budget >= dimension:
        return f"{coarse},SQ8"
    for width in (2, 4, 8):
        parts = dimension // width
        if 0 < parts <= budget:
            return f"OPQ{parts}_{parts * width},{coarse},PQ{parts}x8"
    raise ModelError(
        f"an index of {rows} rows of {dimension} needs {(dimension // 8 + 8) * rows >> 20} MiB at least, "
        f"memory_bytes allows {memory_bytes >> 20}; raise it (--memory), or spread the database over machines"
    )


def train_index(factory: str, dimension: int, sample: NDArray[np.float32]) -> faiss.Index:
    """An empty index whose quantizer is trained on ``sample`` (n, D) float32, on all GPUs that faiss has.

    One trained index is the template of every shard, so that shards are comparable and can be searched as one.

    Raises:
        ModelError: no such index, or too few rows for it.
    """
    index = require_factory(factory, dimension)
    cells = ivf_of(index)
    if isinstance(cells, faiss.IndexIVFScalarQuantizer) and is_lossless(index):
        cells.by_residual = False  # the code of a row is then the row itself
    _bound_training(index, cells)
    if cells is not None and isinstance(graph := faiss.downcast_index(cells.quantizer), faiss.IndexHNSW):
        graph.hnsw.efSearch = GRAPH_EFFORT  # goes with the template, to whoever fills a shard
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
            f"{factory!r} cannot be trained on {len(sample)} rows ({_faiss_reason(error)}); take a smaller one"
        ) from error
    return index


def require_factory(factory: str, dimension: int) -> faiss.Index:
    """The index that a factory string names, not yet trained. Raises ``ModelError`` unless shards can be made of it."""
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ModelError(
            f"{factory!r} is no FAISS factory string for {dimension} dimensions ({_faiss_reason(error)}); "
            "take auto, or one such as IVF1024,SQfp16"
        ) from error
    if (cells := ivf_of(index)) is not None and cells.nlist > MOST_CELLS:
        raise ModelError(f"{factory!r} has {cells.nlist} cells, more than FAISS may read; take at most {MOST_CELLS}")
    for name, why in _UNFIT.items():
        if re.search(rf"\b{name}", factory):
            raise ModelError(f"{factory!r} cannot be a database's index: {why}; take auto, or leave {name} out")
    return index


def code_type(factory: str) -> str:
    """How the rows of ``factory`` are coded, whatever the number of its cells."""
    return re.sub(r"IVF\d+(_HNSW\d+)?", "IVF", factory)


def memory_needed(factory: str, rows: int, dimension: int) -> int:
    """Bytes of codes and ids that an index of ``rows`` × ``dimension`` holds; 0 for one without cells."""
    cells = ivf_of(faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT))
    return 0 if cells is None else rows * (int(cells.code_size) + 8)


def _faiss_reason(error: Exception) -> str:
    """The reason in FAISS's message, without where in its sources it was found."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return re.sub(r"^Error in .*? at \S+:\d+: ", "", lines[-1]).removeprefix("Error: ").strip()


def training_rows(factory: str, rows: int) -> int:
    """How many rows the quantizer of ``factory`` wants to see, at most ``rows``; 0 when there is nothing to train."""
    if factory == "Flat":
        return 0
    cells = [int(number) for number in re.findall(r"IVF(\d+)", factory)]
    wanted = max(256 * TRAIN_ROWS_PER_CELL, *(number * TRAIN_ROWS_PER_CELL for number in cells), 0)
    return min(rows, max(wanted, PQ_TRAIN_ROWS) if "PQ" in factory else wanted)


def ivf_of(index: Any) -> Any:
    """The IVF part of an index as what it is, or None when it has no cells."""
    cells = faiss.try_extract_index_ivf(index)
    return None if cells is None else faiss.downcast_index(cells)


def is_lossless(index: Any) -> bool:
    """Whether an index scores rows as they are stored: float32, or the same float16 values."""
    if isinstance(index, faiss.IndexFlat):
        return True
    if isinstance(index, faiss.IndexPreTransform):
        return False
    cells = ivf_of(index)
    if isinstance(cells, faiss.IndexIVFScalarQuantizer):
        return bool(cells.sq.qtype == faiss.ScalarQuantizer.QT_fp16)
    return isinstance(cells, faiss.IndexIVFFlat)


def is_stackable(index: Any) -> bool:
    """Whether shards of this index can be searched as one: inverted lists of plain codes, of one quantizer."""
    cells = ivf_of(index)
    plain = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
    return isinstance(cells, plain) and not isinstance(index, faiss.IndexRefine)


def fill_shard(template: Path, rows: Iterable[NDArray[np.float16]], output: Path, *, ordinal: int = 0) -> float:
    """Write a shard of the trained ``template`` that indexes ``rows``, arrays (n, D), one after the other.

    A stackable shard holds its inverted lists alone, without the quantizer that all share; its ids are
    ``ordinal << 32 | position``. Any other is a whole index whose ids are positions.

    Returns:
        The quantization error of every sixteenth row, as :func:`quantization_error` has it.
    """
    index = faiss.read_index(str(template))
    cells, total, errors = ivf_of(index), 0, [0.0]
    stacked = is_stackable(index)
    for block in _blocks(rows):
        errors.append(quantization_error(index, block[::16]) * len(block))
        if stacked:
            index.add_with_ids(block, np.arange(total, total + len(block)) + (ordinal << FIRST_ID_SHIFT))
        else:
            index.add(block)
        total += len(block)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _without_quantizer(cells) if stacked else contextlib.nullcontext():
        faiss.write_index(index, str(output))
    return sum(errors) / max(1, total)


@contextlib.contextmanager
def _without_quantizer(cells: Any) -> Iterator[None]:
    """An empty quantizer in the place of the cells' own, which comes back, to be freed with them."""
    kept = cells.quantizer
    empty: Any = faiss.IndexFlatIP(cells.d)
    cells.quantizer = empty
    try:
        yield
    finally:
        cells.quantizer = kept
        empty.this.own(True)  # what is assigned is no longer Python's to free


def map_shard(path: Path) -> Any:
    """A stackable shard over its memory-mapped file, of which nothing but the sizes of its cells is read.

    FAISS's other mapping (``IO_FLAG_MMAP_IFC``) copies the ids, which takes 9 ms a million rows.
    """
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    if (cells := ivf_of(index)) is not None:
        lists: Any = faiss.downcast_InvertedLists(cells.invlists)
        lists.prefetch_nthread = 0  # by default each search starts threads that read ahead
    return index


def merge_shards(parts: Sequence[tuple[Path, int]], output: Path) -> None:
    """Write the rows of several stackable shards as one, each cell's codes in one place again.

    A search then reads each cell it visits in one piece, not one a shard. ``parts`` are files that :func:`fill_shard`
    wrote from one template, in row order, and what is to be added to the ids of each. The output is byte for byte what
    ``fill_shard`` writes of all rows at once.

    FAISS writes what it holds in memory alone; here no more than a cell is held. Its file of an index with cells ends
    in their number, their code size, their sizes, then cell after cell its codes and its ids (``write_InvertedLists``).
    """
    opened = [map_shard(path) for path, _ in parts]
    shifts = [shift for _, shift in parts]
    held = [ivf_of(index).invlists for index in opened]
    whole = map_shard(parts[0][0])
    cells = ivf_of(whole)
    sizes = np.array([[lists.list_size(cell) for lists in held] for cell in range(cells.nlist)], dtype=np.int64)
    no_rows: Any = faiss.ArrayInvertedLists(cells.nlist, cells.code_size)
    cells.replace_invlists(no_rows, False)
    whole.ntotal = cells.ntotal = int(sizes.sum())
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as file:
        file.write(faiss.serialize_index(whole)[: -len(_NO_ROWS)].tobytes())
        file.write(_serialize_list_sizes(sizes.sum(axis=1)))
        for cell, of_parts in enumerate(sizes):
            present = [one for one in zip(held, shifts, of_parts.tolist(), strict=True) if one[2]]
            for lists, _, size in present:
                file.write(faiss.rev_swig_ptr(lists.get_codes(cell), size * cells.code_size).data)
            for lists, shift, size in present:
                file.write((faiss.rev_swig_ptr(lists.get_ids(cell), size) + shift).data)


def _serialize_list_sizes(sizes: NDArray[np.int64]) -> bytes:
    """The sizes of the cells, as FAISS writes them: all, or where most are empty those that are not."""
    filled = np.flatnonzero(sizes)
    many = len(filled) > len(sizes) // 2
    told = sizes if many else np.stack([filled, sizes[filled]], axis=1)
    return (b"full" if many else b"sprs") + np.uint64(told.size).tobytes() + told.astype(np.uint64).tobytes()


def quantization_error(index: Any, sample: NDArray[np.float32]) -> float:
    """Mean of 1 − cosine between a row of ``sample`` (n, D) and the centroid of its cell; 0 without cells or rows."""
    cells = ivf_of(index)
    if cells is None or not len(sample):
        return 0.0
    return float((1 - cells.quantizer.search(_transformed(index, sample), 1)[0]).mean())


def _transformed(index: Any, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows as the cells see them: OPQ turns them first."""
    rotation = _rotation(index)
    return rows if rotation is None else rotation.apply(rows)


def _rotation(index: Any) -> Any:
    """What turns rows before they reach the cells, or None."""
    return faiss.downcast_VectorTransform(index.chain.at(0)) if hasattr(index, "chain") else None


def _bound_training(index: Any, cells: Any) -> None:
    """Codebooks and rotation learn from ``PQ_TRAIN_ROWS``: more bring nothing measurable and cost minutes."""
    if isinstance(cells, faiss.IndexIVFPQ):
        cells.pq.cp.max_points_per_centroid = PQ_TRAIN_ROWS // cells.pq.ksub
    rotation = _rotation(index)
    if isinstance(rotation, faiss.OPQMatrix):
        rotation.max_train_points, rotation.niter = PQ_TRAIN_ROWS, 10


def _cluster_in_two_levels(index: Any, cells: Any, sample: NDArray[np.float32]) -> None:
    """Give ``cells`` its centroids: √nlist clusters, each cut again, at a fraction of what all at once would cost."""
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


def _blocks(rows: Iterable[NDArray[np.float16]], size: int = 65_536) -> Iterable[NDArray[np.float32]]:
    for part in rows:
        for start in range(0, len(part), size):
            yield np.ascontiguousarray(part[start : start + size], dtype=np.float32)
