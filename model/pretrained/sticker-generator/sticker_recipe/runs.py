"""Training runs: checkpoints in a folder, schedules, resumption with the same settings, and saved pipelines."""

import argparse
import dataclasses
import json
import logging
import math
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from model.configs import TrainingConfig
from model.errors import ModelError
from model.generation.backbone import is_discrete
from model.pipeline import KNNDiffusionPipeline, new_pipeline
from model.saved_generator import contents_digest, weights_digest
from model.training.data import TrainingSet
from model.training.ema import ema_copy
from model.training.interfaces import Objective
from model.training.loop import InterruptedTrainingError, train
from sticker_recipe.data import NEIGHBOURS, data_digest
from sticker_recipe.encoder import encoder_identity
from sticker_recipe.monitoring import Log

WARMUP, DISTIL_WARMUP = 200, 20
"""Steps in which the learning rate rises. A distillation is short, and starts from trained weights."""
DECAY_SHARE = 0.2
"""Share of a run, at its end, in which the schedule ``wsd`` lowers the learning rate."""
DECAY_PACE = 0.95
"""Planned share of the decay's time; the rest covers its start and slower steps."""
RESERVE_S, RESERVE_SHARE = 60.0, 0.1
"""Seconds, and largest share of a run, that are left for figures and files of a run with ``--export``."""
SHARD_SIZE = "15MB"
LATER = {
    "own_style_share": 0.0, "balanced": False, "fewer_neighbours": 0.1, "mean_query": 0.0,
    "sigma_mean": 0.0, "sigma_deviation": 1.0, "schedule": "cosine", "image_tokens": 0,
    "patch": 4, "prediction": "velocity", "rotary": False,
}  # fmt: skip
"""Settings that older runs did not store, with the values that they had."""
log = logging.getLogger("sticker-generator")


