"""Inverted lists (IVF) on a GPU, searched by faiss-gpu.

Legend: ``Q`` queries, ``C`` candidates.

Candidates are always re-ranked with the stored rows, so the GPU's rounding does not affect the scores. This module was
written without access to a GPU: it follows faiss-gpu 1.15 and is tested with a CPU index.
"""

import logging
import threading
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from model.errors import ModelError
from model.retrieval.shard_search import Candidates, StackedIVF

logger = logging.getLogger(__name__)

MAX_RESULTS = 2_048
"""Limit of faiss-gpu on the number of neighbours of a search, and on that of visited cells."""


class GpuIVF:
    """A copy of a database's inverted lists in GPU memory."""

    exact = False

    def __init__(self, stacked: StackedIVF, device: int) -> None:
        """Copy the lists to GPU number ``device``. Raises faiss-gpu's ``RuntimeError`` for an unsupported index."""
        self.rows, self.cells = stacked.rows, stacked.cells
        self._stacked = stacked
        gpu: Any = faiss
        self._resources = gpu.StandardGpuResources()
        options = gpu.GpuClonerOptions()
        options.allowCpuCoarseQuantizer = True  # a graph over the centroids stays on the CPU
        options.indicesOptions = gpu.INDICES_64_BIT
        # 48 KiB of shared memory fit the PQ lookup tables of 96-byte codes in float16, of 48-byte codes in float32.
        options.useFloat16 = True
        self._index = gpu.index_cpu_to_gpu(self._resources, device, stacked.index, options)
        self._search_lock = threading.Lock()  # a GPU's resources serve one search at a time

    def propose(self, queries: NDArray[np.float32], count: int, nprobe: int) -> Candidates:
        """Return ids (Q, C) of the best ``count`` candidates, at most ``MAX_RESULTS``, and no scores."""
        cells: Any = faiss.SearchParametersIVF
        transformed: Any = faiss.SearchParametersPreTransform
        effort = cells(nprobe=min(nprobe, MAX_RESULTS))
        if isinstance(self._stacked.index, faiss.IndexPreTransform):
            effort = transformed(index_params=effort)
        with self._search_lock:
            _, ids = self._index.search(queries, min(count, MAX_RESULTS), params=effort)
        return self._stacked.row_ids(ids), None


def lists_on_gpu(stacked: StackedIVF, device: int) -> GpuIVF | None:
    """Copy the inverted lists to GPU number ``device``. If faiss-gpu cannot search them, log why and return None.

    Raises ``ModelError`` if they do not fit into the GPU's memory: the rows would not fit either.
    """
    try:
        return GpuIVF(stacked, device)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
        if "out of memory" in str(error):
            raise ModelError(
                f"the index does not fit into the memory of GPU {device}: {reason}; search on the CPU, or build a "
                "smaller index"
            ) from error
        logger.warning("GPU %d cannot search this index: %s; comparing all rows there instead", device, reason)
        return None
