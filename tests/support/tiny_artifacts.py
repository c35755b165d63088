"""Committed image and embedding shards of synthetic images, without download and model."""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from support.tiny_domain import COLOURS, SHAPES, drawn, encoded

from infra import artifacts, storage
from infra.formats.tables import write_table
from tasks.references.types import METADATA_SCHEMA, EmbeddingShards, ImageShards

DIMENSION = 16
IDENTITY = {
    "encoder": {"name": "made", "weights_digest": "w" * 64, "preprocess_digest": "p" * 64, "dimension": DIMENSION}
}
IMAGES = [(f"http://host/{c}-{s}.png", encoded(drawn(c, s))) for c in COLOURS for s in SHAPES]
IMAGE_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("url", "key", "status", "error_message")),
        *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
        *((name, pa.string()) for name in ("sha256", "error_class")),
    ]
)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def image_shards(base: Path | str, parts: Sequence[Sequence[tuple[str, bytes | None]]], **config: Any) -> ImageShards:
    """Commit image shards from (url, bytes) pairs; None for the bytes is a URL with status 404."""
    stage = artifacts.ArtifactBuilder(
        str(base), ImageShards.kind, inputs={}, config={"made": str(base), "shard_rows": 4, **config}
    )
    done = []
    for number, part in enumerate(parts):
        with storage.scratch() as folder:
            done.append(_image_shard(stage.uri, f"{number:05d}", part, folder))
    outcomes = {"success": sum(shard.rows for shard in done)}
    return ImageShards.of(stage.commit(done, info={"outcomes": outcomes}), stage.uri)


def _image_shard(uri: str, name: str, part: Sequence[tuple[str, bytes | None]], folder: Path) -> artifacts.Shard:
    rows, successes = [], 0
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for index, (url, data) in enumerate(part):
            key = f"{name}{index:04d}"
            row: dict[str, Any] = {"url": url, "key": key, "status": "failed_to_download", "error_class": "http_404"}
            if data is not None:
                side = {"width": 48, "height": 48, "original_width": 48, "original_height": 48}
                row |= {"status": "success", "error_class": "success", "sha256": sha(data), **side}
                for suffix, content in (("json", b"{}"), ("png", data)):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                successes += 1
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA), folder / f"{name}.parquet")
    return artifacts.commit_shard(uri, name, folder, rows=successes, info={"outcomes": {"success": successes}})


def embedding_shards(base: Path | str, images: ImageShards, seed: int = 0) -> EmbeddingShards:
    """Commit an embedding for each image, seeded by its digest, so that equal images have equal embeddings."""
    stage = artifacts.ArtifactBuilder(
        str(base), EmbeddingShards.kind, inputs={"images": images.as_input()}, config={"encoder": "made", "seed": seed}
    )
    done = []
    for shard in images.manifest().shards:
        table = _table(images, shard)
        taken = [row for row in table.to_pylist() if row["error_class"] == "success"]
        rows = np.array([embedding(row["sha256"]) for row in taken], dtype=np.float16).reshape(-1, DIMENSION)
        known = ("key", "url", "sha256", "width", "height", "status")
        metadata = [{"row": n, **{name: row[name] for name in known}} for n, row in enumerate(taken)]
        with storage.scratch() as folder:
            (folder / "img_emb").mkdir()
            np.save(folder / "img_emb" / f"img_emb_{shard.name}.npy", rows)
            write_table(metadata, METADATA_SCHEMA, folder / "metadata" / f"metadata_{shard.name}.parquet")
            info = {"outcomes": {"success": len(rows)}, **IDENTITY, "source": shard.file(".tar").sha256}
            done.append(artifacts.commit_shard(stage.uri, shard.name, folder, rows=len(rows), info=info))
    return EmbeddingShards.of(stage.commit(done, identity=IDENTITY, info={}), stage.uri)


def embedding(sha256: str) -> np.ndarray[Any, Any]:
    """Return the unit vector (DIMENSION,) of an image digest."""
    row = np.random.default_rng(int(sha256[:15], 16)).standard_normal(DIMENSION)
    return row / np.linalg.norm(row)


def urls_of(source: ImageShards | EmbeddingShards) -> list[str]:
    """Return the url of every row of the Parquet tables, in order."""
    manifest = source.manifest()
    return [url for shard in manifest.shards for url in _table(source, shard)["url"].to_pylist()]


def _table(source: ImageShards | EmbeddingShards, shard: artifacts.Shard) -> pa.Table:
    uri = storage.join(shard.folder or source.uri, shard.file(".parquet").name)
    return pq.read_table(io.BytesIO(storage.read_bytes(uri)))
