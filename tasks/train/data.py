"""What training reads: each shard's pictures, embeddings and neighbours in lockstep, loaded when their turn comes.

Pictures are decoded from the tars whenever their window comes. What costs more to make than to read is kept in the
cache, memory-mapped: latents and codes, and, for editing, the decoded pictures of the database (any of them may be a
neighbour) and the aligned references.

Legend: ``n`` rows of a shard, ``M`` database rows, ``P`` neighbours searched, ``S`` side, ``C s s`` latent.
"""

import dataclasses
import io
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from numpy.typing import NDArray
from PIL import Image

from infra import artifacts
from infra.download.images import to_rgb
from infra.errors import InputError
from infra.formats import tables
from infra.formats.arrays import read_array
from infra.storage.errors import disk_full_errors
from infra.storage.locks import exclusive_folder
from model.images import image_to_array, to_model_range
from model.networks.latents import Autoencoder, encode_latents
from model.networks.vq_autoencoder import encode_codes
from model.retrieval.stored_rows import StoredRows
from model.training.alignment import align_all
from model.training.data import TrainingRows, TrainingSet
from model.training.neighbour_rows import ConcatenatedRows, RowArray
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.rows import finite_rows
from tasks.references.types import DatabaseVersion, EmbeddingShards, ImageShards, Neighbours, encoder_of

ALIGNED_AT_ONCE = 256
CANDIDATES = 4
"""Nearest neighbours of which the first that is no copy of the picture is aligned to it."""
DECODED_AT_ONCE = 256
"""Pictures that threads share; these are in memory as they are stored."""
ENCODED_AT_ONCE = 64


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageProcessing:
    """What becomes of a picture on its way to the network."""

    side: int  # px
    autoencoder: Autoencoder | None = None  # latents or codes in the pixels' place
    autoencoder_digest: str = ""
    codes: bool = False
    editing: bool = False  # aligned neighbours beside the pictures
    device: str = "cpu"
    threads: int = 1  # that decode and align

    def row_bytes(self) -> int:
        """Bytes of a picture as it is held; a latent counts as pixels, which are more."""
        return self.side**2 * 3 * (1 + self.editing)


