"""One shard of the training set: images, embeddings and neighbours, loaded per shuffle window.

Images are decoded from the tars each time their window is loaded. Arrays that are more expensive to compute than to
read are cached on disk and memory-mapped: latents and codes. For editing, the aligned references are cached too, and so
are the decoded images of the database, because any of them may be a neighbour.

Legend: ``n`` rows of a shard, ``S`` side, ``C s s`` latent.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from numpy.typing import NDArray

from infra import artifacts
from infra.formats.arrays import read_array
from model.images import to_model_range
from model.networks.latents import Autoencoder, encode_latents
from model.networks.vq_autoencoder import encode_codes
from model.training.alignment import align_all
from model.training.data import TrainingRows
from tasks.train.stored_images import DecodedDatabase, StoredShard, cached_array

ALIGNMENT_BATCH = 256
CANDIDATES = 4
"""Nearest neighbours considered as reference; the first that is not a copy of the image is aligned to it."""
ENCODING_BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageProcessing:
    """Preparation of the images for the network.

    Attributes:
        side: Side of the images in px.
        autoencoder: Autoencoder whose latents or codes the network is trained on, or None for pixels.
        autoencoder_digest: Digest of its files; part of the names of cached arrays.
        codes: Encode to codes instead of latents.
        editing: Also load the aligned neighbour of each image.
        neighbour_images: Also load the images of the database, for a network that takes those of neighbours.
        device: Device of the autoencoder and of the training set.
        threads: Threads for decoding and alignment.
    """

    side: int
    autoencoder: Autoencoder | None = None
    autoencoder_digest: str = ""
    codes: bool = False
    editing: bool = False
    neighbour_images: bool = False
    device: str = "cpu"
    threads: int = 1

    def row_bytes(self) -> int:
        """Return the bytes of an image in memory. Latents count as pixels, which is an upper bound."""
        return self.side**2 * 3 * (1 + self.editing)


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
