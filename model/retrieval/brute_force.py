"""Exact candidate search by matrix products on an accelerator.

Legend: ``Q`` queries, ``C`` candidates, ``D`` embedding width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import ModelError
from model.retrieval.shard_search import Candidates
from model.retrieval.stored_rows import StoredRows

_BLOCK_ROWS = 1 << 19
_SPARE = 32
"""Additional candidates to re-rank: float32 sums depend on the order of summation, so near-ties may be reordered."""


class TorchBruteForce:
    """Exact search over all rows, held in an accelerator's memory and compared by matrix products.

    The float32 products of float16 rows were written for torch 2.14 without access to a GPU, and tested on the CPU.
    """

    exact, cells = True, 0

    def __init__(self, parts: Sequence[NDArray[np.float16] | StoredRows], device: torch.device) -> None:
        """Copy the stored rows (n, D) of all shards to ``device``. Raises ``ModelError`` if they do not fit."""
        self.rows = tuple(len(part) for part in parts)
        self._device = device
        dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        try:
            self._parts = [torch.from_numpy(np.array(part)).to(self._device, dtype) for part in parts if len(part)]
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"the rows do not fit into the memory of {device}: {sum(self.rows)} rows; search on the CPU"
            ) from error

    def propose(self, queries: NDArray[np.float32], count: int, nprobe: int) -> Candidates:
        """Return candidate ids (Q, C), C up to ``count`` + 32, and no scores."""
        best, ids, first, count = None, None, 0, count + _SPARE
        for part in self._parts:
            moved = torch.from_numpy(queries).to(self._device)
            for block in torch.split(part, _BLOCK_ROWS):
                scores, found = _products(moved, block).topk(min(count, len(block)), dim=1)
                found = found + first
                first += len(block)
                if best is not None and ids is not None:
                    scores, order = torch.cat([best, scores], dim=1).topk(
                        min(count, best.shape[1] + scores.shape[1]), dim=1
                    )
                    found = torch.cat([ids, found], dim=1).gather(1, order)
                best, ids = scores, found
        if ids is None:
            return np.full((len(queries), 1), -1, dtype=np.int64), None
        return ids.cpu().numpy().astype(np.int64), None


def _products(queries: Tensor, rows: Tensor) -> Tensor:
    """Return float32 cosines (Q, n) of queries (Q, D) float32 and rows (n, D) in float16 or float32.

    Near copies, e.g. frames of a video, can have a hundred cosines within 5e-4 of each other. Products rounded to
    float16 could not tell them apart.
    """
    if rows.dtype == torch.float32:
        return queries @ rows.T
    high = queries.to(rows.dtype)
    low = (queries - high).to(rows.dtype)  # the rounding error; a float16 product needs float16 on both sides
    products = torch.mm(torch.cat([high, low]), rows.T, out_dtype=torch.float32)
    return products[: len(queries)] + products[len(queries) :]


def available(device: torch.device | str) -> torch.device:
    """Return the torch device of that name. Raise ``ModelError`` if it does not exist on this machine."""
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device: {device!r}; use cpu, or cuda on a machine with a GPU") from error
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"torch finds no GPU for device: {parsed}; search on the CPU, without a call of to()")
    return parsed
