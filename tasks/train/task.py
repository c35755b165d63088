"""Train stage: train a generator on images, embeddings and neighbours with Ray Train. Interrupted runs resume."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from infra import artifacts, logs, storage, tracking
from infra.compute import preemption, ray_train
from infra.compute.progress import Progress
from infra.errors import InputError, IntegrityError, NotFoundError
from infra.uris import masked
from model.encoder.identity import EncoderIdentity
from model.errors import ModelError
from model.images import image_grid, to_pil
from model.networks.vq_transformer import VQTransformerConfig
from model.pipeline import new_pipeline
from model.saved_generator import contents_digest, pretrained_folder
from model.training import loop
from model.training.data import TrainingRows, TrainingSet
from model.training.preview import decode_targets, generate_preview
from tasks.references.domain_folder import DomainFolder
from tasks.references.types import Generator, StageResult, config_to_dict, encoder_of, require_same_encoder
from tasks.stage import run_stage, stage_task
from tasks.train.data import ImageProcessing, TrainingInputs, database_rows, load_training_set, training_shards
from tasks.train.setup import TrainConfig, TrainingSetup, build_setup, objective_of

PIPELINE = "pipeline"
"""Subfolder of a generator that ``KNNDiffusionPipeline.from_pretrained`` loads."""
CHECKPOINTS_KEPT = 2
"""The newest checkpoint, and the one before in case the newest is damaged."""
NOT_RETRYABLE = (ModelError, InputError, IntegrityError)
"""Worker errors that a retry cannot fix."""
OUTAGE_PAUSE = 10
"""After a failed call to the tracking server, pause tracking for this many times the duration of the call."""
PREVIEWED = 16
"""Images on a sample sheet."""


@stage_task(name="train")
def train(
    inputs: TrainingInputs, folder: DomainFolder, config: TrainConfig, *, run: tracking.Run | None = None
) -> StageResult[Generator]:
    """Train on ``inputs`` and store the pipeline under ``<folder>/generator/<key>``.

    After an interruption the same call resumes from the last checkpoint. The number of workers may change.

    Raises:
        EncoderMismatchError: the inputs, or the generator to fine-tune, use different encoders.
        InputError: the network, its autoencoder and the image size do not fit each other.
        ModelError: the loss diverged, memory ran out, or the checkpoint belongs to another network.
        StageError: the cluster has too few resources, or a worker died too often. The last checkpoint is kept.
    """
    config, sources = _with_absolute_paths(config), inputs.as_inputs()
    for name in ("start_from", "autoencoder"):
        if (given := getattr(config, name)) is not None:
            sources[name] = {"uri": given, "digest": contents_digest(given)}
    stage = artifacts.ArtifactBuilder(folder.uri, Generator.kind, inputs=sources, config=key_settings(config))

    def make() -> artifacts.Manifest:
        embeddings, database = inputs.embeddings.manifest(), inputs.database.manifest()
        require_same_encoder(embeddings=embeddings, database=database, neighbours=inputs.neighbours.manifest())
        build_setup(config, encoder_of(embeddings))  # fails here, before workers start, if the parts do not fit
        if PIPELINE not in stage.done():
            ray_train.train(
                train_worker,
                {"inputs": inputs, "folder_uri": stage.uri, "config": config, "cache": folder.cache, "run": run},
                workers=config.workers,
                cpus_per_worker=config.cpus_per_worker,
                use_gpu=config.use_gpu,
                folder_uri=stage.uri,
                final=NOT_RETRYABLE,
            )
        done = stage.done()[PIPELINE]
        return stage.commit([done], identity=embeddings.identity, info=done.info | {"asked": config_to_dict(config)})

    return run_stage(stage, Generator, make, note=_note)


def generator_folder(generator: Generator, cache: Path) -> Path:
    """Return a local copy of a generator's pipeline folder, with every file verified."""
    manifest = generator.manifest()
    paths = [artifacts.fetch_file(generator.uri, file, cache) for file in manifest.files]
    if storage.is_local(generator.uri):
        return storage.local_path(storage.join(generator.uri, PIPELINE))
    folder = cache / "generators" / manifest.digest / PIPELINE
    for file, path in zip(manifest.files, paths, strict=True):
        link = folder.parent / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not (link.exists() and link.samefile(path)):  # missing, or a link to a damaged file that was fetched again
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                os.link(path, Path(temporary, link.name))
                Path(temporary, link.name).replace(link)
    return folder


