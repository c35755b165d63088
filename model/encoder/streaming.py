"""Keeping the encoder's device busy: batch after batch, the next one copied while this one is computed.

Legend: ``B`` batch, ``D`` embedding width, ``N`` pictures, ``C H W`` a picture.
"""

import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.encoder.clip import Encoder


@torch.inference_mode()
def embed_stream(encoder: Encoder, batches: Iterable[Tensor], *, batch_size: int) -> tuple[Tensor, float]:
    """Batches (at most ``batch_size``, C, H, W) to (N, D) float32 unit rows on the CPU, and the seconds of computing.

    Each batch is asked for while the device computes the one before, where the device can. Short ones are filled up:
    products of other shapes may sum in another order, so a row's last bit would depend on how many came with it.
    """
    full = (_filled(batch, batch_size) for batch in batches)
    rows, seconds = (_on_cuda if encoder.device.type == "cuda" else _in_turn)(encoder, full)
    return (torch.cat(rows).cpu() if rows else torch.empty(0, encoder.identity.dimension)), seconds


def _filled(batch: Tensor, size: int) -> tuple[Tensor, int]:
    return F.pad(batch, (0, 0) * (batch.dim() - 1) + (0, size - len(batch))), len(batch)


def _in_turn(encoder: Encoder, batches: Iterable[tuple[Tensor, int]]) -> tuple[list[Tensor], float]:
    rows, seconds = [], 0.0
    for batch, count in batches:
        started = time.perf_counter()
        rows.append(encoder.forward(batch)[:count])
        seconds += time.perf_counter() - started
    return rows, seconds


def _on_cuda(encoder: Encoder, batches: Iterable[tuple[Tensor, int]]) -> tuple[list[Tensor], float]:
    """Two batches on the device: one is computed, the other comes over a stream of its own from pinned memory."""
    copying: torch.cuda.Stream = torch.cuda.Stream(encoder.device)  # type: ignore[no-untyped-call]
    computing = torch.cuda.current_stream(encoder.device)
    rows: list[Tensor] = []
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for batch, count in batches:
        if len(spans) > 1:
            spans[-2][1].synchronize()
        with torch.cuda.stream(copying):
            there = batch.pin_memory().to(encoder.device, non_blocking=True)
        computing.wait_stream(copying)
        there.record_stream(computing)
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begun.record(computing)
        rows.append(encoder.forward(there)[:count])
        ended.record(computing)
        spans.append((begun, ended))
    torch.cuda.synchronize(encoder.device)
    return rows, sum(begun.elapsed_time(ended) for begun, ended in spans) / 1000
