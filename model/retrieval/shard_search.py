"""Candidate search over FAISS shards: each shard on its own, or one IVF stacked over all shards.

Legend: ``Q`` queries, ``C`` candidates, ``D`` embedding width, ``N`` rows over all shards. A cell is one inverted list
of an IVF index: the rows that are closest to one centroid.

Candidates have global row ids, which number the rows of all shards in order. :mod:`model.retrieval.ranked_search`
scores them with the stored rows, unless the index's scores are already those of the stored rows.
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
from model.retrieval.faiss_index import is_lossless, is_stackable, ivf_of
from model.retrieval.index_files import FIRST_ID_SHIFT, map_shard

_POSITION = (1 << FIRST_ID_SHIFT) - 1

Candidates = tuple[NDArray[np.int64], NDArray[np.float32] | None]
"""Candidate ids (Q, C), −1 if there are fewer, and scores (Q, C) if they are those of the stored rows, else None."""


class CandidateSearch(Protocol):
    """Interface of a search for candidates."""

    rows: tuple[int, ...]
    """Number of rows of each shard."""
    exact: bool
    """True if visited rows are ordered by their stored values, so no additional candidates are needed."""
    cells: int
    """Number of cells; 0 if every search compares all rows."""

    def propose(self, queries: NDArray[np.float32], count: int, nprobe: int) -> Candidates:
        """Return ``count`` candidates for each query, or a few more."""
        ...


class IndependentShards:
    """Complete indexes, one per shard, each searched on its own."""

    def __init__(self, indexes: Sequence[Any]) -> None:
        """Take ``indexes`` whose ids are positions within the shard."""
        self._indexes = list(indexes)
        self.rows = tuple(int(index.ntotal) for index in indexes)
        self.exact = all(is_lossless(index) for index in indexes)
        self._cells = [ivf_of(index) for index in indexes]
        self._search_lock = threading.Lock()  # nprobe is state of the index, not an argument of every index's search
        self.cells = max((cells.nlist for cells in self._cells if cells is not None), default=0)

    def propose(self, queries: NDArray[np.float32], count: int, nprobe: int) -> Candidates:
        """Return ids (Q, count), the best of all shards by the indexes' scores, and no scores."""
        all_scores, all_ids, first = [], [], 0
        for index, cells, rows in zip(self._indexes, self._cells, self.rows, strict=True):
            with self._search_lock if cells is not None else contextlib.nullcontext():
                if cells is not None:
                    cells.nprobe = nprobe
                scores, ids = index.search(queries, min(count, rows) or 1)
            # Some index types do not support the inner product. Their distances are negated, so larger is nearer.
            similarity = -scores if index.metric_type == faiss.METRIC_L2 else scores
            all_scores.append(np.where(ids < 0, -np.inf, similarity))
            all_ids.append(np.where(ids < 0, -1, ids + first))
            first += rows
        joined = np.concatenate(all_ids, axis=1)
        if len(all_ids) == 1 or joined.shape[1] <= count:
            return joined, None
        best = np.argpartition(-np.concatenate(all_scores, axis=1), count - 1, axis=1)[:, :count]
        return np.take_along_axis(joined, best, axis=1), None


