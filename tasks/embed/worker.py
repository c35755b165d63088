"""Embed one shard of images on a worker: read, decode, compute and write, overlapped where possible.

A pool decodes images ahead of the encoder: threads of the worker on the CPU, separate processes for a GPU. A worker
processes two shards at a time. While one is computed, the files of the other are fetched and its first batches are
decoded. When the first has been computed, the second gets the device, and the rows of the first are written at the same
time.
"""

import dataclasses
import io
import itertools
import multiprocessing
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing  # tensors come back from a decoder through shared memory
from PIL import Image

from infra import artifacts, storage
from infra.download.images import to_rgb
from infra.formats import tables, webdataset
from infra.isolation import DiedError, Isolated, follow_parent
from model.encoder.clip import Encoder, Preprocessing
from model.encoder.identity import EncoderIdentity
from model.encoder.streaming import embed_stream
from tasks.embed.shared import DECODER_DIED, SECONDS, WorkerConfig
from tasks.references.rows import PART, finite_rows
from tasks.references.types import METADATA_SCHEMA

Row = np.ndarray[Any, np.dtype[np.float16]]
ImageIdentity = tuple[str, str, int, int]
"""Key, sha256 of the downloaded bytes, stored width and height in px. Records with equal values are the same image."""
Fit = Callable[[Preprocessing, bytes], np.ndarray[Any, np.dtype[np.uint8]]]
"""Decodes an image and resizes it to the encoder's input, (H, W, 3) uint8. May raise any exception on damaged data."""
Timings = dict[str, float]
"""Seconds by name; the names are ``SECONDS``."""
Work = tuple[str, tuple[artifacts.Shard, artifacts.Shard | None, artifacts.Shard | None]]
"""Shard name, image shard, its embeddings in an earlier version, and a partial shard that lists the images to embed."""

_METADATA_COLUMNS = ("url", "sha256", "width", "height")
_CHUNKS_AHEAD = 2


