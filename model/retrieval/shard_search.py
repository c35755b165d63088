"""Where candidates come from: FAISS shards on their own, or cells stacked over shards.

Legend: ``Q`` queries, ``C`` candidates, ``D`` embedding width, ``N`` rows over all shards.

A proposer answers with row ids that run over all shards: shard after shard, position within the shard. What it proposes
is scored with the stored rows (:mod:`model.retrieval.database`) unless its own scores are of those.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from model.errors import ModelError
from model.retrieval.faiss_index import FIRST_ID_SHIFT, is_lossless, is_stackable, ivf_of, map_shard

_POSITION = (1 << FIRST_ID_SHIFT) - 1


Proposed = tuple[NDArray[np.int64], NDArray[np.float32] | None]
"""Ids (Q, C) of candidates, −1 where there were fewer, and their scores (Q, C) if those are the stored rows'."""


class CandidateSearch(Protocol):
    """Candidates for queries."""

    rows: tuple[int, ...]
    """How many each shard has."""
    exact: bool
    """Whether its order is that of the stored rows among what it looks at: no more than wanted need be proposed."""
    cells: int
    """How many cells there are to visit; 0 when all rows are looked at anyway."""

    def propose(self, queries: NDArray[np.float32], count: int, nprobe: int) -> Proposed:
        """``count`` candidates for each query, or a few more."""
        ...


class IndependentShards:
    """Whole indexes, one a shard, each searched on its own."""

    def __init__(self, indexes: Sequence[Any]) -> None:
        """Search ``indexes``, whose ids are positions."""
        self._indexes = list(indexes)
        self.rows = tuple(int(index.ntotal) for index in indexes)
        self.exact = all(is_lossless(index) for index in indexes)
        self._cells = [ivf_of(index) for index in indexes]
        self._one_at_a_time = threading.Lock()  # an index of any make takes nprobe as its own state alone
        self.cells = max((cells.nlist for cells in self._cells if cells is not None), default=0)

    def propose(self, queries: NDArray[np.float32], count: int, nprobe: int) -> Proposed:
        """Ids (Q, count), of all shards those that their indexes score best."""
        scores, found, first = [], [], 0
        for index, cells, rows in zip(self._indexes, self._cells, self.rows, strict=True):
            with self._one_at_a_time if cells is not None else contextlib.nullcontext():
                if cells is not None:
                    cells.nprobe = nprobe
                some, ids = index.search(queries, min(count, rows) or 1)
            nearer = -some if index.metric_type == faiss.METRIC_L2 else some  # some indexes know no inner product
            scores.append(np.where(ids < 0, -np.inf, nearer))
            found.append(np.where(ids < 0, -1, ids + first))
            first += rows
        together = np.concatenate(found, axis=1)
        if len(found) == 1 or together.shape[1] <= count:
            return together, None
        best = np.argpartition(-np.concatenate(scores, axis=1), count - 1, axis=1)[:, :count]
        return np.take_along_axis(together, best, axis=1), None


