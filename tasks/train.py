"""Train: pictures, their embeddings and their neighbours to a generator, on Ray Train workers, resumable."""

import contextlib
import dataclasses
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from infra import artifacts, compute, shards, storage, tracking
from infra.errors import EncoderMismatchError, InputError
from infra.pictures import to_rgb
from model.clip import EncoderIdentity
from model.diffusion.conditioning import ConditioningConfig
from model.networks.dit import TransformerConfig, build_transformer
from model.pipeline import KNNDiffusionPipeline, new_pipeline, pretrained_folder, weights_digest
from model.training.data import TrainingSet, picture_to_array
from model.training.loop import TrainingConfig, train
from tasks.contracts import (
    DatabaseVersion,
    EmbeddingShards,
    Generator,
    ImageShards,
    Neighbours,
    Outcome,
    config_of,
    encoder_of,
    require_same_encoder,
)
from tasks.stage import skip_or_make, stage_task

PIPELINE = "pipeline"
"""The folder, below a generator's, that ``KNNDiffusionPipeline.from_pretrained`` loads."""
CHECKPOINTS_KEPT = 2
MAX_PICTURE_BYTES = 8 << 30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The network, what it is told, how long it learns, and on how many workers."""

    transformer: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    conditioning: ConditioningConfig = dataclasses.field(default_factory=ConditioningConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    workers: int = 1
    cpus_per_worker: int = 2
    use_gpu: bool = False
    guidance_scale: float = 2.0  # the pipeline's default
    start_from: str | None = None  # a pipeline folder or "sticker-generator" to fine-tune; None: random weights

    def __post_init__(self) -> None:
        """Refuse a run without workers."""
        if self.workers < 1 or self.cpus_per_worker < 1:
            raise ValueError("workers and cpus_per_worker must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingInputs:
    """Everything a training run reads, as references."""

    images: ImageShards
    embeddings: EmbeddingShards
    database: DatabaseVersion
    neighbours: Neighbours

    def as_inputs(self) -> dict[str, dict[str, str]]:
        """How they stand in the generator's manifest."""
        return {field.name: getattr(self, field.name).as_input() for field in dataclasses.fields(self)}


def train_generator(
    inputs: TrainingInputs, base: str, config: TrainConfig, *, cache: Path, run: tracking.Run | None = None
) -> Outcome[Generator]:
    """Train on ``inputs`` and store the pipeline under ``base/generator/<key>``.

    Killed at any point, the same call goes on from the last checkpoint.

    Raises:
        EncoderMismatchError: the inputs were made by different encoders.
        InputError: the pictures do not fit in memory.
        StageError: the loss diverged or a worker died too often; the last checkpoint is kept.
    """
    sources = inputs.as_inputs()
    if config.start_from is not None:
        sources["start_from"] = {"uri": config.start_from, "digest": weights_digest(config.start_from)}
    stage = artifacts.Stage(base, Generator.kind, inputs=sources, config=_decisive(config))

    def make() -> artifacts.Manifest:
        embeddings, database = inputs.embeddings.manifest(), inputs.database.manifest()
        require_same_encoder(embeddings=embeddings, database=database, neighbours=inputs.neighbours.manifest())
        needed = embeddings.rows * config.transformer.image_size**2 * 3
        if needed > MAX_PICTURE_BYTES:
            raise InputError(
                f"{embeddings.rows} pictures of {config.transformer.image_size} px are {needed >> 30} GiB; "
                f"training holds them in memory, at most {MAX_PICTURE_BYTES >> 30} GiB: choose a smaller image_size"
            )
        if PIPELINE not in stage.done():
            compute.train(
                _loop,
                {"inputs": inputs, "folder_uri": stage.uri, "config": config, "cache": cache, "run": run},
                workers=config.workers,
                cpus_per_worker=config.cpus_per_worker,
                use_gpu=config.use_gpu,
                folder_uri=stage.uri,
            )
        done = stage.done()[PIPELINE]
        return stage.commit([done], identity=embeddings.identity, info=done.info)

    return skip_or_make(stage, Generator, make, note=_note)


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
        with contextlib.suppress(FileExistsError):
            os.link(path, link)
    return folder


