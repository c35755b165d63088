"""Training on one Ray Train worker."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from infra import artifacts, storage
from infra.compute import preemption, ray_train
from model.configs import VQTransformerConfig
from model.encoder.identity import EncoderIdentity
from model.networks.image_tokens import takes_images
from model.pipeline import new_pipeline
from model.saved_generator import contents_digest
from model.training import loop
from tasks.references.generator import PIPELINE
from tasks.references.types import encoder_of
from tasks.train.checkpoints import Checkpoints
from tasks.train.config import TrainConfig
from tasks.train.data import load_training_set
from tasks.train.inputs import TrainingInputs
from tasks.train.metrics import Metrics, Preview
from tasks.train.setup import TrainingSetup, build_setup, objective_of
from tasks.train.shard_source import ImageProcessing


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
        preview = Preview(inputs, setup, processing, cache)
        metrics = Metrics(folder_uri, total, arguments["run"], preview)
        average = loop.train(
            setup.network,
            objective_of(config, setup),
            data,
            config.training,
            checkpoints=Checkpoints(folder_uri, scratch, cache, metrics, world),
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
    # The index is explicit because the current device is a state of each thread, which prefetch threads do not inherit.
    device = f"cuda:{torch.cuda.current_device()}" if config.use_gpu else "cpu"
    autoencoder = None if setup.autoencoder is None else setup.autoencoder.to(device)
    folder = config.autoencoder or f"{config.start_from}/vae"
    return ImageProcessing(
        side=setup.image_size,
        autoencoder=autoencoder,
        autoencoder_digest=contents_digest(folder) if autoencoder else "",
        codes=isinstance(setup.network_config, VQTransformerConfig),
        editing=config.editing,
        neighbour_images=takes_images(setup.network),
        device=device,
        threads=config.cpus_per_worker,
    )
