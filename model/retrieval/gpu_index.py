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
from model.retrieval.shard_search import Proposed, StackedIVF

logger = logging.getLogger(__name__)

MOST = 2_048
"""faiss-gpu's limit on neighbours and on visited cells in a search."""


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
        self._one_at_a_time = threading.Lock()  # a GPU's resources serve one search at a time

    def propose(self, queries: NDArray[np.float32], count: int, nprobe: int) -> Proposed:
        """Return ids (Q, C) of the best ``count`` candidates, at most ``MOST``, and no scores."""
        cells: Any = faiss.SearchParametersIVF
        transformed: Any = faiss.SearchParametersPreTransform
        effort = cells(nprobe=min(nprobe, MOST))
        if isinstance(self._stacked.index, faiss.IndexPreTransform):
            effort = transformed(index_params=effort)
        with self._one_at_a_time:
            _, ids = self._index.search(queries, min(count, MOST), params=effort)
        return self._stacked.dense(ids), None


def cells_on_gpu(stacked: StackedIVF, device: int) -> GpuIVF | None:
    """Copy the inverted lists to GPU number ``device``; log the reason and return None if faiss-gpu cannot.

    Raises ``ModelError`` if the GPU's memory is too small: the rows themselves need at least as much.
    """
    try:
        return GpuIVF(stacked, device)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
        if "out of memory" in str(error):
            raise ModelError(
                f"the index does not fit GPU {device}: {reason}; search on the CPU, or build a smaller index"
            ) from error
        logger.warning("GPU %d cannot search this index: %s; comparing all rows there instead", device, reason)
        return None
