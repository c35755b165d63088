"""Results of a run: the chosen weights, figures and grids on the unseen styles, and their export as small files."""

import argparse
import copy
import io
import json
import logging
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.images import image_grid, to_pil, to_pixels
from model.metrics.embedding_metrics import authentic, distinct_nearest
from sticker_recipe.encoder import load_encoder
from sticker_recipe.monitoring import ConditionLosses, Unseen

log = logging.getLogger("sticker-generator")
PART_BYTES = 15 * 2**20
"""Size of the parts of an exported archive, below a limit of 16 MiB."""


class Snapshots:
    """The snapshot on whose unseen images the condition helps most, kept in a file."""

    def __init__(self, path: Path) -> None:
        """Keep the snapshot in ``path``."""
        self._path = path

    def offer(self, images: int, average: nn.Module, losses: ConditionLosses) -> None:
        """Keep ``average`` if its condition helps more than that of the stored snapshot."""
        gap = losses.gap.mean(0)
        stored = self._stored()
        if stored is not None and stored["gap"].mean() <= gap.mean():
            return
        unfinished = self._path.with_suffix(".partial")
        torch.save({"images": images, "gap": gap, "weights": _half_weights(average)}, unfinished)
        unfinished.rename(self._path)

    def choose(self, images: int, average: nn.Module, losses: ConditionLosses) -> int:
        """Load the stored snapshot into ``average`` if it is clearly better. Return the images of the chosen weights.

        It must be better by two standard errors, over the same images and noise. The last weights are otherwise
        preferred, because their learning rate has decayed.
        """
        stored = self._stored()
        if stored is None:
            return images
        advantage: Tensor = losses.gap.mean(0) - stored["gap"]
        if advantage.mean() <= 2 * advantage.std() / len(advantage) ** 0.5:
            return images
        average.load_state_dict({name: part.float() for name, part in stored["weights"].items()})
        return int(stored["images"])

    def _stored(self) -> dict[str, Any] | None:
        return torch.load(self._path, weights_only=True) if self._path.exists() else None


class EarlySnapshot:
    """The first snapshot after a share of the run, kept in a file. The finished network is guided by it."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        """Keep the snapshot after the share ``--guide-share`` in ``path``. A resumed run keeps that of its start."""
        self._path, self._options = path, options

    def offer(self, images: int, average: nn.Module, losses: ConditionLosses) -> None:
        """Keep ``average`` if the share has passed and there is none yet. ``losses`` are unused."""
        options = self._options
        elapsed = (time.monotonic() - options.started) / (60 * options.minutes)
        share = max(images / options.images, elapsed)
        if self._path.exists() or not options.guide_share <= share < 1:  # the last weights cannot guide themselves
            return
        unfinished = self._path.with_suffix(".partial")
        torch.save({"images": images, "weights": _half_weights(average)}, unfinished)
        unfinished.rename(self._path)
        log.info("the average after %d images is the guide", images)

    def network(self, average: nn.Module) -> nn.Module | None:
        """Return a copy of ``average`` with the weights of the snapshot; None if the run was too short for one."""
        if not self._path.exists():
            log.warning("no guide: the run had no snapshot after --guide-share; lower --watch or --guide-share")
            return None
        stored = torch.load(self._path, weights_only=True)["weights"]
        guide = copy.deepcopy(average)
        guide.load_state_dict({name: part.float() for name, part in stored.items()})
        return guide


def _half_weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: part.detach().half().cpu() for name, part in network.state_dict().items()}


def write_results(
    network: nn.Module,
    unseen: dict[str, Unseen],
    training_rows: NDArray[np.float16],
    options: argparse.Namespace,
    facts: dict[str, Any],
) -> None:
    """Write ``figures.json``, and a grid of samples for every unseen style, beside the checkpoint."""
    folder, encoder = options.out / options.command, load_encoder(options)
    network.to(options.device)
    figures = {**facts, "device": options.device, "unseen": {}, "authenticity": {}}
    for name, style in unseen.items():
        samples = style.samples(network)
        image_grid(to_pil(samples)).save(folder / f"unseen-{name}.png")
        figures["unseen"][name] = style.condition_losses(network).table()
        rows = encoder.embed_pixels(to_pixels(samples)).numpy()
        figures["authenticity"][name] = authenticity(rows, training_rows.astype(np.float32))
    network.cpu()
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))


def authenticity(samples: NDArray[np.float32], training: NDArray[np.float32]) -> float:
    """Return the share of samples (N, D) that are not copies of training images (M, D)."""
    scores = samples @ training.T
    nearest = scores.argmax(axis=1)
    others = training[nearest] @ training.T
    others[np.arange(len(nearest)), nearest] = -np.inf
    return float(authentic(scores.max(axis=1), distinct_nearest(others)).mean())


def export(folder: Path, target: Path) -> None:
    """Copy figures and grids of ``folder`` to ``target``, and its pipeline as parts of a tar archive.

    ``cat pipeline.tar.* | tar x`` restores the pipeline.
    """
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("pipeline.tar.*"):
        old.unlink()
    for path in (folder / "figures.json", *sorted(folder.glob("unseen-*.png"))):
        shutil.copyfile(path, target / path.name)
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        tar.add(folder / "pipeline", "pipeline")
    for number, start in enumerate(range(0, whole.tell(), PART_BYTES)):
        (target / f"pipeline.tar.{number:02d}").write_bytes(whole.getbuffer()[start : start + PART_BYTES])
