"""Training data: the images, embeddings and neighbours of each shard, loaded per shuffle window.

Images are decoded from the tars each time their window is loaded. Arrays that are more expensive to compute than to
read are cached on disk and memory-mapped: latents and codes. For editing, the aligned references are cached too, and so
are the decoded images of the database, because any of them may be a neighbour.

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
from infra.formats import tables, webdataset
from infra.formats.arrays import read_array
from infra.storage.errors import disk_full_errors
from infra.storage.locks import exclusive_folder
from model.images import image_to_array, to_model_range
from model.networks.latents import Autoencoder, encode_latents
from model.networks.vq_autoencoder import encode_codes
from model.retrieval.concatenated_rows import ConcatenatedRows
from model.retrieval.stored_rows import StoredRows
from model.training.alignment import align_all
from model.training.data import TrainingRows, TrainingSet
from model.training.neighbour_rows import RowArray
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.rows import finite_rows
from tasks.references.types import DatabaseVersion, EmbeddingShards, ImageShards, Neighbours, encoder_of

ALIGNMENT_BATCH = 256
CANDIDATES = 4
"""Nearest neighbours considered as reference; the first that is not a copy of the image is aligned to it."""
DECODING_BATCH = 256
"""Encoded images held in memory while threads decode them."""
ENCODING_BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingInputs:
    """References to all artifacts that a training run reads."""

    images: ImageShards
    embeddings: EmbeddingShards
    database: DatabaseVersion
    neighbours: Neighbours

    def as_inputs(self) -> dict[str, dict[str, str]]:
        """Return the ``inputs`` entry of the generator's manifest."""
        return {field.name: getattr(self, field.name).as_input() for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageProcessing:
    """Preparation of the images for the network.

    Attributes:
        side: Side of the images in px.
        autoencoder: Autoencoder whose latents or codes the network is trained on, or None for pixels.
        autoencoder_digest: Digest of its files; part of the names of cached arrays.
        codes: Encode to codes instead of latents.
        editing: Also load the aligned neighbour of each image.
        device: Device of the autoencoder and of the training set.
        threads: Threads for decoding and alignment.
    """

    side: int
    autoencoder: Autoencoder | None = None
    autoencoder_digest: str = ""
    codes: bool = False
    editing: bool = False
    device: str = "cpu"
    threads: int = 1

    def row_bytes(self) -> int:
        """Return the bytes of an image in memory. Latents count as pixels, which is an upper bound."""
        return self.side**2 * 3 * (1 + self.editing)


def load_training_set(
    inputs: TrainingInputs,
    processing: ImageProcessing,
    cache: Path,
    *,
    window_bytes: int,
    rank: int = 0,
    world: int = 1,
) -> TrainingSet:
    """Return the training set of worker ``rank`` of ``world`` workers.

    Rows are shuffled in windows of about ``window_bytes`` over all workers. Images are matched to embedding rows by
    the key in the metadata.
    """
    sources = training_shards(inputs, processing, cache)
    database = database_rows(inputs.database, cache)
    pool = inputs.neighbours.manifest().config["k"]
    row_bytes = processing.row_bytes() + 2 * sources[0].dimension + 8 * pool
    return TrainingSet(
        sources,
        database,
        window_rows=max(1, window_bytes // row_bytes),
        device=processing.device,
        rank=rank,
        world=world,
    )


def training_shards(inputs: TrainingInputs, processing: ImageProcessing, cache: Path) -> list["ShardSource"]:
    """Return one source per shard of ``inputs``. This reads manifests only."""
    embeddings = inputs.embeddings.manifest()
    image_shards = {shard.name: shard for shard in inputs.images.manifest().shards}
    lists = {shard.name: shard for shard in inputs.neighbours.manifest().shards}
    decoded_database = DecodedDatabase(inputs.database, processing, cache) if processing.editing else None
    dimension = int(embeddings.identity["encoder"]["dimension"])
    sources = []
    for shard in embeddings.shards:
        stored = StoredShard(
            images_uri=inputs.images.uri, images=image_shards[shard.name],
            embeddings_uri=inputs.embeddings.uri, embeddings=shard, cache=cache, threads=processing.threads,
        )  # fmt: skip
        found = (inputs.neighbours.uri, lists[shard.name].files[0])
        sources.append(ShardSource(stored, found, processing, decoded_database, shard.rows, dimension))
    return sources


def database_rows(database: DatabaseVersion, cache: Path) -> RowArray:
    """Return the database embeddings (M, D) float16 that neighbour ids refer to, memory-mapped on access."""
    embeddings = embeddings_of(database)
    manifest = embeddings.manifest()
    dimension = encoder_of(manifest).dimension
    files = [artifacts.fetch_shard(embeddings.uri, shard, ".npy", cache) for shard in manifest.shards]
    return ConcatenatedRows(
        [StoredRows(file, dimension, shard.rows) for file, shard in zip(files, manifest.shards, strict=True)]
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoredShard:
    """Tar and embeddings of one shard of images, in their folders."""

    images_uri: str
    images: artifacts.Shard
    embeddings_uri: str
    embeddings: artifacts.Shard
    cache: Path
    threads: int = 1  # for decoding

    def embedding_rows(self) -> NDArray[np.float16]:
        """Return the embeddings (n, D) float16, memory-mapped."""
        return finite_rows(self.embeddings_uri, self.embeddings, self.cache)

    def pixels(self, side: int, chosen: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        """Return the images (n, S, S, 3) uint8 in the order of the embeddings, or those of the ``chosen`` rows."""
        table = self._fetch(self.embeddings_uri, self.embeddings, ".parquet")
        keys = tables.read_table(table, ["key"])["key"]
        wanted = (keys if chosen is None else keys.take(chosen)).to_pylist()
        return read_pixels(self._fetch(self.images_uri, self.images, ".tar"), wanted, side, self.threads)

    def digest(self, *parameters: Any) -> str:
        """Return the digest of an array computed from this shard's images with ``parameters``."""
        return artifacts.digest_of(
            [[file.sha256 for file in (*self.images.files, *self.embeddings.files)], *parameters]
        )

    def _fetch(self, uri: str, shard: artifacts.Shard, suffix: str) -> Path:
        return artifacts.fetch_shard(uri, shard, suffix, self.cache)


class DecodedDatabase:
    """Images of a database, decoded once and cached on disk."""

    def __init__(self, database: DatabaseVersion, processing: ImageProcessing, cache: Path) -> None:
        """Locate the images of ``database``, which will be decoded at ``processing.side`` px."""
        embeddings = embeddings_of(database)
        images = images_of(embeddings)
        image_shards = {shard.name: shard for shard in images.manifest().shards}
        self.digest = database.digest
        self._shards = [
            StoredShard(
                images_uri=images.uri, images=image_shards[shard.name],
                embeddings_uri=embeddings.uri, embeddings=shard, cache=cache, threads=processing.threads,
            )
            for shard in embeddings.manifest().shards
        ]  # fmt: skip
        self._side, self._cache = processing.side, cache
        self._joined: ConcatenatedRows | None = None

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images (m, S, S, 3) uint8 of database ``rows`` (m,). The first call decodes all missing shards."""
        if self._joined is None:
            self._joined = ConcatenatedRows([self._decoded(shard) for shard in self._shards])
        return self._joined[rows]

    def _decoded(self, shard: StoredShard) -> NDArray[np.uint8]:
        return cached_array(self._cache, "pixels", shard.digest(self._side), lambda: shard.pixels(self._side))


class ShardSource:
    """One shard of the training set; implements ``model.training.data.Source``."""

    def __init__(
        self,
        stored: StoredShard,
        neighbours: tuple[str, artifacts.File],
        processing: ImageProcessing,
        decoded_database: DecodedDatabase | None,
        rows: int,
        dimension: int,
    ) -> None:
        """Create the source of one shard.

        Args:
            stored: Images and embeddings of the shard.
            neighbours: Folder URI and file of its neighbours.
            processing: Preparation of the images.
            decoded_database: Images of the database for editing, or None.
            rows: Number of rows, n.
            dimension: Embedding width.
        """
        self._stored, self._neighbours, self._processing, self._decoded_database = (
            stored,
            neighbours,
            processing,
            decoded_database,
        )
        self.rows, self.dimension = rows, dimension

    def load(self, chosen: NDArray[np.int64] | None = None) -> TrainingRows:
        """Read and decode the ``chosen`` rows (None: all). Cached arrays always cover the whole shard."""
        uri, file = self._neighbours
        count = self._stored.embeddings.rows
        neighbours = read_array(artifacts.fetch_file(uri, file, self._stored.cache), np.int64, (count, None))
        rows = slice(None) if chosen is None else chosen
        if self._processing.autoencoder is None:
            images: NDArray[Any] = self._stored.pixels(self._processing.side, chosen)
        else:
            parameters = ("codes" if self._processing.codes else "latents", self._processing.autoencoder_digest)
            images = np.array(self._cached("encoded", self._encode, *parameters)[rows])
        reference = None
        if self._decoded_database is not None:
            parameters = (self._decoded_database.digest, file.sha256)
            reference = np.array(self._cached("references", lambda: self._align(neighbours), *parameters)[rows])
        embeddings = np.array(self._stored.embedding_rows()[rows])
        return TrainingRows(images=images, embeddings=embeddings, neighbours=neighbours[rows], reference=reference)

    def _cached(self, kind: str, make: Callable[[], NDArray[Any]], *parameters: str) -> NDArray[Any]:
        return cached_array(self._stored.cache, kind, self._stored.digest(self._processing.side, *parameters), make)

    def _encode(self) -> NDArray[Any]:
        """Return the images as latents (n, C, s, s) float16 or codes (n, tokens) int32 of the autoencoder."""
        autoencoder, device = self._processing.autoencoder, self._processing.device
        assert autoencoder is not None  # noqa: S101 - checked by load
        pixels = torch.from_numpy(self._stored.pixels(self._processing.side))
        encoded = []
        for start in range(0, len(pixels), ENCODING_BATCH):
            batch = to_model_range(pixels[start : start + ENCODING_BATCH].to(device))
            if isinstance(autoencoder, VQModel) and self._processing.codes:
                encoded.append(encode_codes(autoencoder, batch).int().cpu())
            else:
                encoded.append(encode_latents(autoencoder, batch).half().cpu())
        return torch.cat(encoded).numpy()

    def _align(self, neighbours: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the aligned reference (n, S, S, 3) uint8 of each image."""
        assert self._decoded_database is not None  # noqa: S101 - checked by load
        pixels, parts = self._stored.pixels(self._processing.side), []
        for start in range(0, len(pixels), ALIGNMENT_BATCH):
            near = neighbours[start : start + ALIGNMENT_BATCH, :CANDIDATES]
            rows, renumbered = np.unique(near, return_inverse=True)
            part = pixels[start : start + ALIGNMENT_BATCH]
            renumbered = renumbered.reshape(near.shape).astype(np.int64)
            aligned = align_all(
                part, renumbered, database_pixels=self._decoded_database[rows], workers=self._processing.threads
            )
            parts.append(aligned.pixels)
        return np.concatenate(parts)


def read_pixels(tar: Path, keys: Sequence[str], side: int, threads: int = 1) -> NDArray[np.uint8]:
    """Return images (len(keys), side, side, 3) uint8 in the order of ``keys``.

    Raises:
        InputError: The tar lacks the image of a key.
    """
    position = {key: number for number, key in enumerate(keys)}
    pixels = np.empty((len(keys), side, side, 3), dtype=np.uint8)
    found = ((position.pop(key), encoded) for key, encoded in webdataset.iter_images(tar) if key in position)

    def decode(numbered: tuple[int, bytes]) -> None:
        number, encoded = numbered
        with Image.open(io.BytesIO(encoded)) as image:
            pixels[number] = image_to_array(to_rgb(image), side)

    with ThreadPoolExecutor(threads) as pool:
        for some in iter(lambda: list(itertools.islice(found, DECODING_BATCH)), []):
            list(pool.map(decode, some))
    if position:
        raise InputError(
            f"embedded images are missing from {tar}: {len(position)}, the first is {next(iter(position))}; embed again"
        )
    return pixels


def cached_array(cache: Path, kind: str, digest: str, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Return the cached array ``kind``/``digest``, memory-mapped. If it is missing, call ``make`` and cache the result.

    The file is written atomically. One process of a machine computes the array, and the others wait.
    """
    path = cache / kind / f"{digest}.npy"
    if not path.exists():
        with disk_full_errors(cache), exclusive_folder(cache / "fetching" / digest, within=cache) as folder:
            if not path.exists():
                with (folder / "made").open("wb") as stream:
                    np.save(stream, make())
                path.parent.mkdir(parents=True, exist_ok=True)
                (folder / "made").replace(path)
    os.utime(path)  # records the last use, for eviction from the cache
    found: NDArray[Any] = np.load(path, mmap_mode="r")
    return found
