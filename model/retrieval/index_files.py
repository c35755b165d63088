"""Files of an IVF index: one per shard, opened by memory map or merged into one."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from model.retrieval.faiss_index import is_stackable, ivf_of, quantization_error

FIRST_ID_SHIFT = 32
"""A row's id in a stacked index: the shard's ordinal in the upper bits, the position in the lower 32."""

_NO_ROWS = b"sprs" + bytes(8)
"""List sizes of an index without rows, as FAISS serialises them."""


def fill_shard(template: Path, rows: Iterable[NDArray[np.float16]], output: Path, *, ordinal: int = 0) -> float:
    """Index ``rows``, consecutive arrays (n, D), with the trained ``template`` and write the shard to ``output``.

    A stackable shard contains only its inverted lists, not the shared quantizer; its ids are
    ``ordinal << 32 | position``. Any other shard is a complete index whose ids are positions.

    Returns:
        Mean :func:`quantization_error` of every sixteenth row.
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
    """Replace the quantizer by an empty one for the duration of the block, then restore it."""
    original = cells.quantizer
    empty: Any = faiss.IndexFlatIP(cells.d)
    cells.quantizer = empty
    try:
        yield
    finally:
        cells.quantizer = original
        empty.this.own(True)  # assigning it to the index took ownership from Python; take it back so it is freed


def map_shard(path: Path) -> Any:
    """Memory-map a stackable shard; only the sizes of its cells are read.

    FAISS's other mapping (``IO_FLAG_MMAP_IFC``) copies the ids, which takes 9 ms per million rows.
    """
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    if (cells := ivf_of(index)) is not None:
        lists: Any = faiss.downcast_InvertedLists(cells.invlists)
        lists.prefetch_nthread = 0  # by default each search starts read-ahead threads
    return index


def merge_shards(parts: Sequence[tuple[Path, int]], output: Path) -> None:
    """Merge several stackable shards into one, so that a search reads each visited cell in one piece.

    FAISS can only write an index that is in memory; this function holds one cell at a time. The file of an IVF index
    ends with the number of cells, the code size and the sizes of the cells, then the codes and ids of each cell
    (``write_InvertedLists``).

    Args:
        parts: Files that :func:`fill_shard` wrote from one template, in row order, each with an offset for its ids.
        output: File to write. It is byte for byte that of ``fill_shard`` for all rows at once.
    """
    opened = [map_shard(path) for path, _ in parts]
    offsets = [offset for _, offset in parts]
    lists_of = [ivf_of(index).invlists for index in opened]
    whole = map_shard(parts[0][0])
    cells = ivf_of(whole)
    sizes = np.array([[lists.list_size(cell) for lists in lists_of] for cell in range(cells.nlist)], dtype=np.int64)
    no_rows: Any = faiss.ArrayInvertedLists(cells.nlist, cells.code_size)
    cells.replace_invlists(no_rows, False)
    whole.ntotal = cells.ntotal = int(sizes.sum())
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as file:
        file.write(faiss.serialize_index(whole)[: -len(_NO_ROWS)].tobytes())
        file.write(_serialize_list_sizes(sizes.sum(axis=1)))
        for cell, of_parts in enumerate(sizes):
            present = [one for one in zip(lists_of, offsets, of_parts.tolist(), strict=True) if one[2]]
            for lists, _, size in present:
                file.write(faiss.rev_swig_ptr(lists.get_codes(cell), size * cells.code_size).data)
            for lists, offset, size in present:
                file.write((faiss.rev_swig_ptr(lists.get_ids(cell), size) + offset).data)


def _serialize_list_sizes(sizes: NDArray[np.int64]) -> bytes:
    """Serialise the list sizes as FAISS does: all of them, or (list, size) pairs if at most half are not empty."""
    filled = np.flatnonzero(sizes)
    dense = len(filled) > len(sizes) // 2
    values = sizes if dense else np.stack([filled, sizes[filled]], axis=1)
    return (b"full" if dense else b"sprs") + np.uint64(values.size).tobytes() + values.astype(np.uint64).tobytes()


def _blocks(rows: Iterable[NDArray[np.float16]], size: int = 65_536) -> Iterable[NDArray[np.float32]]:
    for part in rows:
        for start in range(0, len(part), size):
            yield np.ascontiguousarray(part[start : start + size], dtype=np.float32)