class Folder:
    """Checkpoints in a local folder, replaced atomically by renaming."""

    def __init__(self, folder: Path) -> None:
        """Store ``checkpoint.pt`` in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "checkpoint.pt"

    def latest(self) -> Path | None:
        """Return the path of the checkpoint, or None."""
        return self.path if self.path.exists() else None

    def scratch(self) -> Path:
        """Return the path for writing the next checkpoint."""
        return self.path.with_suffix(".partial")

    def save(self, step: int, state: Path) -> None:
        """Replace the checkpoint by the file ``state``."""
        state.rename(self.path)

    def step(self) -> int:
        """Return the step of the checkpoint; 0 if there is none."""
        return int(torch.load(self.path, mmap=True, weights_only=True)["step"]) if self.path.exists() else 0


class Stop:
    """Decides after every step whether a stage ends, and measures the speed."""

    def __init__(
        self, requested: threading.Event, *, at: float, steps: float = math.inf, another_start: bool = False
    ) -> None:
        """End the stage at the time ``at``, after ``steps`` steps, or when ``requested`` is set.

        With ``another_start``, it ends earlier by the time until its first step, which the next stage needs again.
        """
        self._requested, self._at, self._steps, self._another_start = requested, at, steps, another_start
        self._created, self._done, self._first, self._last = time.monotonic(), 0, 0.0, 0.0

    def __call__(self) -> bool:
        """Count a step. Return True if the stage ends."""
        self._last = time.monotonic()
        self._first = self._first or self._last  # the first step compiles
        self._done += 1
        at = self._at - self.start_seconds if self._another_start else self._at
        return self._requested.is_set() or self._last >= at or self._done >= self._steps

    @property
    def start_seconds(self) -> float:
        """Time until the end of the first step, which includes compilation."""
        return max(self._first - self._created, 0)

    @property
    def seconds_per_step(self) -> float:
        """Mean duration of the steps after the first; infinite if there are none."""
        return (self._last - self._first) / (self._done - 1) if self._done > 1 else math.inf


class Trained(NamedTuple):
    """The averaged network, the images that it was trained on, and the seconds and images of this run."""

    network: Any
    images: int
    seconds: float
    new_images: int


class Run:
    """A run of a command: a network, trained in stages by one schedule."""

    def __init__(
        self, network: nn.Module, objective: Objective, dataset: TrainingSet, options: argparse.Namespace, metrics: Log
    ) -> None:
        """Combine the parts of the training."""
        self._network, self._objective, self._dataset = network, objective, dataset
        self._options, self._metrics = options, metrics
        reserve = min(RESERVE_S, RESERVE_SHARE * 60 * options.minutes) if options.export else 0
        self._deadline = options.started + 60 * options.minutes - reserve
        self._requested = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: self._requested.set())  # finish and save the current step first

    def cosine(self, config: TrainingConfig, checkpoints: Folder) -> tuple[nn.Module, int]:
        """Train in one stage. Return the average and its step."""
        return self._stage(config, checkpoints, Stop(self._requested, at=self._deadline))

    def warm_up_stable_decay(self, config: TrainingConfig, checkpoints: Folder) -> tuple[nn.Module, int]:
        """Train at a constant rate, save the checkpoint to resume from, and lower the rate to 0 in a copy of it.

        The next run resumes from before the decay, so several short runs add up (WSD, 2404.06395, section 4).
        """
        now, steps, start = time.monotonic(), config.steps, checkpoints.step()
        stable_steps = steps - round(DECAY_SHARE * steps)
        end_of_stable = now + (1 - DECAY_SHARE) * (self._deadline - now)
        stable = Stop(self._requested, at=end_of_stable, steps=stable_steps - start, another_start=True)
        if start < stable_steps:
            self._stage(dataclasses.replace(config, schedule="constant"), checkpoints, stable, last=False)
        step = checkpoints.step()
        decay = max(1, steps - step)
        if math.isfinite(self._deadline) and start < stable_steps:
            remaining = max(self._deadline - time.monotonic() - stable.start_seconds, 0)
            decay = max(1, min(decay, int(DECAY_PACE * remaining / stable.seconds_per_step)))
        decaying = Folder(checkpoints.path.parent / "decay")
        shutil.copyfile(checkpoints.path, decaying.path)
        size = config.batch_size
        config = dataclasses.replace(
            config, images=(step + decay) * size, schedule="constant", decay_images=decay * size,
            checkpoint_images=(step + decay + 1) * size,
        )  # fmt: skip
        average, end = self._stage(config, decaying, Stop(self._requested, at=self._deadline))
        shutil.rmtree(decaying.path.parent)
        log.info("the learning rate fell to 0 in %d of %d steps; the next run resumes at step %d", decay, end, step)
        return average, end

    def _stage(
        self, config: TrainingConfig, checkpoints: Folder, stop: Stop, *, last: bool = True
    ) -> tuple[nn.Module, int]:
        """Train until the end of ``config`` or ``stop``. Return the average and its step. Exit on SIGTERM."""
        name, device = self._options.command, self._options.device
        try:
            average = train(
                self._network, self._objective, self._dataset, config,
                checkpoints=checkpoints, metrics=self._metrics, device=device, stop=stop,
            )  # fmt: skip
        except InterruptedTrainingError as interruption:
            if self._requested.is_set():
                raise SystemExit(f"{name}: {interruption}") from None
            if last:
                log.info("--minutes %g: %s", self._options.minutes, interruption)
            state = torch.load(checkpoints.path, map_location=device, weights_only=True)
            average = ema_copy(self._network)
            average.load_state_dict(state["average"])
            if last:
                self._metrics.grid(images=state["step"] * config.batch_size, average=average)
            return average, state["step"]
        return average, config.steps


def run(
    network: nn.Module,
    objective: Objective,
    dataset: TrainingSet,
    options: argparse.Namespace,
    metrics: Log,
    **settings: Any,
) -> Trained:
    """Train in the command's output folder, and return the averaged network on the CPU."""
    checkpoints = Folder(options.out / options.command)
    require_same_run(options.out / options.command / "settings.json", options)
    config = TrainingConfig(
        images=options.images,
        batch_size=options.batch,
        learning_rate=options.rate,
        warmup_images=(DISTIL_WARMUP if options.command == "distil" else WARMUP) * options.batch,
        ema_decay=options.ema,
        weight_decay=0.05,
        checkpoint_images=options.watch * options.batch,
        log_images=200 * options.batch,
        grid_images=options.watch * options.batch,
        **settings,
    )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    log.info("%s: %.1fM parameters, %d images", options.command, parameters / 1e6, len(dataset))
    started, before = time.monotonic(), checkpoints.step()
    running = Run(network, objective, dataset, options, metrics)
    train_by = running.warm_up_stable_decay if options.schedule == "wsd" else running.cosine
    average, step = train_by(config, checkpoints)
    seconds = time.monotonic() - started
    log.info("trained in %.0f s on %s", seconds, options.device)
    size = options.batch
    return Trained(network=average.cpu(), images=step * size, seconds=seconds, new_images=(step - before) * size)