class _Checkpoints:
    """The loop's checkpoints in the stage's folder: a file, then its marker; the newest few are kept."""

    def __init__(self, folder_uri: str, scratch: Path, cache: Path) -> None:
        self._uri, self._scratch, self._cache = storage.join(folder_uri, "checkpoints"), scratch, cache

    def latest(self) -> Path | None:
        markers = [name for name in storage.names(storage.join(self._uri, "shards")) if name.endswith(".json")]
        if not markers:
            return None
        shard = artifacts.read_shard(self._uri, max(markers).removesuffix(".json"))
        return artifacts.fetch_file(self._uri, shard.files[0], self._cache)

    def scratch(self) -> Path:
        return self._scratch / "state.pt"

    def save(self, step: int, state: Path) -> None:
        name = f"{step:09d}"
        folder = self._scratch / name
        folder.mkdir()
        state.rename(folder / f"{name}.pt")
        artifacts.commit_shard(self._uri, name, folder, rows=0, info={"step": step})
        (folder / f"{name}.pt").unlink()
        for marker in storage.names(storage.join(self._uri, "shards"))[:-CHECKPOINTS_KEPT]:
            storage.remove(storage.join(self._uri, "shards", marker))
            storage.remove(storage.join(self._uri, f"{marker.removesuffix('.json')}.pt"))


class _Metrics:
    """The loop's numbers: to the bar of whoever watches, and to the tracking server."""

    def __init__(self, progress: compute.Progress, run: tracking.Run | None) -> None:
        self._progress, self._run = progress, run
        self.last: dict[str, float] = {}

    def log(self, *, images: int, values: dict[str, float]) -> None:
        self._progress(images, values)
        self.last = values
        if self._run is not None:
            self._run.log(step=images, values=values)


