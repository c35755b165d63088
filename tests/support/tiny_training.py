"""Inputs of a training run, written directly: a few images in two shards, without download or search."""

import dataclasses
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from support import tiny_models

from infra import artifacts
from tasks.references.types import METADATA_SCHEMA, DatabaseVersion, EmbeddingShards, ImageShards, Neighbours
from tasks.train.inputs import TrainingInputs

SIZES = (5, 7)
COUNT = sum(SIZES)
POOL = 4
SIDE = 16


def png_image(number: int, side: int = SIDE) -> Image.Image:
    """Return a distinct gradient, with enough structure to align it."""
    ramp = np.linspace(0, 120, side)
    levels = ramp[:, None] * (1 + number % 3) / 2 + ramp[None, :] * (1 + number % 2) / 2
    channels = np.stack([levels + 5 * number, 255 - levels, np.full_like(levels, 20.0 * number)], axis=2)
    return Image.fromarray(channels.clip(0, 255).astype(np.uint8))


def nearest() -> NDArray[np.int64]:
    """Return the next POOL images of each image."""
    return (np.arange(COUNT)[:, None] + np.arange(1, POOL + 1)) % COUNT


def small_kl() -> AutoencoderKL:
    """Return a continuous autoencoder with random weights: 16 px to 8 × 8 × 4."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIDE,
    ).eval()  # fmt: skip


def stored_inputs(base: Path) -> TrainingInputs:
    """Commit image shards, embeddings, a database without index, and neighbours below ``base``."""
    images = _stage(base, "images", {}, lambda folder, name, rows: _tar(folder / f"{name}.tar", rows))
    stored = ImageShards.of(images, _uri(base, "images", images))
    sources = {"images": stored.as_input()}
    embedded = _stage(base, "embeddings", sources, _embed)
    embeddings = EmbeddingShards.of(embedded, _uri(base, "embeddings", embedded))
    sources = {"embeddings": embeddings.as_input()}
    indexed = _stage(base, "database", sources, lambda folder, name, _: (folder / f"{name}.faiss").write_bytes(b"-"))
    database = DatabaseVersion.of(indexed, _uri(base, "database", indexed))
    sources = {"embeddings": embeddings.as_input(), "database": database.as_input()}
    found = _stage(
        base, "neighbours", sources, lambda folder, name, rows: np.save(folder / f"{name}.npy", nearest()[rows])
    )
    neighbours = Neighbours.of(found, _uri(base, "neighbours", found))
    return TrainingInputs(images=stored, embeddings=embeddings, database=database, neighbours=neighbours)


def _stage(base: Path, kind: str, inputs: Any, fill: Callable[[Path, str, slice], Any]) -> artifacts.Manifest:
    stage = artifacts.ArtifactBuilder(str(base), kind, inputs=inputs, config={"k": POOL})
    done, start = [], 0
    for number, size in enumerate(SIZES):
        name, folder = f"{number:05d}", base / "made" / kind / str(number)
        folder.mkdir(parents=True)
        fill(folder, name, slice(start, start + size))
        done.append(artifacts.commit_shard(stage.uri, name, folder, rows=size, info={}))
        start += size
    return stage.commit(done, identity={"encoder": dataclasses.asdict(tiny_models.identity())}, info={})


def _uri(base: Path, kind: str, manifest: artifacts.Manifest) -> str:
    return str(base / kind / manifest.key)


def _tar(path: Path, rows: slice) -> None:
    with tarfile.open(path, "w") as archive:
        for number in reversed(range(COUNT)[rows]):  # in another order than the embeddings
            buffer = io.BytesIO()
            png_image(number).save(buffer, "PNG")
            member = tarfile.TarInfo(f"{number:09d}.png")
            member.size = buffer.tell()
            archive.addfile(member, io.BytesIO(buffer.getvalue()))


def _embed(folder: Path, name: str, rows: slice) -> None:
    (folder / "img_emb").mkdir()
    (folder / "metadata").mkdir()
    np.save(folder / "img_emb" / f"img_emb_{name}.npy", tiny_models.unit_rows(COUNT)[rows])
    known = {"url": "", "sha256": "", "width": 16, "height": 16, "status": "success"}
    listed = [{"row": row, "key": f"{number:09d}", **known} for row, number in enumerate(range(COUNT)[rows])]
    pq.write_table(pa.Table.from_pylist(listed, METADATA_SCHEMA), folder / "metadata" / f"metadata_{name}.parquet")