class _Checkpoints:
    """Checkpoints of the training loop in the stage's folder: a file, then its marker. The newest few are kept.

    The marker also holds the metrics logged last. A run that was killed after its last step reads them from there.
    """

    def __init__(self, folder_uri: str, scratch: Path, cache: Path, metrics: "_Metrics", world: int) -> None:
        self._uri, self._scratch, self._cache = storage.join(folder_uri, "checkpoints"), scratch, cache
        self._metrics, self._world = metrics, world

    def latest(self) -> Path | None:
        """Return the newest checkpoint that all workers can read. Raises ``IntegrityError`` if all are damaged."""
        markers = [name for name in storage.list_names(storage.join(self._uri, "shards")) if name.endswith(".json")]
        for name in sorted((marker.removesuffix(".json") for marker in markers), reverse=True):
            path = None
            try:
                shard = artifacts.read_shard(self._uri, name)
                path = artifacts.fetch_file(self._uri, shard.files[0], self._cache)
            except (IntegrityError, NotFoundError) as error:
                logs.get("train").warning("checkpoint %s is damaged, using the previous one: %s", name, error)
            if _all_workers(path is not None, self._world):
                self._metrics.last = shard.info.get("values", {})
                return path
        if markers:
            raise IntegrityError(
                f"all checkpoints are damaged: {self._uri}; delete that folder to train from the start"
            )
        return None

    def scratch(self) -> Path:
        return self._scratch / "state.pt"

    def save(self, step: int, state: Path) -> None:
        name = f"{step:09d}"
        folder = self._scratch / name
        folder.mkdir()
        state.rename(folder / f"{name}.pt")
        artifacts.commit_shard(self._uri, name, folder, rows=0, info={"step": step, "values": self._metrics.last})
        (folder / f"{name}.pt").unlink()
        for marker in storage.list_names(storage.join(self._uri, "shards"))[:-CHECKPOINTS_KEPT]:
            storage.discard(storage.join(self._uri, "shards", marker))
            storage.discard(storage.join(self._uri, f"{marker.removesuffix('.json')}.pt"))


def _all_workers(found: bool, world: int) -> bool:
    """Return True if ``found`` is True on all of ``world`` workers, which must resume from the same step."""
    answers = [found] * world
    if world > 1:
        dist.all_gather_object(answers, found)
    return all(answers)


class _Metrics:
    """Metrics of the training loop: progress for the driver, values and sample sheets for the tracking server."""

    def __init__(self, folder_uri: str, total: int, run: tracking.Run | None, preview: "_Preview") -> None:
        self._progress, self._total, self._run, self._preview = Progress(folder_uri), total, run, preview
        self.last: dict[str, float] = {}
        self._outage, self._retry_at = False, 0.0

    def log(self, *, images: int, values: dict[str, float]) -> None:
        note = f"loss {values['loss']:.4f}, {values['images_per_s']:.0f} images/s"
        self._progress("train", images, self._total, note)
        self.last = values
        self._track(lambda run: run.log(step=images, values=values))

    def grid(self, *, images: int, average: nn.Module) -> None:
        if self._run is not None:
            with storage.scratch() as folder:
                path = folder / f"{images:09d}.png"
                self._preview.sheet(average).save(path)
                self._track(lambda run: run.file(path, "samples"))

    def _track(self, send: Callable[[tracking.Run], None]) -> None:
        """Send to the tracking server. During an outage data points are dropped, and training is hardly delayed."""
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


class _Preview:
    """Sample sheets: a few fixed training images, each next to an image generated for it."""

    COLUMNS = 4

    def __init__(self, inputs: TrainingInputs, setup: TrainingSetup, processing: ImageProcessing, cache: Path) -> None:
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
        previewed = TrainingRows(
            images=rows.images[:PREVIEWED],
            embeddings=rows.embeddings[:PREVIEWED],
            neighbours=rows.neighbours[:PREVIEWED],
        )
        return TrainingSet(previewed, database_rows(self._inputs.database, self._cache), device=self._processing.device)


