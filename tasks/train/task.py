"""Train stage: train a generator on images, embeddings and neighbours with Ray Train. Interrupted runs resume."""

import dataclasses
from pathlib import Path
from typing import Any

from infra import artifacts, tracking
from infra.compute import ray_train
from infra.errors import InputError, IntegrityError
from model.errors import ModelError
from model.saved_generator import contents_digest, pretrained_folder
from tasks.references.domain_folder import DomainFolder
from tasks.references.generator import PIPELINE
from tasks.references.types import Generator, StageResult, config_to_dict, encoder_of, require_same_encoder
from tasks.stage import run_stage, stage_task
from tasks.train.config import TrainConfig
from tasks.train.inputs import TrainingInputs

NOT_RETRYABLE = (ModelError, InputError, IntegrityError)
"""Worker errors that a retry cannot fix."""


@stage_task(name="train")
def train(
    inputs: TrainingInputs, folder: DomainFolder, config: TrainConfig, *, run: tracking.Run | None = None
) -> StageResult[Generator]:
    """Train on ``inputs`` and store the pipeline under ``<folder>/generator/<key>``.

    After an interruption the same call resumes from the last checkpoint. The number of workers may change.

    Raises:
        EncoderMismatchError: The inputs, or the generator to fine-tune, use different encoders.
        InputError: The network, its autoencoder and the image size do not fit each other.
        ModelError: The loss diverged, memory ran out, or the checkpoint belongs to another network.
        StageError: The cluster has too few resources, or a worker died too often. The last checkpoint is kept.
    """
    config, sources = _with_absolute_paths(config), inputs.as_inputs()
    for name in ("start_from", "autoencoder"):
        if (given := getattr(config, name)) is not None:
            sources[name] = {"uri": given, "digest": contents_digest(given)}
    stage = artifacts.ArtifactBuilder(folder.uri, Generator.kind, inputs=sources, config=key_settings(config))

    def make() -> artifacts.Manifest:
        from tasks.train.setup import build_setup  # imports torch and diffusers, which takes seconds
        from tasks.train.worker import train_worker

        embeddings, database = inputs.embeddings.manifest(), inputs.database.manifest()
        require_same_encoder(embeddings=embeddings, database=database, neighbours=inputs.neighbours.manifest())
        build_setup(config, encoder_of(embeddings))  # fails before workers start if the components do not fit
        if PIPELINE not in stage.committed_shards():
            ray_train.train(
                train_worker,
                {"inputs": inputs, "folder_uri": stage.uri, "config": config, "cache": folder.cache, "run": run},
                workers=config.workers,
                cpus_per_worker=config.cpus_per_worker,
                use_gpu=config.use_gpu,
                folder_uri=stage.uri,
                final=NOT_RETRYABLE,
            )
        done = stage.committed_shards()[PIPELINE]
        return stage.commit([done], identity=embeddings.identity, info=done.info | {"asked": config_to_dict(config)})

    return run_stage(stage, Generator, make, note=_note)


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return the config with absolute folders, because workers run in another working directory."""
    start = None if config.start_from is None else str(pretrained_folder(config.start_from).absolute())
    autoencoder = None if config.autoencoder is None else str(Path(config.autoencoder).absolute())
    return dataclasses.replace(config, start_from=start, autoencoder=autoencoder)


def key_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that determine the weights, up to rounding.

    Settings of workers, memory and logging are omitted, so that a run can resume with other values.
    """
    settings = config_to_dict(config, without=("workers", "cpus_per_worker", "use_gpu", "start_from", "autoencoder"))
    for name in ("pieces", "compile", "bfloat16_copy", "sharding", "log_images", "checkpoint_images", "grid_images"):
        settings["training"].pop(name)
    return settings


def _note(manifest: artifacts.Manifest) -> str:
    info = manifest.info
    measured = f", {info['images_per_s']:.0f}/s, loss {info['loss']:.4f}" if "loss" in info else ""
    return f"{info['images_seen']} images seen{measured}"