def _loop(arguments: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    inputs: TrainingInputs = arguments["inputs"]
    config: TrainConfig = arguments["config"]
    cache: Path = arguments["cache"]
    rank, world = compute.worker_rank()
    if not config.use_gpu:
        torch.set_num_threads(config.cpus_per_worker)
    encoder = encoder_of(inputs.embeddings.manifest())
    data = load_training_set(inputs, config.transformer.image_size, cache)
    network = _initial_network(config, encoder)
    with storage.scratch() as scratch:
        total = config.training.steps * config.training.batch_size
        metrics = _Metrics(compute.Progress(arguments["folder_uri"], total), arguments["run"])
        average = train(
            network,
            data,
            config.training,
            config.conditioning,
            prediction=config.transformer.prediction,
            checkpoints=_Checkpoints(arguments["folder_uri"], scratch, cache),
            metrics=metrics,
            device="cuda" if config.use_gpu else "cpu",
            rank=rank,
            world=world,
        )
        if rank == 0:
            pipeline = new_pipeline(
                average.cpu(),
                encoder,
                prediction=config.transformer.prediction,
                neighbours=config.conditioning.neighbours,
                guidance_scale=config.guidance_scale,
            )
            pipeline.save_pretrained(scratch / "out" / PIPELINE, safe_serialization=True)
            info = {"images_seen": total, **metrics.last, "parameters": sum(p.numel() for p in average.parameters())}
            folder, rows = scratch / "out", len(data)
            artifacts.commit_shard(arguments["folder_uri"], PIPELINE, folder, rows=rows, info=info)


def load_training_set(inputs: TrainingInputs, side: int, cache: Path) -> TrainingSet:
    """Pictures, embeddings and neighbours in lockstep: the key in the metadata says which picture a row is."""
    images = {shard.name: shard for shard in inputs.images.manifest().shards}
    pixels, embeddings, found = [], [], []
    lists = {shard.name: shard for shard in inputs.neighbours.manifest().shards}
    for shard in inputs.embeddings.manifest().shards:
        files = {
            Path(file.name).suffix: artifacts.fetch_file(inputs.embeddings.uri, file, cache) for file in shard.files
        }
        keys = shards.read_table(files[".parquet"], ["key"])["key"].to_pylist()
        (tar,) = (file for file in images[shard.name].files if file.name.endswith(".tar"))
        pixels.append(_read_pixels(artifacts.fetch_file(inputs.images.uri, tar, cache), keys, side))
        embeddings.append(np.load(files[".npy"]))
        path = artifacts.fetch_file(inputs.neighbours.uri, lists[shard.name].files[0], cache)
        found.append(np.load(path))
    return TrainingSet(
        np.concatenate(pixels),
        np.concatenate(embeddings),
        np.concatenate(found),
        _database_rows(inputs.database, cache),
    )


def _read_pixels(tar: Path, keys: list[str], side: int) -> NDArray[np.uint8]:
    """(len(keys), side, side, 3) uint8 in the order of ``keys``."""
    position = {key: number for number, key in enumerate(keys)}
    pixels = np.empty((len(keys), side, side, 3), dtype=np.uint8)
    for key, encoded in shards.read_pictures(tar):
        if key in position:
            with Image.open(io.BytesIO(encoded)) as image:
                pixels[position.pop(key)] = picture_to_array(to_rgb(image), side)
    if position:
        raise InputError(
            f"{tar} lacks {len(position)} pictures that were embedded, {next(iter(position))} first; embed again"
        )
    return pixels


def _database_rows(database: DatabaseVersion, cache: Path) -> NDArray[np.float16]:
    embeddings = EmbeddingShards.open(database.manifest().inputs["embeddings"]["uri"])
    files = [file for file in embeddings.manifest().files if file.name.endswith(".npy")]
    return np.concatenate([np.load(artifacts.fetch_file(embeddings.uri, file, cache)) for file in files])


def _initial_network(config: TrainConfig, encoder: EncoderIdentity) -> Any:
    """Random weights, or those of ``start_from``; refused when its encoder or its size is another."""
    dimension = encoder.dimension
    if config.start_from is None:
        return build_transformer(config.transformer, embedding_dimension=dimension, seed=config.training.seed)
    pipeline = KNNDiffusionPipeline.open(pretrained_folder(config.start_from))
    if not pipeline.identity.same_space(encoder):
        raise EncoderMismatchError(
            f"{config.start_from} was trained with {pipeline.identity}, these pictures were embedded by {encoder}; "
            "embed with its encoder, or start from random weights"
        )
    network = pipeline.transformer.float().requires_grad_(True)
    wanted = build_transformer(config.transformer, embedding_dimension=dimension, seed=0)
    fits = {name: tensor.shape for name, tensor in wanted.state_dict().items()}
    if fits != {name: tensor.shape for name, tensor in network.state_dict().items()}:
        raise InputError(
            f"{config.start_from} has another size than {config.transformer}; name the size it was trained with"
        )
    return network


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """What decides the weights: all but how often something is logged or kept."""
    settings = config_of(config, without=("cpus_per_worker",))
    for name in ("log_images", "checkpoint_images"):
        settings["training"].pop(name)
    return settings


def _note(manifest: artifacts.Manifest) -> str:
    info = manifest.info
    return f"{info['images_seen']} images seen, {info['images_per_s']:.0f}/s, loss {info['loss']:.4f}"


@stage_task(name="train")
def train_task(
    inputs: TrainingInputs, base: str, config: TrainConfig, cache: Path, run: tracking.Run | None = None
) -> Outcome[Generator]:
    """Task of :func:`train_generator`."""
    return train_generator(inputs, base, config, cache=cache, run=run)
