"""Speed of training and generation, against plain code with the same networks on the same machine.

    make bench NAME=speed

Training: the loop (data on the device, bfloat16 copy, compiled, Muon and AdamW, EMA) against a plain one
(``plain_training``: autocast, AdamW, EMA) with the same batches and objective, as it is and with a compiled network and
fused AdamW. The second ratio is what the bfloat16 copy, Muon and the loop add to compilation. The networks are those of
the bundled generators' recipes: 64 px at batch 512. The share of the matrix peak is that of the same run.

Generation: 25 steps with guidance, from condition tokens to images, by a compiled pipeline against the uncompiled one.

Weights and images are random, which does not change the speed. On a CPU training is not compiled and the networks are
small: the figures only show that the benchmark runs.

Legend: ``N`` images, ``D`` embedding width, ``S`` side.
"""

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from model.configs import ConditioningConfig, RestorationConfig, TrainingConfig, TransformerConfig, VQTransformerConfig
from model.diffusion.conditioning import MARKER_CHANNELS
from model.diffusion.vq_diffusion import Transitions
from model.encoder.clip import Encoder
from model.encoder.identity import EncoderIdentity
from model.generation.sampling import SamplingRequest, generate
from model.networks.dit import build_transformer
from model.networks.editor import widen_input
from model.networks.vq_transformer import build_vq_transformer
from model.pipeline import new_pipeline
from model.step_random import StepRandom
from model.training.data import TrainingRows, TrainingSet
from model.training.ema import ema_copy, ema_update
from model.training.interfaces import Objective
from model.training.loop import train
from model.training.objectives.restoration import Restoration
from model.training.objectives.vq_diffusion import MaskAndReplace

POOL = 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Size of the measurement."""

    layers: int
    code_layers: int
    """Layers of the discrete network."""
    width: int
    batch: int
    rows: int
    """Images in the training set."""
    window: int
    """Steps per measurement, after one window of warm-up."""
    drawn: int
    steps: int


SIZES = {
    "cuda": Size(layers=6, code_layers=5, width=512, batch=512, rows=20_480, window=60, drawn=1024, steps=25),
    "cpu": Size(layers=1, code_layers=1, width=128, batch=8, rows=64, window=2, drawn=8, steps=2),
}


def bench_speed() -> dict[str, Any]:
    """Return images/s of training and generation, each with that of plain code."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, identity = SIZES[device], Encoder().identity
    conditioning = ConditioningConfig(neighbours=10, pool=POOL)
    continuous = Restoration(conditioning, RestorationConfig(drop_reference=0.7), prediction="velocity")
    discrete = MaskAndReplace(Transitions(), conditioning)
    measured: dict[str, Any] = {}
    for name, network, objective, codes in (
        ("continuous", transformer(size, identity.dimension), continuous, False),
        ("discrete", vq_transformer(size, identity.dimension), discrete, True),
    ):
        dataset = random_set(size, identity.dimension, device, codes=codes)
        plain, compiled = (
            plain_training(copy.deepcopy(network), copy.deepcopy(objective), dataset, size, device, compiled=choice)
            for choice in (False, True)
        )
        ours, share = training(copy.deepcopy(network), objective, dataset, size, device)
        measured[f"training_{name}"] = {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "images_per_s": ours,
            "images_per_s_plain": plain,
            "ratio": ours / plain,
            "images_per_s_plain_compiled": compiled,
            "ratio_compiled": ours / compiled,
            "share_of_matrix_peak": share,
        }
    before, after = drawing(size, identity, device)
    measured["drawing"] = {"images_per_s": after, "images_per_s_not_compiled": before, "ratio": after / before}
    return {**measured, **dataclasses.asdict(size), "side": 64, "device": device}


