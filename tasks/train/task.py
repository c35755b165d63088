"""Train: pictures, their embeddings and their neighbours to a generator, on Ray Train workers, resumable."""

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
from tasks.references.types import Generator, StageResult, config_to_dict, encoder_of, require_same_encoder
from tasks.stage import run_stage, stage_task
from tasks.train.data import ImageProcessing, TrainingInputs, database_rows, load_training_set, training_shards
from tasks.train.setup import TrainConfig, TrainingSetup, build_setup, objective_of

PIPELINE = "pipeline"
"""The folder, below a generator's, that ``KNNDiffusionPipeline.from_pretrained`` loads."""
CHECKPOINTS_KEPT = 2
"""The newest, and one to go back to should it be damaged."""
NOT_RETRYABLE = (ModelError, InputError, IntegrityError)
"""What a worker raises that no second try mends."""
OUTAGE_PAUSE = 10
"""A tracking server that did not answer is left alone for so many times as long as it was waited for."""
PREVIEWED = 16
"""Pictures on the sheet that shows a network learn."""


@stage_task(name="train")
def train(
    inputs: TrainingInputs, base: str, config: TrainConfig, *, cache: Path, run: tracking.Run | None = None
) -> StageResult[Generator]:
    """Train on ``inputs`` and store the pipeline under ``base/generator/<key>``.

    Killed at any point, the same call goes on from the last checkpoint, on as many workers as it is given.

    Raises:
        EncoderMismatchError: the inputs, or the generator to start from, were made by different encoders.
        InputError: the network, its autoencoder and the size of the pictures do not fit each other.
        ModelError: the loss diverged, memory is out, or the checkpoint is of another network.
        StageError: the cluster has no room, or a worker died too often; the last checkpoint is kept.
    """
    config, sources = _located(config), inputs.as_inputs()
    for name in ("start_from", "autoencoder"):
        if (folder := getattr(config, name)) is not None:
            sources[name] = {"uri": folder, "digest": contents_digest(folder)}
    stage = artifacts.ArtifactBuilder(base, Generator.kind, inputs=sources, config=key_settings(config))

    def make() -> artifacts.Manifest:
        embeddings, database = inputs.embeddings.manifest(), inputs.database.manifest()
        require_same_encoder(embeddings=embeddings, database=database, neighbours=inputs.neighbours.manifest())
        build_setup(config, encoder_of(embeddings))  # what does not fit is told here, before workers start
        if PIPELINE not in stage.done():
            ray_train.train(
                train_worker,
                {"inputs": inputs, "folder_uri": stage.uri, "config": config, "cache": cache, "run": run},
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
    """The pipeline folder of a generator, every file verified, on this machine."""
    manifest = generator.manifest()
    paths = [artifacts.fetch_file(generator.uri, file, cache) for file in manifest.files]
    if storage.is_local(generator.uri):
        return storage.local_path(storage.join(generator.uri, PIPELINE))
    folder = cache / "generators" / manifest.digest / PIPELINE
    for file, path in zip(manifest.files, paths, strict=True):
        link = folder.parent / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not (link.exists() and link.samefile(path)):  # not there, or a link to a damaged file that was fetched anew
            with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
                os.link(path, Path(beside, link.name))
                Path(beside, link.name).replace(link)
    return folder


class _Checkpoints:
    """The loop's checkpoints in the stage's folder: a file, then its marker; the newest few are kept.

    The marker holds the numbers logged last, too: a run that was killed after its last step has them from there.
    """

    def __init__(self, folder_uri: str, scratch: Path, cache: Path, metrics: "_Metrics", world: int) -> None:
        self._uri, self._scratch, self._cache = storage.join(folder_uri, "checkpoints"), scratch, cache
        self._metrics, self._world = metrics, world

    def latest(self) -> Path | None:
        """The newest that every worker finds whole. Raises ``IntegrityError`` when none is."""
        markers = [name for name in storage.list_names(storage.join(self._uri, "shards")) if name.endswith(".json")]
        for name in sorted((marker.removesuffix(".json") for marker in markers), reverse=True):
            path = None
            try:
                shard = artifacts.read_shard(self._uri, name)
                path = artifacts.fetch_file(self._uri, shard.files[0], self._cache)
            except (IntegrityError, NotFoundError) as error:
                logs.get("train").warning("checkpoint %s is damaged, the one before is taken: %s", name, error)
            if _all_say(path is not None, self._world):
                self._metrics.last = shard.info.get("values", {})
                return path
        if markers:
            raise IntegrityError(f"no checkpoint in {self._uri} is whole; delete that folder to start anew")
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


def _all_say(found: bool, world: int) -> bool:
    """Whether all of ``world`` workers found what this one did: they must go on from one step."""
    answers = [found] * world
    if world > 1:
        dist.all_gather_object(answers, found)
    return all(answers)


class _Metrics:
    """The loop's numbers: to the bar of whoever watches, and to the tracking server; its pictures to the latter."""

    def __init__(self, folder_uri: str, total: int, run: tracking.Run | None, preview: "_Preview") -> None:
        self._progress, self._total, self._run, self._preview = Progress(folder_uri), total, run, preview
        self.last: dict[str, float] = {}
        self._outage, self._asked_again = False, 0.0

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

    def _track(self, tell: Callable[[tracking.Run], None]) -> None:
        """Tell the tracking server. One that does not answer costs points of a chart, and little of the time."""
        started = time.monotonic()
        if self._run is None or started < self._asked_again:
            return
        try:
            tell(self._run)
            self._outage = False
        except Exception as error:  # MLflow's, its database's, its artifact store's
            if not self._outage:
                told = "MLflow does not answer, training goes on and is not charted meanwhile: %s"
                logs.get("train").warning(told, masked(str(error)))
            self._outage, ended = True, time.monotonic()
            self._asked_again = ended + OUTAGE_PAUSE * (ended - started)


class _Preview:
    """Sheets of a few fixed pictures of the training set, each beside what the network draws for it."""

    COLUMNS = 4

    def __init__(self, inputs: TrainingInputs, setup: TrainingSetup, treatment: ImageProcessing, cache: Path) -> None:
        self._inputs, self._setup, self._cache = inputs, setup, cache
        self._treatment = dataclasses.replace(treatment, editing=False)
        self._data: TrainingSet | None = None

    def sheet(self, average: nn.Module) -> Image.Image:
        """Pairs in rows of four: the picture, and what is drawn from its embedding and its neighbours'."""
        self._data = self._data or self._first()
        batch = self._data.batch(0, seed=0, size=len(self._data))
        near = batch.neighbours[:, : self._setup.defaults["trained_neighbours"]]
        autoencoder = self._setup.autoencoder
        generated = generate_preview(
            average,
            dataclasses.replace(batch, neighbours=near),
            prediction=self._setup.prediction,
            autoencoder=autoencoder,
        )
        originals = decode_targets(batch.images, autoencoder)
        pairs = zip(to_pil(originals), to_pil(generated), strict=True)
        return image_grid([image for pair in pairs for image in pair], columns=2 * self.COLUMNS)

    def _first(self) -> TrainingSet:
        rows = training_shards(self._inputs, self._treatment, self._cache)[0].load()
        first = TrainingRows(
            pictures=rows.pictures[:PREVIEWED],
            embeddings=rows.embeddings[:PREVIEWED],
            neighbours=rows.neighbours[:PREVIEWED],
        )
        return TrainingSet(first, database_rows(self._inputs.database, self._cache), device=self._treatment.device)


def train_worker(arguments: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    inputs: TrainingInputs = arguments["inputs"]
    config: TrainConfig = arguments["config"]
    cache: Path = arguments["cache"]
    folder_uri: str = arguments["folder_uri"]
    rank, world = ray_train.worker_rank()
    if not config.use_gpu:
        torch.set_num_threads(config.cpus_per_worker)
    setup = build_setup(config, encoder_of(inputs.embeddings.manifest()))
    treatment = image_processing(config, setup)
    data = load_training_set(inputs, treatment, cache, window_bytes=config.window_bytes, rank=rank, world=world)
    total = config.training.steps * config.training.batch_size
    with storage.scratch() as scratch, preemption.deferred_sigterm():
        preview = _Preview(inputs, setup, treatment, cache)
        metrics = _Metrics(folder_uri, total, arguments["run"], preview)
        average = loop.train(
            setup.network,
            objective_of(config, setup),
            data,
            config.training,
            checkpoints=_Checkpoints(folder_uri, scratch, cache, metrics, world),
            metrics=metrics,
            device=treatment.device,
            rank=rank,
            world=world,
            stop=preemption.stop_requested,
        )
        if rank == 0:
            info = {"images_seen": total, **metrics.last, "parameters": sum(p.numel() for p in average.parameters())}
            save_pipeline(average, setup, encoder_of(inputs.embeddings.manifest()), scratch / "out" / PIPELINE)
            artifacts.commit_shard(folder_uri, PIPELINE, scratch / "out", rows=len(data), info=info)


def save_pipeline(average: nn.Module, setup: TrainingSetup, encoder: EncoderIdentity, folder: Path) -> None:
    """Save the pipeline around the trained network."""
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
    """Return how this worker prepares images: at which size, on which device, with which autoencoder."""
    # By its number: a thread that reads ahead does not know which GPU is this worker's.
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


def _located(config: TrainConfig) -> TrainConfig:
    """The config with its folders named in full: a worker stands elsewhere."""
    start = None if config.start_from is None else str(pretrained_folder(config.start_from).absolute())
    autoencoder = None if config.autoencoder is None else str(Path(config.autoencoder).absolute())
    return dataclasses.replace(config, start_from=start, autoencoder=autoencoder)


def key_settings(config: TrainConfig) -> dict[str, Any]:
    """What decides the weights, but for rounding: a run may go on with more workers or pieces, or elsewhere."""
    settings = config_to_dict(config, without=("workers", "cpus_per_worker", "use_gpu", "start_from", "autoencoder"))
    for name in ("pieces", "compile", "bfloat16_copy", "sharding", "log_images", "checkpoint_images", "grid_images"):
        settings["training"].pop(name)
    return settings


def _note(manifest: artifacts.Manifest) -> str:
    info = manifest.info
    measured = f", {info['images_per_s']:.0f}/s, loss {info['loss']:.4f}" if "loss" in info else ""
    return f"{info['images_seen']} images seen{measured}"
