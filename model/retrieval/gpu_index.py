"""Cells on a GPU, searched there by faiss-gpu.

Legend: ``Q`` queries, ``C`` candidates.

What it proposes is always re-ranked by the stored rows, so that the GPU's own rounding costs no precision. No GPU was
at hand when this was written: it follows faiss-gpu 1.15, and is tested with a CPU index in the GPU's place.
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
"""Neighbours, and cells, that a search on a GPU can be asked for."""


class GpuIVF:
    """A copy of a database's cells in a GPU's memory."""

    exact = False

    def __init__(self, stacked: StackedIVF, device: int) -> None:
        """Copy them to GPU number ``device``. Raises ``RuntimeError``, faiss-gpu's own, where it does not take them."""
        self.rows, self.cells = stacked.rows, stacked.cells
        self._stacked = stacked
        gpu: Any = faiss
        self._resources = gpu.StandardGpuResources()
        options = gpu.GpuClonerOptions()
        options.allowCpuCoarseQuantizer = True  # a graph over the centroids stays where it is
        options.indicesOptions = gpu.INDICES_64_BIT
        # Of PQ, the lookup tables: 48 KiB of shared memory hold those of codes of 96 bytes, in float32 of 48 alone.
        options.useFloat16 = True
        self._index = gpu.index_cpu_to_gpu(self._resources, device, stacked.index, options)
        self._one_at_a_time = threading.Lock()  # a GPU's resources serve one search

    def propose(self, queries: NDArray[np.float32], count: int, nprobe: int) -> Proposed:
        """Ids (Q, C), of the best ``count``, at most ``MOST``."""
        cells: Any = faiss.SearchParametersIVF
        turned: Any = faiss.SearchParametersPreTransform
        effort = cells(nprobe=min(nprobe, MOST))
        if isinstance(self._stacked.index, faiss.IndexPreTransform):
            effort = turned(index_params=effort)
        with self._one_at_a_time:
            _, ids = self._index.search(queries, min(count, MOST), params=effort)
        return self._stacked.dense(ids), None


def cells_on_gpu(stacked: StackedIVF, device: int) -> GpuIVF | None:
    """A copy of the cells on GPU number ``device``; None, and the reason in the log, where faiss-gpu has no such index.

    Raises ``ModelError`` where its memory is too small: the rows themselves take no less.
    """
    try:
        return GpuIVF(stacked, device)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
        if "out of memory" in str(error):
            raise ModelError(
                f"the index cannot be copied to GPU {device} ({reason}); search on the CPU, or build a smaller one"
            ) from error
        logger.warning("GPU %d cannot search this index (%s); all rows are compared there instead", device, reason)
        return None
