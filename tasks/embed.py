"""Embed: image shards to CLIP embeddings in clip-retrieval's layout, one output shard for each input shard."""

import dataclasses
import io
import itertools
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from infra import artifacts, compute, shards, storage
from infra.errors import StageError
from infra.pictures import to_rgb
from model.clip import EMBEDDED, Encoder
from tasks.contracts import METADATA_SCHEMA, EmbeddingShards, ImageShards, Outcome
from tasks.stage import map_stage, skip_or_make, stage_task


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """Which encoder, and how it is fed."""

    encoder: str = EMBEDDED
    batch_size: int = 128
    workers: int | None = None  # None: one for each core of the cluster, or for each GPU
    gpus_per_worker: float = 0
    decode_threads: int = 2
    max_lost_fraction: float = 0.01

    def __post_init__(self) -> None:
        """Refuse an empty batch."""
        if self.batch_size < 1 or self.decode_threads < 1:
            raise ValueError("batch_size and decode_threads must be at least 1")


def embed_images(images: ImageShards, base: str, config: EmbedConfig, *, cache: Path) -> Outcome[EmbeddingShards]:
    """Embed every picture of ``images`` into ``base/embeddings/<key>``.

    Raises:
        ModelError: no such encoder.
        StageError: no picture could be decoded, or too many shards were lost.
    """
    # The batch size stays in the key: float16 rows may differ in the last bit between batch shapes.
    settings = {"encoder": config.encoder, "batch_size": config.batch_size}
    stage = artifacts.Stage(base, EmbeddingShards.kind, inputs={"images": images.as_input()}, config=settings)

    def make() -> artifacts.Manifest:
        items = [(shard.name, shard) for shard in images.manifest().shards]
        done, lost = map_stage(
            stage,
            items,
            _Embed,
            (images.uri, stage.uri, config, cache),
            max_lost_fraction=config.max_lost_fraction,
            actors=config.workers or compute.cpus(),
            gpus_per_actor=config.gpus_per_worker,
        )
        outcomes: Counter[str] = Counter()
        for shard in done:
            outcomes.update(shard.info["outcomes"])
        if not outcomes["success"]:
            raise StageError(f"no picture of {images.uri} could be decoded ({dict(outcomes)}); look at its tars")
        encoders = {shard.info["encoder"]["weights_digest"] for shard in done}
        if len(encoders) > 1:
            raise StageError(f"{config.encoder} changed while {stage.uri} was filled; delete that folder and run again")
        identity = {"encoder": done[0].info["encoder"]}
        return stage.commit(done, identity=identity, info={"outcomes": dict(outcomes), "lost_shards": lost})

    return skip_or_make(stage, EmbeddingShards, make, note=lambda manifest: manifest.identity["encoder"]["name"])


class _Embed:
    """The encoder on a worker: decode in threads, embed in batches, write rows in the order of the tar."""

    def __init__(self, images_uri: str, folder_uri: str, config: EmbedConfig, cache: Path) -> None:
        self._images_uri, self._folder_uri, self._config, self._cache = images_uri, folder_uri, config, cache
        device = "cuda" if config.gpus_per_worker else "cpu"
        if device == "cpu":
            torch.set_num_threads(1)  # a worker a core: threads would only get in each other's way
        self._encoder = Encoder(config.encoder, device=device)

    def __call__(self, item: tuple[str, artifacts.Shard]) -> artifacts.Shard:
        started = time.monotonic()
        name, source = item
        paths = {
            suffix: artifacts.fetch_shard(self._images_uri, source, suffix, self._cache)
            for suffix in (".tar", ".parquet")
        }
        records = {row["key"]: row for row in shards.read_table(paths[".parquet"]).to_pylist()}
        rows, metadata, outcomes = self._embed(paths[".tar"], records)
        info: dict[str, Any] = {
            "outcomes": outcomes,
            "encoder": dataclasses.asdict(self._encoder.identity),
            "seconds": time.monotonic() - started,
        }
        with storage.scratch() as folder:
            (folder / "img_emb").mkdir()
            np.save(folder / "img_emb" / f"img_emb_{name}.npy", rows)
            shards.write_table(metadata, METADATA_SCHEMA, folder / "metadata" / f"metadata_{name}.parquet")
            return artifacts.commit_shard(self._folder_uri, name, folder, rows=len(rows), info=info)

    def _embed(
        self, tar: Path, records: dict[str, dict[str, Any]]
    ) -> tuple[np.ndarray[Any, np.dtype[np.float16]], list[dict[str, Any]], dict[str, int]]:
        """(n, D) float16 rows, their metadata, and how decoding went."""
        embedded: list[torch.Tensor] = []
        metadata: list[dict[str, Any]] = []
        outcomes: Counter[str] = Counter()
        samples = shards.read_pictures(tar)
        with ThreadPoolExecutor(self._config.decode_threads) as pool:
            while chunk := list(itertools.islice(samples, self._config.batch_size)):
                batch = []
                for key, picture in pool.map(self._decode, chunk):
                    outcomes["success" if picture is not None else "decode_error"] += 1
                    if picture is None:
                        continue
                    record = records.get(key, {})
                    known = {name: record.get(name) for name in ("url", "sha256", "width", "height")}
                    metadata.append({"row": len(metadata), "key": key, "status": "success", **known})
                    batch.append(picture)
                if batch:
                    embedded.append(self._encoder.embed_preprocessed(torch.stack(batch)))
        rows = torch.cat(embedded) if embedded else torch.empty(0, self._encoder.identity.dimension)
        return rows.numpy().astype(np.float16), metadata, dict(outcomes)

    def _decode(self, sample: tuple[str, bytes]) -> tuple[str, torch.Tensor | None]:
        key, encoded = sample
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                return key, self._encoder.preprocess(to_rgb(image))
        except (OSError, ValueError, Image.DecompressionBombError):
            return key, None


@stage_task(name="embed")
def embed(images: ImageShards, base: str, config: EmbedConfig, cache: Path) -> Outcome[EmbeddingShards]:
    """Task of :func:`embed_images`."""
    return embed_images(images, base, config, cache=cache)