def fitted(preprocessing: Preprocessing, encoded: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode an image and resize it to the encoder's input, (H, W, 3) uint8."""
    with Image.open(io.BytesIO(encoded)) as image:
        return preprocessing.resize(to_rgb(image))


class EmbedShard:
    """Worker that embeds shards. Two threads may call it at the same time, each with its own shard."""

    def __init__(self, images_uri: str, folder_uri: str, config: WorkerConfig, cache: Path, fit: Fit = fitted) -> None:
        """Load the encoder and start the decoders.

        Args:
            images_uri: Folder of the image shards.
            folder_uri: Folder of the embedding shards.
            config: Encoder, batch size, device and decoders.
            cache: Folder for copies of remote files.
            fit: Function that decodes an image. Default: :func:`fitted`.

        Raises:
            ModelError: The encoder is unknown.
        """
        self._images_uri, self._folder_uri, self._cache = images_uri, folder_uri, cache
        self._config, self._fit = config, fit
        device, dtype = ("cuda", torch.bfloat16) if config.cuda else ("cpu", torch.float32)
        self._encoder = Encoder(config.encoder, device=device, dtype=dtype)
        self._decoders = _decoder_pool(config)
        self._replacing = threading.Lock()
        self._turn = threading.Lock()
        self._turn_began = time.monotonic()

    def __call__(self, item: Work) -> artifacts.Shard:
        """Embed one shard and commit it. Raises ``IntegrityError`` for a damaged tar, and storage errors."""
        decoders = self._decoders
        try:
            return self._embed(item, decoders, self._fit)
        except BrokenExecutor:  # a decoder was killed, perhaps for its memory use, which breaks the whole pool
            with self._replacing:
                if self._decoders is decoders:
                    self._decoders = _decoder_pool(self._config)
        try:
            return self._embed(item, self._decoders, self._fit)
        except BrokenExecutor:
            return self.isolated(item)

    def isolated(self, item: Work) -> artifacts.Shard:
        """Embed a shard that has killed workers or decoders: decode its images one by one in a child process.

        An image that kills the child is skipped with the outcome ``decoder_died``. The other rows are unaffected.
        """
        with Isolated(partial(_isolated_decoder, self._fit)) as fit, ThreadPoolExecutor(1) as decoder:
            return self._embed(item, decoder, fit)

    def _embed(self, item: Work, decoders: Executor, fit: Fit) -> artifacts.Shard:
        if not self._config.cuda:
            torch.set_num_threads(1)  # one worker per core: more threads would compete for the same core
        name, (source, earlier, part) = item
        timings = dict.fromkeys(SECONDS, 0.0)
        started = time.monotonic()
        tar, table = (
            artifacts.fetch_shard(self._images_uri, source, suffix, self._cache) for suffix in (".tar", ".parquet")
        )
        records = {record["key"]: record for record in tables.read_table(table).to_pylist()}
        assembler = _ShardAssembler(records, self._rows_of(earlier), self._keys_of(part))
        timings["read_s"] += time.monotonic() - started
        rows = self._embed_rows(assembler, tar, partial(_decode_ahead, decoders, fit), timings)

        started = time.monotonic()
        info: dict[str, Any] = {
            "outcomes": dict(assembler.outcomes),
            "copied": assembler.copied,
            "encoder": dataclasses.asdict(self._encoder.identity),
            "source": source.file(".tar").sha256,
            **({PART: True} if part else {}),
            **({DECODER_DIED: assembler.fatal_keys} if assembler.fatal_keys else {}),
        }
        with storage.scratch() as folder:
            (folder / "img_emb").mkdir()
            np.save(folder / "img_emb" / f"img_emb_{name}.npy", rows)
            tables.write_table(assembler.metadata, METADATA_SCHEMA, folder / "metadata" / f"metadata_{name}.parquet")
            timings["write_s"] = time.monotonic() - started  # for the marker, which cannot include its own commit
            shard = artifacts.commit_shard(self._folder_uri, name, folder, rows=len(rows), info={**info, **timings})
        timings["write_s"] = time.monotonic() - started
        return dataclasses.replace(shard, info={**info, **timings})

    def _embed_rows(self, assembler: "_ShardAssembler", tar: Path, ahead: "_DecodeAhead", timings: Timings) -> Row:
        """Return rows (n, D) in the order of the tar, and fill ``assembler`` with their metadata and outcomes."""
        size = self._config.batch_size
        new = assembler.new(_time_reads(webdataset.iter_images(tar), timings))
        chunks = iter(lambda: list(itertools.islice(new, size)), [])
        decoded = ahead(self._encoder.preprocessing, chunks, _CHUNKS_AHEAD * self._config.decoders)
        with self._turn:
            batches = assembler.batches(decoded, timings)
            rows, timings["compute_s"] = embed_stream(self._encoder, batches, batch_size=size)
            ended = time.monotonic()
            timings["turn_s"], self._turn_began = ended - self._turn_began, ended
        return assembler.rows(rows.numpy().astype(np.float16))

    def _rows_of(self, earlier: artifacts.Shard | None) -> dict[ImageIdentity, Row]:
        """Return the reusable rows of an earlier version of a shard; none if another encoder made them."""
        if earlier is None or not EncoderIdentity(**earlier.info["encoder"]).same_space(self._encoder.identity):
            return {}
        folder = str(earlier.folder)
        table = tables.read_table(artifacts.fetch_shard(folder, earlier, ".parquet", self._cache))
        rows = np.array(finite_rows(folder, earlier, self._cache))
        return {_identity_of(record): rows[record["row"]] for record in table.to_pylist() if record["sha256"]}

    def _keys_of(self, part: artifacts.Shard | None) -> set[str] | None:
        """Return the keys of the images to embed; None for all."""
        if part is None:
            return None
        table = artifacts.fetch_shard(str(part.folder), part, ".parquet", self._cache)
        return set(tables.read_table(table, ["key"])["key"].to_pylist())


class _ShardAssembler:
    """Rows, metadata and outcomes of a shard, collected while its images are read in the order of the tar."""

    def __init__(
        self, records: dict[str, dict[str, Any]], earlier: dict[ImageIdentity, Row], wanted: set[str] | None
    ) -> None:
        self._records, self._earlier, self._wanted = records, earlier, wanted
        self._order: list[tuple[str, Row | None]] = []  # key, and its row if it can be copied
        self._undecoded: dict[str, str] = {}  # key -> outcome
        self.outcomes: Counter[str] = Counter()
        self.metadata: list[dict[str, Any]] = []
        self.copied = 0

    def new(self, samples: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        """Yield the samples that must be embedded; the rows of the others are copied."""
        for key, encoded in samples:
            if self._wanted is not None and key not in self._wanted:
                continue
            row = self._earlier.get(_identity_of(self._record(key)))
            self._order.append((key, row))
            if row is None:
                yield key, encoded

    def batches(self, decoded: Iterable["_Decoded"], timings: Timings) -> Iterator[torch.Tensor]:
        """Yield batches of the images that could be decoded."""
        for batch in decoded:
            timings["decode_s"] += batch.seconds
            self._undecoded.update(batch.failed)
            if batch.images is not None:
                yield batch.images

    def rows(self, embedded: Row) -> Row:
        """Return the embedded and copied rows in the order of the tar. Count outcomes, and collect the metadata."""
        fresh, rows = iter(embedded), list[Row]()
        for key, row in self._order:
            if key in self._undecoded:
                self.outcomes[self._undecoded[key]] += 1
                continue
            self.outcomes["success"] += 1
            self.copied += row is not None
            self.metadata.append({"row": len(rows), "status": "success", **self._record(key)})
            rows.append(next(fresh) if row is None else row)
        return np.stack(rows) if rows else embedded

    @property
    def fatal_keys(self) -> list[str]:
        """Keys of the images that killed their decoder."""
        return [key for key, outcome in self._undecoded.items() if outcome == DECODER_DIED]

    def _record(self, key: str) -> dict[str, Any]:
        record = self._records.get(key, {})
        return {"key": key} | {name: record.get(name) for name in _METADATA_COLUMNS}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Decoded:
    """A batch's decoded images (n, C, H, W), the outcomes of the others by key, and the decoding time."""

    images: torch.Tensor | None
    failed: dict[str, str]
    seconds: float


def _decode(fit: Fit, preprocessing: Preprocessing, chunk: list[tuple[str, bytes]]) -> _Decoded:
    """Decode a chunk. Runs on a decoder."""
    started = time.monotonic()
    images, failed = [], {}
    for key, encoded in chunk:
        try:
            images.append(fit(preprocessing, encoded))
        except DiedError:
            failed[key] = DECODER_DIED
        except BrokenExecutor:  # no process can be started: the image is not the cause
            raise
        except Exception:  # Pillow's plugins raise any exception on damaged data
            failed[key] = "decode_error"
    batch = preprocessing.to_input(torch.from_numpy(np.stack(images))) if images else None
    return _Decoded(images=batch, failed=failed, seconds=time.monotonic() - started)


_DecodeAhead = Callable[[Preprocessing, Iterator[list[tuple[str, bytes]]], int], Iterator[_Decoded]]


def _decode_ahead(
    pool: Executor,
    fit: Fit,
    preprocessing: Preprocessing,
    chunks: Iterator[list[tuple[str, bytes]]],
    depth: int,
) -> Iterator[_Decoded]:
    """Return decoded chunks in order. Submit the first ``depth`` now, and one more for each that is consumed."""
    pending: deque[Future[_Decoded]] = deque(
        pool.submit(_decode, fit, preprocessing, chunk) for chunk in itertools.islice(chunks, depth)
    )

    def drain() -> Iterator[_Decoded]:
        while pending:
            done = pending.popleft().result()
            pending.extend(pool.submit(_decode, fit, preprocessing, chunk) for chunk in itertools.islice(chunks, 1))
            yield done

    return drain()


def _time_reads(samples: Iterator[tuple[str, bytes]], timings: Timings) -> Iterator[tuple[str, bytes]]:
    """Yield ``samples`` and add the time to read them to the timings."""
    while True:
        started = time.monotonic()
        sample = next(samples, None)
        timings["read_s"] += time.monotonic() - started
        if sample is None:
            return
        yield sample


def _decoder_pool(config: WorkerConfig) -> Executor:
    if not config.cuda:
        return ThreadPoolExecutor(config.decoders)
    # Spawn rather than fork: a fork of a process with CUDA and threads may hang.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(config.decoders, mp_context=spawn, initializer=_init_decoder)


def _init_decoder() -> None:
    """Initialise a decoder: use one torch thread, and exit when the parent worker dies, which may be killed."""
    torch.set_num_threads(1)
    follow_parent()


def _isolated_decoder(fit: Fit) -> Fit:
    """Return ``fit`` after limiting this decoder process to one torch thread."""
    torch.set_num_threads(1)
    return fit


def _identity_of(record: dict[str, Any]) -> ImageIdentity:
    return record["key"], record["sha256"], record["width"], record["height"]