def load_training_set(
    inputs: TrainingInputs, treatment: ImageProcessing, cache: Path, *, window_bytes: int, rank: int = 0, world: int = 1
) -> TrainingSet:
    """The training set over ``inputs``, in windows of about ``window_bytes`` over all workers, as ``rank`` needs it.

    The key in the metadata says which picture a row is.
    """
    sources = training_shards(inputs, treatment, cache)
    database = database_rows(inputs.database, cache)
    pool = inputs.neighbours.manifest().config["k"]
    row_bytes = treatment.row_bytes() + 2 * sources[0].dimension + 8 * pool
    return TrainingSet(
        sources,
        database,
        window_rows=max(1, window_bytes // row_bytes),
        device=treatment.device,
        rank=rank,
        world=world,
    )


def training_shards(inputs: TrainingInputs, treatment: ImageProcessing, cache: Path) -> list["ShardSource"]:
    """The shards of ``inputs`` as the loop takes them. Nothing is read yet but manifests."""
    embeddings = inputs.embeddings.manifest()
    pictures = {shard.name: shard for shard in inputs.images.manifest().shards}
    lists = {shard.name: shard for shard in inputs.neighbours.manifest().shards}
    store = DecodedDatabase(inputs.database, treatment, cache) if treatment.editing else None
    dimension = int(embeddings.identity["encoder"]["dimension"])
    sources = []
    for shard in embeddings.shards:
        stored = StoredShard(
            images_uri=inputs.images.uri, images=pictures[shard.name],
            embeddings_uri=inputs.embeddings.uri, embeddings=shard, cache=cache, threads=treatment.threads,
        )  # fmt: skip
        found = (inputs.neighbours.uri, lists[shard.name].files[0])
        sources.append(ShardSource(stored, found, treatment, store, shard.rows, dimension))
    return sources


def database_rows(database: DatabaseVersion, cache: Path) -> RowArray:
    """The embeddings (M, D) float16 that the neighbours point into, mapped as they are asked for."""
    embeddings = embeddings_of(database)
    manifest = embeddings.manifest()
    dimension = encoder_of(manifest).dimension
    files = [artifacts.fetch_shard(embeddings.uri, shard, ".npy", cache) for shard in manifest.shards]
    return ConcatenatedRows(
        [StoredRows(file, dimension, shard.rows) for file, shard in zip(files, manifest.shards, strict=True)]
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoredShard:
    """A shard's tar of pictures, and the embeddings made of them."""

    images_uri: str
    images: artifacts.Shard
    embeddings_uri: str
    embeddings: artifacts.Shard
    cache: Path
    threads: int = 1  # that decode

    def embedded(self) -> NDArray[np.float16]:
        """The embeddings (n, D), memory-mapped."""
        return finite_rows(self.embeddings_uri, self.embeddings, self.cache)

    def pixels(self, side: int, chosen: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        """The pictures (n, S, S, 3) in the order of the embeddings, or those of the ``chosen`` rows."""
        table = self._fetch(self.embeddings_uri, self.embeddings, ".parquet")
        keys = tables.read_table(table, ["key"])["key"]
        wanted = (keys if chosen is None else keys.take(chosen)).to_pylist()
        return read_pixels(self._fetch(self.images_uri, self.images, ".tar"), wanted, side, self.threads)

    def digest(self, *with_what: Any) -> str:
        """Names what is made of this shard's pictures and ``with_what``."""
        return artifacts.digest_of([[file.sha256 for file in (*self.images.files, *self.embeddings.files)], *with_what])

    def _fetch(self, uri: str, shard: artifacts.Shard, suffix: str) -> Path:
        return artifacts.fetch_shard(uri, shard, suffix, self.cache)


class DecodedDatabase:
    """Every picture of a database, decoded once and kept in the cache."""

    def __init__(self, database: DatabaseVersion, treatment: ImageProcessing, cache: Path) -> None:
        """Over the pictures that ``database`` was embedded from, at ``treatment.side`` px."""
        embeddings = embeddings_of(database)
        images = images_of(embeddings)
        pictures = {shard.name: shard for shard in images.manifest().shards}
        self.digest = database.digest
        self._shards = [
            StoredShard(
                images_uri=images.uri, images=pictures[shard.name],
                embeddings_uri=embeddings.uri, embeddings=shard, cache=cache, threads=treatment.threads,
            )
            for shard in embeddings.manifest().shards
        ]  # fmt: skip
        self._side, self._cache = treatment.side, cache
        self._joined: ConcatenatedRows | None = None

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The pictures (m, S, S, 3) of rows (m,) of the database. The first call decodes all that are not kept yet."""
        if self._joined is None:
            self._joined = ConcatenatedRows([self._decoded(shard) for shard in self._shards])
        return self._joined[rows]

    def _decoded(self, shard: StoredShard) -> NDArray[np.uint8]:
        return cached_array(self._cache, "pixels", shard.digest(self._side), lambda: shard.pixels(self._side))


class ShardSource:
    """One shard of the training set: ``model.training.data.Source``."""

    def __init__(
        self,
        stored: StoredShard,
        neighbours: tuple[str, artifacts.File],
        treatment: ImageProcessing,
        store: DecodedDatabase | None,
        rows: int,
        dimension: int,
    ) -> None:
        """Join a shard's pictures and embeddings with its neighbours, a file below a URI."""
        self._stored, self._neighbours, self._treatment, self._store = stored, neighbours, treatment, store
        self.rows, self.dimension = rows, dimension

    def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
        """Read and decode what is ``chosen`` (None: all). What is kept is made of the whole shard, once."""
        uri, file = self._neighbours
        count = self._stored.embeddings.rows
        neighbours = read_array(artifacts.fetch_file(uri, file, self._stored.cache), np.int64, (count, None))
        rows = slice(None) if chosen is None else chosen
        if self._treatment.autoencoder is None:
            pictures: NDArray[Any] = self._stored.pixels(self._treatment.side, chosen)
        else:
            made_with = ("codes" if self._treatment.codes else "latents", self._treatment.autoencoder_digest)
            pictures = np.array(self._kept("encoded", self._encode, *made_with)[rows])
        reference = None
        if self._store is not None:
            made_with = (self._store.digest, file.sha256)
            reference = np.array(self._kept("references", lambda: self._align(neighbours), *made_with)[rows])
        embeddings = np.array(self._stored.embedded()[rows])
        return TrainingRows(pictures=pictures, embeddings=embeddings, neighbours=neighbours[rows], reference=reference)

    def _kept(self, kind: str, make: Callable[[], NDArray[Any]], *made_with: str) -> NDArray[Any]:
        return cached_array(self._stored.cache, kind, self._stored.digest(self._treatment.side, *made_with), make)

    def _encode(self) -> NDArray[Any]:
        """The pictures as the autoencoder's latents (n, C, s, s) float16, or its codes (n, tokens) int32."""
        autoencoder, device = self._treatment.autoencoder, self._treatment.device
        assert autoencoder is not None  # noqa: S101 - load asks
        pixels = torch.from_numpy(self._stored.pixels(self._treatment.side))
        made = []
        for start in range(0, len(pixels), ENCODED_AT_ONCE):
            pictures = to_model_range(pixels[start : start + ENCODED_AT_ONCE].to(device))
            if isinstance(autoencoder, VQModel) and self._treatment.codes:
                made.append(encode_codes(autoencoder, pictures).int().cpu())
            else:
                made.append(encode_latents(autoencoder, pictures).half().cpu())
        return torch.cat(made).numpy()

    def _align(self, neighbours: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The aligned reference (n, S, S, 3) of each picture."""
        assert self._store is not None  # noqa: S101 - load asks
        pixels, parts = self._stored.pixels(self._treatment.side), []
        for start in range(0, len(pixels), ALIGNED_AT_ONCE):
            near = neighbours[start : start + ALIGNED_AT_ONCE, :CANDIDATES]
            rows, renumbered = np.unique(near, return_inverse=True)
            part = pixels[start : start + ALIGNED_AT_ONCE]
            renumbered = renumbered.reshape(near.shape).astype(np.int64)
            aligned = align_all(part, renumbered, database_pixels=self._store[rows], workers=self._treatment.threads)
            parts.append(aligned.pixels)
        return np.concatenate(parts)


def read_pixels(tar: Path, keys: Sequence[str], side: int, threads: int = 1) -> NDArray[np.uint8]:
    """(len(keys), side, side, 3) uint8 in the order of ``keys``. Raises ``InputError`` when one is not there."""
    position = {key: number for number, key in enumerate(keys)}
    pixels = np.empty((len(keys), side, side, 3), dtype=np.uint8)
    found = ((position.pop(key), encoded) for key, encoded in tables.iter_images(tar) if key in position)

    def decode(numbered: tuple[int, bytes]) -> None:
        number, encoded = numbered
        with Image.open(io.BytesIO(encoded)) as image:
            pixels[number] = image_to_array(to_rgb(image), side)

    with ThreadPoolExecutor(threads) as pool:
        for some in iter(lambda: list(itertools.islice(found, DECODED_AT_ONCE)), []):
            list(pool.map(decode, some))
    if position:
        raise InputError(
            f"{tar} lacks {len(position)} pictures that were embedded, {next(iter(position))} first; embed again"
        )
    return pixels


def cached_array(cache: Path, kind: str, digest: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """The array of that name in ``cache``, memory-mapped; what ``make`` returns is written first, whole or not at all.

    One process of a machine makes it, and the others wait for it.
    """
    path = cache / kind / f"{digest}.npy"
    if not path.exists():
        with disk_full_errors(cache), exclusive_folder(cache / "fetching" / digest, within=cache) as folder:
            if not path.exists():
                with (folder / "made").open("wb") as stream:
                    np.save(stream, make())
                path.parent.mkdir(parents=True, exist_ok=True)
                (folder / "made").replace(path)
    os.utime(path)  # its last use, for the cache's bound
    found: NDArray[Any] = np.load(path, mmap_mode="r")
    return found