class StackedIVF:
    """One IVF over the memory-mapped inverted lists of all shards: a query is assigned to cells once, not per shard.

    Each query is searched by one thread. Distributing its cells over cores (``parallel_mode``) took 0.9 of the time on
    idle cores, but a hundred times as long on busy ones. Its choice among exact copies varied between runs.
    """

    def __init__(self, quantizer: Any, shards: Sequence[Any], ordinals: Sequence[int]) -> None:
        """Stack the lists of ``shards``, saved without a quantizer, under the trained, empty index ``quantizer``."""
        self.index, self._references = quantizer, [*shards]
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
        self._references.append(stacked)
        self._ivf.replace_invlists(stacked, False)
        for part in {id(part): part for part in (self.index, self._ivf)}.values():
            part.ntotal = sum(self.rows)
        self._graph = faiss.downcast_index(self._ivf.quantizer)
        first = np.zeros(max(ordinals, default=0) + 1, dtype=np.int64)
        first[list(ordinals)] = [0, *itertools.accumulate(self.rows)][:-1]
        self._first = first

    def propose(self, queries: NDArray[np.float32], count: int, nprobe: int) -> Candidates:
        """Return ids (Q, count), and scores if the codes are the stored rows."""
        scores, ids = self.index.search(queries, count, params=self._effort(nprobe))
        return self.row_ids(ids), scores if self.exact else None

    def visited_cells(self, queries: NDArray[np.float32], nprobe: int) -> NDArray[np.int64]:
        """Return the cells (Q, nprobe) that a search visits, nearest first; −1 if the graph finds fewer."""
        effort = self._graph_effort(nprobe)
        found: NDArray[np.int64] = self._graph.search(queries, min(nprobe, self.cells), params=effort)[1]
        return found

    def read_cell(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the rows (n, D) and ascending ids (n,) of a cell. Requires ``exact``: codes are the stored rows."""
        lists, ivf = self._ivf.invlists, self._ivf
        size, codes, ids = lists.list_size(number), lists.get_codes(number), lists.get_ids(number)
        try:
            stored = np.float16 if ivf.code_size == 2 * ivf.d else np.float32
            rows = faiss.rev_swig_ptr(codes, size * ivf.code_size).view(stored).reshape(size, ivf.d)
            return rows.astype(np.float32), self.row_ids(faiss.rev_swig_ptr(ids, size))
        finally:
            lists.release_codes(number, codes)
            lists.release_ids(number, ids)

    def row_ids(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Convert ids of the inverted lists to global row ids; −1 stays −1."""
        ordinals = ids >> FIRST_ID_SHIFT
        if ids.size and ordinals.max() >= len(self._first):
            raise ModelError(f"an index contains an unknown id: {int(ids.max())}; rebuild the database")
        found: NDArray[np.int64] = np.where(ids < 0, -1, self._first[ordinals] + (ids & _POSITION))
        return found

    def _effort(self, nprobe: int) -> Any:
        """Return the parameters of one search. Threads share the index, so its own nprobe must not be set."""
        cells: Any = faiss.SearchParametersIVF
        transformed: Any = faiss.SearchParametersPreTransform
        effort = cells(nprobe=nprobe, quantizer_params=self._graph_effort(nprobe))
        return transformed(index_params=effort) if isinstance(self.index, faiss.IndexPreTransform) else effort

    def _graph_effort(self, nprobe: int) -> Any:
        graph: Any = faiss.SearchParametersHNSW  # type: ignore[attr-defined]
        return graph(efSearch=max(64, 2 * nprobe)) if isinstance(self._graph, faiss.IndexHNSW) else None


def open_candidate_search(indexes: Sequence[Path], ordinals: Sequence[int], quantizer: Path | None) -> CandidateSearch:
    """Memory-map the index files. Raises ``ModelError`` if one cannot be read or belongs to another template."""
    template = None if quantizer is None else _open(quantizer)
    if template is None or not is_stackable(template):
        opened = [_open(path) for path in indexes]
        if any(map(_lacks_centroids, opened)):
            raise ModelError(f"the quantizer of an index is missing: {indexes[0]}; rebuild the database")
        return IndependentShards(opened)
    opened = [_open(path, map_shard) for path in indexes]
    for path, index in zip(indexes, opened, strict=True):
        if not _lacks_centroids(index) or (index.d, ivf_of(index).nlist, ivf_of(index).code_size) != (
            template.d, ivf_of(template).nlist, ivf_of(template).code_size,
        ):  # fmt: skip
            raise ModelError(f"an index does not match its quantizer: {path}, {quantizer}; rebuild the database")
    return StackedIVF(template, opened, ordinals)


def _lacks_centroids(index: Any) -> bool:
    """Return True if the index has cells but not their centroids."""
    cells = ivf_of(index)
    return cells is not None and cells.quantizer.ntotal == 0


def _mapped(path: Path) -> Any:
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def _open(path: Path, read: Callable[[Path], Any] = _mapped) -> Any:
    try:
        return read(path)
    except RuntimeError as error:
        raise ModelError(f"unreadable FAISS index: {path}; rebuild the database") from error
