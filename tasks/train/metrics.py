"""Metrics and sample sheets of a training run: progress for the driver, values for the tracking server."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from infra import logs, storage, tracking
from infra.compute.progress import Progress
from infra.uris import masked
from model.images import image_grid, to_pil
from model.training.data import TrainingRows, TrainingSet
from model.training.preview import decode_targets, generate_preview
from tasks.train.data import database_images, database_rows, training_shards
from tasks.train.inputs import TrainingInputs
from tasks.train.setup import TrainingSetup
from tasks.train.shard_source import ImageProcessing

OUTAGE_PAUSE = 10
"""After a failed call to the tracking server, pause tracking for this many times the duration of the call."""
PREVIEWED = 16
"""Number of training images on a sample sheet."""


class Metrics:
    """Metrics of the training loop: progress for the driver, values and sample sheets for the tracking server."""

    def __init__(self, folder_uri: str, total: int, run: tracking.Run | None, preview: "Preview") -> None:
        """Report to the driver through ``folder_uri``, and to the tracking server if there is a ``run``."""
        self._progress, self._total, self._run, self._preview = Progress(folder_uri), total, run, preview
        self.last: dict[str, float] = {}
        self._outage, self._retry_at = False, 0.0

    def log(self, *, images: int, values: dict[str, float]) -> None:
        """Report metrics after ``images`` training images."""
        note = f"loss {values['loss']:.4f}, {values['images_per_s']:.0f} images/s"
        self._progress("train", images, self._total, note)
        self.last = values
        self._track(lambda run: run.log(step=images, values=values))

    def grid(self, *, images: int, average: nn.Module) -> None:
        """Send a sample sheet of the averaged network to the tracking server."""
        if self._run is not None:
            with storage.scratch() as folder:
                path = folder / f"{images:09d}.png"
                self._preview.sheet(average).save(path)
                self._track(lambda run: run.file(path, "samples"))

    def _track(self, send: Callable[[tracking.Run], None]) -> None:
        """Send data to the tracking server. During an outage, drop data points instead of delaying the training."""
        started = time.monotonic()
        if self._run is None or started < self._retry_at:
            return
        try:
            send(self._run)
            self._outage = False
        except Exception as error:  # from MLflow, its database or its artifact store
            if not self._outage:
                message = "MLflow does not respond; training continues without tracking until it does: %s"
                logs.get("train").warning(message, masked(str(error)))
            self._outage, ended = True, time.monotonic()
            self._retry_at = ended + OUTAGE_PAUSE * (ended - started)


class Preview:
    """Sample sheets: a few fixed training images, each next to an image generated for it."""

    COLUMNS = 4

    def __init__(self, inputs: TrainingInputs, setup: TrainingSetup, processing: ImageProcessing, cache: Path) -> None:
        """Store the arguments. The training images are read for the first sheet."""
        self._inputs, self._setup, self._cache = inputs, setup, cache
        self._processing = dataclasses.replace(processing, editing=False)
        self._data: TrainingSet | None = None

    def sheet(self, average: nn.Module) -> Image.Image:
        """Return pairs in rows of four: a training image, and an image generated from its embedding and neighbours."""
        self._data = self._data or self._first_images()
        batch = self._data.batch(0, seed=0, size=len(self._data))
        neighbours = batch.neighbours[:, : self._setup.defaults["trained_neighbours"]]
        autoencoder = self._setup.autoencoder
        generated = generate_preview(
            average,
            dataclasses.replace(batch, neighbours=neighbours),
            prediction=self._setup.prediction,
            autoencoder=autoencoder,
        )
        originals = decode_targets(batch.images, autoencoder)
        pairs = zip(to_pil(originals), to_pil(generated), strict=True)
        return image_grid([image for pair in pairs for image in pair], columns=2 * self.COLUMNS)

    def _first_images(self) -> TrainingSet:
        rows = training_shards(self._inputs, self._processing, self._cache)[0].load()
        shown = rows.neighbours[:PREVIEWED]
        used, renumbered = np.unique(shown, return_inverse=True)  # only these rows are read
        previewed = TrainingRows(
            images=rows.images[:PREVIEWED],
            embeddings=rows.embeddings[:PREVIEWED],
            neighbours=renumbered.reshape(shown.shape),
        )
        images = database_images(self._inputs.database, self._processing, self._cache)
        return TrainingSet(
            previewed,
            database_rows(self._inputs.database, self._cache)[used],
            device=self._processing.device,
            database_images=None if images is None else images[used],
        )
