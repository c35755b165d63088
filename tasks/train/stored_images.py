"""Stored images of training shards and of a database, decoded from the tars.

Legend: ``n`` rows of a shard, ``D`` embedding width, ``S`` side.
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
from numpy.typing import NDArray
from PIL import Image

from infra import artifacts
from infra.download.images import to_rgb
from infra.errors import InputError
from infra.formats import tables, webdataset
from infra.storage.errors import disk_full_errors
from infra.storage.locks import exclusive_folder
from model.images import image_to_array
from model.retrieval.concatenated_rows import ConcatenatedRows
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.rows import finite_rows
from tasks.references.types import DatabaseVersion

DECODING_BATCH = 256
"""Maximum number of encoded images held in memory during decoding."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoredShard:
    """Locations of the images and embeddings of one shard."""

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

    def __init__(self, database: DatabaseVersion, cache: Path, *, side: int, threads: int = 1) -> None:
        """Locate the images of ``database``, which ``threads`` threads will decode at ``side`` px."""
        embeddings = embeddings_of(database)
        images = images_of(embeddings)
        image_shards = {shard.name: shard for shard in images.manifest().shards}
        self.digest = database.digest
        self._shards = [
            StoredShard(
                images_uri=images.uri, images=image_shards[shard.name],
                embeddings_uri=embeddings.uri, embeddings=shard, cache=cache, threads=threads,
            )
            for shard in embeddings.manifest().shards
        ]  # fmt: skip
        self._side, self._cache = side, cache
        self._joined: ConcatenatedRows | None = None

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images (m, S, S, 3) uint8 of database ``rows`` (m,). The first call decodes all missing shards."""
        return self.rows()[rows]

    def rows(self) -> ConcatenatedRows:
        """Return all images, memory-mapped. The first call decodes all missing shards."""
        if self._joined is None:
            self._joined = ConcatenatedRows([self._decoded(shard) for shard in self._shards])
        return self._joined

    def _decoded(self, shard: StoredShard) -> NDArray[np.uint8]:
        return cached_array(self._cache, "pixels", shard.digest(self._side), lambda: shard.pixels(self._side))


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
