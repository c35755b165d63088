"""Training runs: checkpoints in a folder, resumption with the same settings, and saved pipelines."""

import argparse
import json
import logging
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.encoder.clip import Encoder
from model.pipeline import new_pipeline
from model.saved_generator import weights_digest
from model.training.data import TrainingSet
from model.training.ema import ema_copy
from model.training.interfaces import Objective, TrainingConfig
from model.training.loop import InterruptedTrainingError, train
from sticker_recipe.data import NEIGHBOURS, data_digest
from sticker_recipe.monitoring import Log, Unseen

log = logging.getLogger("sticker-generator")


class Folder:
    """Checkpoints in a local folder, replaced atomically by renaming."""

    def __init__(self, folder: Path) -> None:
        """Store ``checkpoint.pt`` in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self._state = folder / "checkpoint.pt"

    def latest(self) -> Path | None:
        """Return the path of the checkpoint, or None."""
        return self._state if self._state.exists() else None

    def scratch(self) -> Path:
        """Return the path for writing the next checkpoint."""
        return self._state.with_suffix(".partial")

    def save(self, step: int, state: Path) -> None:
        """Replace the checkpoint by the file ``state``."""
        state.rename(self._state)


def run(
    network: nn.Module,
    objective: Objective,
    dataset: TrainingSet,
    options: argparse.Namespace,
    unseen: Unseen | None,
    **settings: Any,
) -> nn.Module:
    """Train in the command's output folder and return the averaged network on the CPU."""
    name = options.command
    folder = options.out / name
    checkpoints = Folder(folder)
    require_same_run(folder / "settings.json", options)
    training = TrainingConfig(
        images=options.images,
        batch_size=options.batch,
        learning_rate=options.rate,
        warmup_images=200 * options.batch,
        ema_decay=options.ema,
        weight_decay=0.05,
        checkpoint_images=options.watch * options.batch,
        log_images=200 * options.batch,
        grid_images=options.watch * options.batch,
        **settings,
    )
    log.info("%s: %.1fM parameters, %d images", name, sum(p.numel() for p in network.parameters()) / 1e6, len(dataset))
    stop_requested, started, metrics = threading.Event(), time.monotonic(), Log(folder, unseen)
    deadline = options.started + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: stop_requested.set())  # finish and save the current step first
    try:
        average = train(
            network, objective, dataset, training, checkpoints=checkpoints, metrics=metrics, device=options.device,
            stop=lambda: stop_requested.is_set() or time.monotonic() >= deadline,
        )  # fmt: skip
    except InterruptedTrainingError as interruption:
        if stop_requested.is_set():
            raise SystemExit(f"{name}: {interruption}") from None
        log.info("--minutes %g: %s", options.minutes, interruption)
        state = torch.load(folder / "checkpoint.pt", map_location=options.device, weights_only=True)
        average = ema_copy(network)
        average.load_state_dict(state["average"])
        metrics.grid(images=state["step"] * options.batch, average=average)
    log.info("trained in %.0f s on %s", time.monotonic() - started, options.device)
    return average.cpu()


def require_same_run(stored: Path, options: argparse.Namespace) -> None:
    """Store the settings of a run, or exit if its checkpoint was trained with other settings.

    Only the number of images may change, so a run can be extended.
    """
    settings = {name: getattr(options, name) for name in ("size", "width", "head", "layers", "batch", "rate", "ema")}
    settings |= {"channels": list(options.channels), "data": data_digest(options)}
    if options.command == "discrete":
        settings["codes"] = weights_digest(str(options.out / "codes" / "vae"))
    if not stored.exists():
        stored.write_text(json.dumps(settings, indent=1))
    before = json.loads(stored.read_text())
    changed = [
        f"{name} {before.get(name)}, now {value}" for name, value in settings.items() if before.get(name) != value
    ]
    if changed:
        raise SystemExit(
            f"settings differ from those of the run in {stored.parent}: {'; '.join(changed)}; use another --out, or "
            "remove that folder"
        )


def save(network: Any, folder: Path, **settings: Any) -> None:
    """Save the pipeline of ``network`` in float16 to ``folder``."""
    pipeline = new_pipeline(network.half(), Encoder().identity, trained_neighbours=NEIGHBOURS, **settings)
    pipeline.save_pretrained(folder / "pipeline")
