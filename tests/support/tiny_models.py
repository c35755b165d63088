"""Small embeddings, databases, networks and pipelines."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from numpy.typing import NDArray

from model.configs import TransformerConfig, UNetConfig, VQTransformerConfig
from model.encoder.identity import EncoderIdentity
from model.networks.dit import build_transformer
from model.networks.editor import widen_input
from model.networks.unet import build_unet
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder
from model.networks.vq_transformer import build_vq_transformer
from model.pipeline import KNNDiffusionPipeline, new_pipeline
from model.retrieval.database import Database, ShardFiles
from model.retrieval.faiss_index import train_index
from model.retrieval.index_files import fill_shard
from model.retrieval.ranked_search import SearchEffort

WIDTH = 8
"""Default embedding width D."""


def unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Scale rows (…, D) to unit length."""
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def unit_rows(count: int, width: int = WIDTH, *, seed: int = 0) -> NDArray[np.float16]:
    """Return random unit rows (count, width) as float16, the type of the embedding stage."""
    return unit(np.random.default_rng(seed).normal(size=(count, width))).astype(np.float16)


def identity(width: int = WIDTH, *, name: str = "tiny-clip", weights: str = "0" * 64) -> EncoderIdentity:
    return EncoderIdentity(name=name, weights_digest=weights, preprocess_digest="1" * 64, dimension=width)


def shard_files(folder: Path, *shards: NDArray[np.float16], factory: str = "Flat") -> list[ShardFiles]:
    """Write index and rows of each shard, with one quantizer trained on all rows."""
    folder.mkdir(parents=True, exist_ok=True)
    template = folder / "quantizer.faiss"
    trained_on = np.concatenate(shards).astype(np.float32)
    faiss.write_index(train_index(factory, trained_on.shape[1], trained_on), str(template))
    files = []
    for number, rows in enumerate(shards):
        embeddings = folder / f"{number}.npy"
        shard = ShardFiles(index=folder / f"{number}.faiss", embeddings=(embeddings,), ordinal=number)
        fill_shard(template, [rows], shard.index, ordinal=number)
        np.save(embeddings, rows)
        files.append(shard)
    return files


def database(
    folder: Path,
    *shards: NDArray[np.float16],
    factory: str = "Flat",
    encoder: EncoderIdentity | None = None,
    nprobe: int = 1,
    candidates: int = 100,
    **options: Any,
) -> Database:
    files = shard_files(folder, *shards, factory=factory)
    effort = SearchEffort(nprobe=nprobe, candidates=candidates)
    identified = encoder or identity(shards[0].shape[1])
    return Database(files, encoder=identified, quantizer=folder / "quantizer.faiss", effort=effort, **options)


def size(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**{"image_size": 8, "patch_size": 4, "layers": 1, "heads": 1, "head_width": 16} | changes)


def network(width: int = WIDTH, *, seed: int = 0, **changes: Any) -> PixArtTransformer2DModel:
    """Return a network with random weights, also in the last layer, so that the output depends on every input."""
    built = build_transformer(size(**changes), embedding_dimension=width, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return built.eval()


def pipeline(plugged: Database | None, *, prediction: str = "sample", neighbours: int = 3) -> KNNDiffusionPipeline:
    """Return an untrained pipeline in the embedding space of the database."""
    encoder = plugged.encoder if plugged else identity()
    built = new_pipeline(network(encoder.dimension), encoder, prediction=prediction, neighbours=neighbours)
    if plugged:
        built.swap_database(plugged)
    return built


def stirred(network: Any) -> Any:
    """Perturb every weight of the network, including its zero-initialised head."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return network.eval()


def latent_pipeline() -> KNNDiffusionPipeline:
    """Return a pipeline over 8 × 8 latents of 16 × 16 pixels."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
        norm_num_groups=8,
    )
    return new_pipeline(network(channels=4), identity(), vae=vae.eval(), neighbours=3)


def discrete_pipeline() -> KNNDiffusionPipeline:
    """Return a pipeline over 4 × 4 codes of 16 × 16 pixels, with 12 codes and 10 timesteps."""
    coding = AutoencoderConfig(image_size=16, downscale=4, codes=12, code_width=4, channels=(32, 32, 32), layers=1)
    size = VQTransformerConfig(codes=12, tokens=16, timesteps=10, layers=1, heads=1, head_width=16)
    coder = stirred(build_vq_transformer(size, embedding_dimension=8, seed=0))
    vae = build_autoencoder(coding, seed=0).eval()
    return new_pipeline(coder, identity(), vae=vae, neighbours=3)


def unet_pipeline() -> KNNDiffusionPipeline:
    """Return a pipeline with a U-Net over 8 × 8 pixels."""
    size = UNetConfig(image_size=8, widths=(32, 32), layers=1)
    return new_pipeline(stirred(build_unet(size, embedding_dimension=WIDTH, seed=0)), identity(), neighbours=3)


def editor_pipeline() -> KNNDiffusionPipeline:
    """Return a pipeline with a transformer over 8 × 8 pixels that also takes a reference."""
    return new_pipeline(widen_input(network()), identity(), neighbours=3)
