"""Candidates by matrix products on an accelerator.

Legend: ``Q`` queries, ``C`` candidates, ``D`` embedding width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import ModelError
from model.retrieval.shard_search import Proposed
from model.retrieval.stored_rows import StoredRows

_BLOCK_ROWS = 1 << 19
_SPARE = 32
"""Candidates beyond those wanted: float32 sums differ with their order, and what they tie apart is re-ranked."""


class TorchBruteForce:
    """All rows on an accelerator, compared by matrix products: exact, and fast there.

    No GPU was at hand when the float32 products of float16 rows were written: they follow torch 2.14, and are tested
    with the CPU in the GPU's place.
    """

    exact, cells = True, 0

    def __init__(self, parts: Sequence[NDArray[np.float16] | StoredRows], device: torch.device) -> None:
        """Copy the stored rows (n, D) of every shard to ``device``. Raises ``ModelError`` where they do not fit."""
        self.rows = tuple(len(part) for part in parts)
        self._device = device
        kept = torch.float16 if self._device.type == "cuda" else torch.float32
        try:
            self._parts = [torch.from_numpy(np.array(part)).to(self._device, kept) for part in parts if len(part)]
        except torch.OutOfMemoryError as error:
            raise ModelError(f"{sum(self.rows)} rows do not fit the memory of {device}; search on the CPU") from error

    def propose(self, queries: NDArray[np.float32], count: int, nprobe: int) -> Proposed:
        """Ids (Q, count and some to spare)."""
        best, ids, first, count = None, None, 0, count + _SPARE
        for part in self._parts:
            asked = torch.from_numpy(queries).to(self._device)
            for block in torch.split(part, _BLOCK_ROWS):
                scores, places = _products(asked, block).topk(min(count, len(block)), dim=1)
                places = places + first
                first += len(block)
                if best is not None and ids is not None:
                    scores, order = torch.cat([best, scores], dim=1).topk(
                        min(count, best.shape[1] + scores.shape[1]), dim=1
                    )
                    places = torch.cat([ids, places], dim=1).gather(1, order)
                best, ids = scores, places
        if ids is None:
            return np.full((len(queries), 1), -1, dtype=np.int64), None
        return ids.cpu().numpy().astype(np.int64), None


def _products(queries: Tensor, rows: Tensor) -> Tensor:
    """Cosines (Q, n) float32 of queries (Q, D) float32 and rows (n, D), as they are stored, float16, or float32.

    Of near copies, frames of a video say, a hundred lie within 5e-4: rounded to float16 their products are the same.
    """
    if rows.dtype == torch.float32:
        return queries @ rows.T
    high = queries.to(rows.dtype)
    low = (queries - high).to(rows.dtype)  # what that rounded away: float16 products take float16 on both sides
    products = torch.mm(torch.cat([high, low]), rows.T, out_dtype=torch.float32)
    return products[: len(queries)] + products[len(queries) :]


def available(device: torch.device | str) -> torch.device:
    """The device of that name. Raises ``ModelError`` when there is none such."""
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"there is no device {device!r}; name cpu, or cuda where there is a GPU") from error
    if asked.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"torch finds no GPU for {asked}; search on the CPU, with the database as it was opened")
    return asked