def transformer(size: Size, dimension: int) -> nn.Module:
    """Return the continuous network, which generates and edits."""
    config = TransformerConfig(image_size=64, layers=size.layers, heads=size.width // 64, head_width=64)
    return widen_input(build_transformer(config, embedding_dimension=dimension, seed=0))


def vq_transformer(size: Size, dimension: int) -> nn.Module:
    """Return the discrete network."""
    config = VQTransformerConfig(layers=size.code_layers, heads=size.width // 64, head_width=64)
    return build_vq_transformer(config, embedding_dimension=dimension, seed=0)


def random_set(size: Size, dimension: int, device: str, *, codes: bool) -> TrainingSet:
    """Return random images (N, 64, 64, 3) with references, or codes (N, 256), with embeddings (N, D)."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((size.rows, dimension)).astype(np.float16)
    shape = (size.rows, 256) if codes else (size.rows, 64, 64, 3)
    images = rng.integers(0, 1024 if codes else 256, shape).astype(np.int16 if codes else np.uint8)
    training_rows = TrainingRows(
        images=images,
        embeddings=rows,
        neighbours=rng.integers(0, size.rows, (size.rows, POOL)),
        reference=None if codes else images,
    )
    return TrainingSet(training_rows, rows, device=device)


class _Measured(Exception):  # noqa: N818 - not an error: the measurement is complete
    """Raised after the last window."""


class _LastWindow:
    """Metrics that end the run after three windows."""

    def __init__(self) -> None:
        self.windows: list[dict[str, float]] = []

    def log(self, *, images: int, values: dict[str, float]) -> None:
        self.windows.append(values)
        if len(self.windows) == 3:
            raise _Measured

    def grid(self, *, images: int, average: nn.Module) -> None:
        """Do nothing; no grid is due."""


class _NoCheckpoints:
    """Checkpoints that store nothing."""

    def latest(self) -> Path | None:
        return None

    def save(self, step: int, state: Path) -> None:
        """Do nothing; no checkpoint is due."""

    def scratch(self) -> Path:
        return Path("unused")


def training(
    network: nn.Module, objective: Objective, dataset: TrainingSet, size: Size, device: str
) -> tuple[float, float]:
    """Return images/s of the loop, and its share of the matrix peak, in the better of two windows."""
    config = TrainingConfig(
        images=size.batch * size.window * 100,
        batch_size=size.batch,
        log_images=size.batch * size.window,
        checkpoint_images=size.batch * size.window * 100,
        grid_images=size.batch * size.window * 100,
    )
    metrics = _LastWindow()
    with contextlib.suppress(_Measured):
        train(network, objective, dataset, config, checkpoints=_NoCheckpoints(), metrics=metrics, device=device)
    best = max(metrics.windows[1:], key=lambda window: window["images_per_s"])
    return best["images_per_s"], best["model_flops_utilisation"]


def plain_training(
    network: nn.Module, objective: nn.Module, dataset: TrainingSet, size: Size, device: str, *, compiled: bool
) -> float:
    """Return images/s of a plain loop: autocast, AdamW, EMA; on a GPU optionally compiled, with fused AdamW."""
    network, objective = network.to(device).train(), objective.to(device)
    average = ema_copy(network)
    compiled = compiled and device == "cuda"
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=compiled or None)
    if compiled:
        network.compile()

    def steps(first: int) -> None:
        for step in range(first, first + size.window):
            batch = dataset.batch(step, seed=0, size=size.batch)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = objective(network, batch, StepRandom(0, step, device=device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            ema_update(average, network, 0.999)

    steps(0)
    seconds = min(timed(lambda: steps(size.window)), timed(lambda: steps(2 * size.window)))
    return size.batch * size.window / seconds


def drawing(size: Size, identity: EncoderIdentity, device: str) -> tuple[float, float]:
    """Return images/s of a pipeline before and after ``compile``."""
    pipeline = new_pipeline(transformer(size, identity.dimension), identity, trained_neighbours=10)  # type: ignore[arg-type]
    pipeline.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    tokens = torch.randn(size.drawn, 11, identity.dimension + MARKER_CHANNELS)

    @torch.inference_mode()
    def sample(steps: int) -> None:
        backbone = pipeline.backbone
        generate(
            backbone,
            lambda pixels: pipeline.encoder.embed_pixels(pixels),
            SamplingRequest(
                tokens=tokens,
                targets=tokens[:, 0, :-MARKER_CHANNELS],
                candidates=1,
                negative=None,
                guidance_scale=2.0,
                steps=steps,
                noise=backbone.noise(len(tokens), steps, torch.Generator().manual_seed(0)),
                on_progress=None,
            ),
        )

    rates = []
    for compiled in (False, True):
        if compiled:
            pipeline.compile()
        sample(2)  # warm-up
        rates.append(size.drawn / min(timed(lambda: sample(size.steps)) for _ in range(2)))
    before, after = rates
    return before, after


def timed(run: Callable[[], None]) -> float:
    """Return the seconds until the device has finished."""
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