def train_worker(arguments: dict[str, Any]) -> None:
    """Run training on one Ray Train worker; rank 0 saves the pipeline."""
    inputs: TrainingInputs = arguments["inputs"]
    config: TrainConfig = arguments["config"]
    cache: Path = arguments["cache"]
    folder_uri: str = arguments["folder_uri"]
    rank, world = ray_train.worker_rank()
    if not config.use_gpu:
        torch.set_num_threads(config.cpus_per_worker)
    setup = build_setup(config, encoder_of(inputs.embeddings.manifest()))
    processing = image_processing(config, setup)
    data = load_training_set(inputs, processing, cache, window_bytes=config.window_bytes, rank=rank, world=world)
    total = config.training.steps * config.training.batch_size
    with storage.scratch() as scratch, preemption.deferred_sigterm():
        preview = _Preview(inputs, setup, processing, cache)
        metrics = _Metrics(folder_uri, total, arguments["run"], preview)
        average = loop.train(
            setup.network,
            objective_of(config, setup),
            data,
            config.training,
            checkpoints=_Checkpoints(folder_uri, scratch, cache, metrics, world),
            metrics=metrics,
            device=processing.device,
            rank=rank,
            world=world,
            stop=preemption.stop_requested,
        )
        if rank == 0:
            info = {"images_seen": total, **metrics.last, "parameters": sum(p.numel() for p in average.parameters())}
            save_pipeline(average, setup, encoder_of(inputs.embeddings.manifest()), scratch / "out" / PIPELINE)
            artifacts.commit_shard(folder_uri, PIPELINE, scratch / "out", rows=len(data), info=info)


def save_pipeline(average: nn.Module, setup: TrainingSetup, encoder: EncoderIdentity, folder: Path) -> None:
    """Save the trained network as a pipeline in ``folder``."""
    autoencoder = None if setup.autoencoder is None else setup.autoencoder.cpu()
    pipeline = new_pipeline(
        average.cpu(),
        encoder,
        prediction=setup.prediction,
        vae=autoencoder,
        scheduler=setup.scheduler,
        **setup.defaults,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def image_processing(config: TrainConfig, setup: TrainingSetup) -> ImageProcessing:
    """Return the image preparation of this worker: size, device and autoencoder."""
    # With its index: the current device is per thread, and prefetch threads do not inherit it.
    device = f"cuda:{torch.cuda.current_device()}" if config.use_gpu else "cpu"
    autoencoder = None if setup.autoencoder is None else setup.autoencoder.to(device)
    folder = config.autoencoder or f"{config.start_from}/vae"
    return ImageProcessing(
        side=setup.image_size,
        autoencoder=autoencoder,
        autoencoder_digest=contents_digest(folder) if autoencoder else "",
        codes=isinstance(setup.size, VQTransformerConfig),
        editing=config.editing,
        device=device,
        threads=config.cpus_per_worker,
    )


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return the config with absolute folders, because workers run in another working directory."""
    start = None if config.start_from is None else str(pretrained_folder(config.start_from).absolute())
    autoencoder = None if config.autoencoder is None else str(Path(config.autoencoder).absolute())
    return dataclasses.replace(config, start_from=start, autoencoder=autoencoder)


def key_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that determine the weights, up to rounding.

    Settings of workers, memory and logging are left out, so that a run can resume with other values.
    """
    settings = config_to_dict(config, without=("workers", "cpus_per_worker", "use_gpu", "start_from", "autoencoder"))
    for name in ("pieces", "compile", "bfloat16_copy", "sharding", "log_images", "checkpoint_images", "grid_images"):
        settings["training"].pop(name)
    return settings


def _note(manifest: artifacts.Manifest) -> str:
    info = manifest.info
    measured = f", {info['images_per_s']:.0f}/s, loss {info['loss']:.4f}" if "loss" in info else ""
    return f"{info['images_seen']} images seen{measured}"