class StackedIVF:
    """One IVF over the memory-mapped inverted lists of all shards: a query is assigned to cells once, not per shard.

    A query is one thread's work, however many shards there are. Sharing its cells out among cores (``parallel_mode``)
    took a tenth off where they were idle and a hundred times as long where they were not, and which of several exact
    copies it found varied from run to run.
    """

    def __init__(self, quantizer: Any, shards: Sequence[Any], ordinals: Sequence[int]) -> None:
        """Put ``shards`` (indexes without a quantizer) under the trained ``quantizer``, an index without rows."""
        self.index, self._kept = quantizer, [*shards]
        self._ivf = ivf_of(quantizer)
        self.rows = tuple(int(shard.ntotal) for shard in shards)
        self.exact, self.cells = is_lossless(quantizer), int(self._ivf.nlist)
        lists = [ivf_of(shard).invlists for shard in shards]
        if len(lists) > 1:
            pointers: Any = faiss.InvertedListsPtrVector()  # type: ignore[attr-defined]
            for one in lists:
                pointers.push_back(one)
            stacked = faiss.HStackInvertedLists(pointers.size(), pointers.data())
        else:
            (stacked,) = lists
        self._kept.append(stacked)
        self._ivf.replace_invlists(stacked, False)
        for part in {id(part): part for part in (self.index, self._ivf)}.values():
            part.ntotal = sum(self.rows)
        self._graph = faiss.downcast_index(self._ivf.quantizer)
        first = np.zeros(max(ordinals, default=0) + 1, dtype=np.int64)
        first[list(ordinals)] = [0, *itertools.accumulate(self.rows)][:-1]
        self._first = first

    def propose(self, queries: NDArray[np.float32], count: int, nprobe: int) -> Proposed:
        """Ids (Q, count), and scores where codes are the rows."""
        scores, ids = self.index.search(queries, count, params=self._effort(nprobe))
        return self.dense(ids), scores if self.exact else None

    def visited(self, queries: NDArray[np.float32], nprobe: int) -> NDArray[np.int64]:
        """The cells (Q, nprobe) that a search visits, nearest first; −1 where the graph over them found no more."""
        effort = self._graph_effort(nprobe)
        found: NDArray[np.int64] = self._graph.search(queries, min(nprobe, self.cells), params=effort)[1]
        return found

    def cell(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The rows (n, D) of a cell and their ids (n,), ascending, where codes are the rows (``exact``)."""
        lists, ivf = self._ivf.invlists, self._ivf
        size, codes, ids = lists.list_size(number), lists.get_codes(number), lists.get_ids(number)
        try:
            stored = np.float16 if ivf.code_size == 2 * ivf.d else np.float32
            held = faiss.rev_swig_ptr(codes, size * ivf.code_size).view(stored).reshape(size, ivf.d)
            return held.astype(np.float32), self.dense(faiss.rev_swig_ptr(ids, size))
        finally:
            lists.release_codes(number, codes)
            lists.release_ids(number, ids)

    def dense(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows as they are counted over all shards, of ids as the cells hold them; −1 stays."""
        ordinals = ids >> FIRST_ID_SHIFT
        if ids.size and ordinals.max() >= len(self._first):
            raise ModelError(f"an index holds the id {int(ids.max())}, which no shard gives; rebuild the database")
        found: NDArray[np.int64] = np.where(ids < 0, -1, self._first[ordinals] + (ids & _POSITION))
        return found

    def _effort(self, nprobe: int) -> Any:
        """The effort of one search, told to it alone: threads search the same index, and not all equally hard."""
        cells: Any = faiss.SearchParametersIVF
        turned: Any = faiss.SearchParametersPreTransform
        effort = cells(nprobe=nprobe, quantizer_params=self._graph_effort(nprobe))
        return turned(index_params=effort) if isinstance(self.index, faiss.IndexPreTransform) else effort

    def _graph_effort(self, nprobe: int) -> Any:
        graph: Any = faiss.SearchParametersHNSW  # type: ignore[attr-defined]
        return graph(efSearch=max(64, 2 * nprobe)) if isinstance(self._graph, faiss.IndexHNSW) else None


def open_proposer(indexes: Sequence[Path], ordinals: Sequence[int], quantizer: Path | None) -> CandidateSearch:
    """Memory-map the index files. Raises ``ModelError`` when one cannot be read or belongs elsewhere."""
    template = None if quantizer is None else _open(quantizer)
    if template is None or not is_stackable(template):
        opened = [_open(path) for path in indexes]
        if any(map(_is_bare, opened)):
            raise ModelError(f"{indexes[0]} holds cells without their quantizer; rebuild the database")
        return IndependentShards(opened)
    opened = [_open(path, map_shard) for path in indexes]
    for path, index in zip(indexes, opened, strict=True):
        if not _is_bare(index) or (index.d, ivf_of(index).nlist, ivf_of(index).code_size) != (
            template.d, ivf_of(template).nlist, ivf_of(template).code_size,
        ):  # fmt: skip
            raise ModelError(f"{path} was not filled from {quantizer}; rebuild the database")
    return StackedIVF(template, opened, ordinals)


def _is_bare(index: Any) -> bool:
    """Whether it has cells, and not their centroids."""
    cells = ivf_of(index)
    return cells is not None and cells.quantizer.ntotal == 0


def _mapped(path: Path) -> Any:
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def _open(path: Path, read: Callable[[Path], Any] = _mapped) -> Any:
    try:
        return read(path)
    except RuntimeError as error:
        raise ModelError(f"{path} is no readable FAISS index; rebuild the database") from error