def require_same_run(stored: Path, options: argparse.Namespace) -> None:
    """Store the settings of a run, or exit if its checkpoint was trained with other settings.

    Only the number of images may change, so a run can be extended.
    """
    names = ("size", "width", "head", "layers", "batch", "rate", "ema", *LATER)
    settings = {name: getattr(options, name) for name in names}
    settings |= {"channels": list(options.channels), "data": data_digest(options)}
    if options.command == "distil":
        settings |= {"steps": options.steps, "teacher": contents_digest(str(options.start_from))}
    if options.command == "discrete":
        settings["codes"] = weights_digest(str(options.out / "codes" / "vae"))
    if not stored.exists():
        stored.write_text(json.dumps(settings, indent=1))
    before = LATER | json.loads(stored.read_text())
    changed = [
        f"{name} {before.get(name)}, now {value}" for name, value in settings.items() if before.get(name) != value
    ]
    if changed:
        raise SystemExit(
            f"settings differ from those of the run in {stored.parent}: {'; '.join(changed)}; use another --out, or "
            "remove that folder"
        )


def open_continuous(options: argparse.Namespace) -> KNNDiffusionPipeline:
    """Open the pipeline ``--start-from``: over pixels, for any number of steps, of the same encoder. Exit otherwise."""
    try:
        pipeline = KNNDiffusionPipeline.open(options.start_from)
    except ModelError as error:
        raise SystemExit(f"--start-from: {error}") from None
    few_steps, over_pixels = pipeline.config.noise_levels is not None, pipeline.vae is None
    if few_steps or not over_pixels or is_discrete(pipeline.transformer):
        kind = "was distilled to few steps" if few_steps else "has an autoencoder"
        raise SystemExit(f"--start-from {kind}: {options.start_from}; give a pipeline of train.py base")
    if not pipeline.identity.same_space(wanted := encoder_identity(options)):
        raise SystemExit(
            f"--start-from has another encoder: {pipeline.identity}, not {wanted}; train from random weights"
        )
    return pipeline


def save(network: Any, options: argparse.Namespace, *, guide: Any = None, **settings: Any) -> Path:
    """Save the pipeline of ``network``, and its guide, in float16, with ``--export`` in shards. Return its folder."""
    folder: Path = options.out / options.command / "pipeline"
    settings |= {"trained_neighbours": NEIGHBOURS, "guide": None if guide is None else guide.half()}
    pipeline = new_pipeline(network.half(), encoder_identity(options), **settings)
    shutil.rmtree(folder, ignore_errors=True)  # shards of an earlier run could remain
    pipeline.save_pretrained(folder, max_shard_size=SHARD_SIZE if options.export else "10GB")
    return folder
