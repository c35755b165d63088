"""Streaming embedding: the next batch is copied to the device while the current one is computed.

Legend: ``B`` batch, ``D`` embedding width, ``N`` images, ``C H W`` an image.
"""

import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.encoder.clip import Encoder


@torch.inference_mode()
def embed_stream(encoder: Encoder, batches: Iterable[Tensor], *, batch_size: int) -> tuple[Tensor, float]:
    """Embed preprocessed batches (at most ``batch_size``, C, H, W); return unit rows and the compute time in seconds.

    The rows are (N, D) float32 on the CPU. On CUDA, each batch is requested while the previous one is computed. Short
    batches are padded: matrix products of another shape may sum in another order, so the last bit of a row would depend
    on the size of its batch.
    """
    padded = (_padded(batch, batch_size) for batch in batches)
    rows, seconds = (_embed_overlapped if encoder.device.type == "cuda" else _embed_sequentially)(encoder, padded)
    return (torch.cat(rows).cpu() if rows else torch.empty(0, encoder.identity.dimension)), seconds


def _padded(batch: Tensor, size: int) -> tuple[Tensor, int]:
    return F.pad(batch, (0, 0) * (batch.dim() - 1) + (0, size - len(batch))), len(batch)


def _embed_sequentially(encoder: Encoder, batches: Iterable[tuple[Tensor, int]]) -> tuple[list[Tensor], float]:
    rows, seconds = [], 0.0
    for batch, count in batches:
        started = time.perf_counter()
        rows.append(encoder.forward(batch)[:count])
        seconds += time.perf_counter() - started
    return rows, seconds


def _embed_overlapped(encoder: Encoder, batches: Iterable[tuple[Tensor, int]]) -> tuple[list[Tensor], float]:
    """Embed one batch while the next is copied from pinned memory on another CUDA stream."""
    copying: torch.cuda.Stream = torch.cuda.Stream(encoder.device)  # type: ignore[no-untyped-call]
    computing = torch.cuda.current_stream(encoder.device)
    rows: list[Tensor] = []
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for batch, count in batches:
        if len(spans) > 1:
            spans[-2][1].synchronize()
        with torch.cuda.stream(copying):
            moved = batch.pin_memory().to(encoder.device, non_blocking=True)
        computing.wait_stream(copying)
        moved.record_stream(computing)
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begun.record(computing)
        rows.append(encoder.forward(moved)[:count])
        ended.record(computing)
        spans.append((begun, ended))
    torch.cuda.synchronize(encoder.device)
    return rows, sum(begun.elapsed_time(ended) for begun, ended in spans) / 1000
