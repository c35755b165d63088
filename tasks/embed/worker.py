"""One shard of pictures embedded on a worker: read, decode, compute, write, each beside the others where it can.

Decoding is done ahead by a pool: threads of the worker on the CPU, processes of their own where a GPU is to be fed.
A worker holds two shards. While one is computed, the other's files are fetched and its first batches decoded; it
takes its turn on the device when the first is through, whose rows are then written beside.
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
from infra.formats import tables
from infra.isolation import DiedError, Isolated, follow_parent
from model.encoder.clip import Encoder, Preprocessing
from model.encoder.identity import EncoderIdentity
from model.encoder.streaming import embed_stream
from tasks.references.rows import finite_rows
from tasks.references.types import METADATA_SCHEMA
from tasks.upkeep.rewrite_embeddings import PART

Row = np.ndarray[Any, np.dtype[np.float16]]
Picture = tuple[str, str, int, int]
"""Key, sha256 of the bytes as downloaded, width and height as stored: two with the same are one picture."""
Fit = Callable[[Preprocessing, bytes], np.ndarray[Any, np.dtype[np.uint8]]]
"""Decodes an image and fits it to the encoder's size, (H, W, 3). Raises what it likes on damaged data."""
Clock = dict[str, float]
Work = tuple[str, tuple[artifacts.Shard, artifacts.Shard | None, artifacts.Shard | None]]
"""A shard's name, its pictures, what an earlier version holds of it, and one that has those alone that are wanted."""

SECONDS = ("read_s", "decode_s", "compute_s", "write_s", "turn_s")
"""What a shard's info times. ``decode_s`` adds up over the decoders; ``turn_s`` is how long the device was this
shard's, waiting included, from the end of the turn before."""

DECODER_DIED = "decoder_died"
"""Outcome of an image that kills the process that decodes it."""

_KNOWN = ("url", "sha256", "width", "height")
_AHEAD = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """How a worker's encoder is loaded and fed."""

    encoder: str
    batch_size: int
    cuda: bool
    decoders: int


def fitted(preprocessing: Preprocessing, encoded: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode an image and fit it to the encoder's size, (H, W, 3)."""
    with Image.open(io.BytesIO(encoded)) as image:
        return preprocessing.fitted(to_rgb(image))


class EmbedShard:
    """The encoder on a worker: two threads may call it at once, each with a shard."""

    def __init__(self, images_uri: str, folder_uri: str, feeding: WorkerConfig, cache: Path, fit: Fit = fitted) -> None:
        """Load the encoder and start the decoders, which call ``fit``. Raises ``ModelError``."""
        self._images_uri, self._folder_uri, self._cache = images_uri, folder_uri, cache
        self._feeding, self._fit = feeding, fit
        device, dtype = ("cuda", torch.bfloat16) if feeding.cuda else ("cpu", torch.float32)
        self._encoder = Encoder(feeding.encoder, device=device, dtype=dtype)
        self._decoders = _pool(feeding)
        self._renewing = threading.Lock()
        self._turn = threading.Lock()
        self._turn_began = time.monotonic()

    def __call__(self, item: Work) -> artifacts.Shard:
        """Embed one shard and commit it. Raises ``IntegrityError`` for a damaged tar, and what the store raises."""
        decoders = self._decoders
        try:
            return self._made(item, decoders, self._fit)
        except BrokenExecutor:  # a decoder was killed, for its memory perhaps, and its pool with it
            with self._renewing:
                if self._decoders is decoders:
                    self._decoders = _pool(self._feeding)
        try:
            return self._made(item, self._decoders, self._fit)
        except BrokenExecutor:
            return self.isolated(item)

    def isolated(self, item: Work) -> artifacts.Shard:
        """Embed one shard of which workers or decoders died: its images are decoded one by one in a child process.

        An image of which the child dies is left out as ``decoder_died``. The other rows are as without it.
        """
        with Isolated(partial(_decoder, self._fit)) as fit, ThreadPoolExecutor(1) as decoder:
            return self._made(item, decoder, fit)

    def _made(self, item: Work, decoders: Executor, fit: Fit) -> artifacts.Shard:
        if not self._feeding.cuda:
            torch.set_num_threads(1)  # a worker a core: threads would only get in each other's way
        name, (source, earlier, part) = item
        clock = dict.fromkeys(SECONDS, 0.0)
        started = time.monotonic()
        tar, table = (
            artifacts.fetch_shard(self._images_uri, source, suffix, self._cache) for suffix in (".tar", ".parquet")
        )
        records = {record["key"]: record for record in tables.read_table(table).to_pylist()}
        filling = _ShardAssembler(records, self._rows_of(earlier), self._keys_of(part))
        clock["read_s"] += time.monotonic() - started
        rows = self._embedded(filling, tar, partial(_ahead, decoders, fit), clock)

        started = time.monotonic()
        info: dict[str, Any] = {
            "outcomes": dict(filling.outcomes),
            "copied": filling.copied,
            "encoder": dataclasses.asdict(self._encoder.identity),
            "source": source.file(".tar").sha256,
            **({PART: True} if part else {}),
            **({DECODER_DIED: filling.killers} if filling.killers else {}),
        }
        with storage.scratch() as folder:
            (folder / "img_emb").mkdir()
            np.save(folder / "img_emb" / f"img_emb_{name}.npy", rows)
            tables.write_table(filling.metadata, METADATA_SCHEMA, folder / "metadata" / f"metadata_{name}.parquet")
            clock["write_s"] = time.monotonic() - started  # all that the marker can know; the manifest gets the whole
            shard = artifacts.commit_shard(self._folder_uri, name, folder, rows=len(rows), info={**info, **clock})
        clock["write_s"] = time.monotonic() - started
        return dataclasses.replace(shard, info={**info, **clock})

    def _embedded(self, filling: "_ShardAssembler", tar: Path, ahead: "_Ahead", clock: Clock) -> Row:
        """(n, D) rows in the order of the tar; ``filling`` gets what belongs to them."""
        size = self._feeding.batch_size
        new = filling.new(_timed(tables.iter_images(tar), clock))
        chunks = iter(lambda: list(itertools.islice(new, size)), [])
        decoded = ahead(self._encoder.preprocessing, chunks, _AHEAD * self._feeding.decoders)
        with self._turn:
            rows, clock["compute_s"] = embed_stream(self._encoder, filling.batches(decoded, clock), batch_size=size)
            ended = time.monotonic()
            clock["turn_s"], self._turn_began = ended - self._turn_began, ended
        return filling.rows(rows.numpy().astype(np.float16))

    def _rows_of(self, earlier: artifacts.Shard | None) -> dict[Picture, Row]:
        """The rows of an earlier version of a shard, by what must be the same for one to hold again."""
        if earlier is None or not EncoderIdentity(**earlier.info["encoder"]).same_space(self._encoder.identity):
            return {}
        folder = str(earlier.folder)
        table = tables.read_table(artifacts.fetch_shard(folder, earlier, ".parquet", self._cache))
        rows = np.array(finite_rows(folder, earlier, self._cache))
        return {_image(record): rows[record["row"]] for record in table.to_pylist() if record["sha256"]}

    def _keys_of(self, part: artifacts.Shard | None) -> set[str] | None:
        """The keys of the pictures that are wanted; None for all."""
        if part is None:
            return None
        table = artifacts.fetch_shard(str(part.folder), part, ".parquet", self._cache)
        return set(tables.read_table(table, ["key"])["key"].to_pylist())


class _ShardAssembler:
    """What is collected of a shard while its pictures go by, in the order of the tar."""

    def __init__(
        self, records: dict[str, dict[str, Any]], earlier: dict[Picture, Row], wanted: set[str] | None
    ) -> None:
        self._records, self._earlier, self._wanted = records, earlier, wanted
        self._taken: list[tuple[str, Row | None]] = []  # key, and its row if it is known already
        self._undecoded: dict[str, str] = {}  # key -> outcome
        self.outcomes: Counter[str] = Counter()
        self.metadata: list[dict[str, Any]] = []
        self.copied = 0

    def new(self, samples: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        """The samples that must be embedded; the rows of the others are copied."""
        for key, encoded in samples:
            if self._wanted is not None and key not in self._wanted:
                continue
            row = self._earlier.get(_image(self._record(key)))
            self._taken.append((key, row))
            if row is None:
                yield key, encoded

    def batches(self, decoded: Iterable["_Decoded"], clock: Clock) -> Iterator[torch.Tensor]:
        """The pictures that could be decoded."""
        for batch in decoded:
            clock["decode_s"] += batch.seconds
            self._undecoded.update(batch.failed)
            if batch.pictures is not None:
                yield batch.pictures

    def rows(self, embedded: Row) -> Row:
        """``embedded`` and the copied rows, each in its place. Counts outcomes and writes the metadata."""
        fresh, rows = iter(embedded), list[Row]()
        for key, row in self._taken:
            if key in self._undecoded:
                self.outcomes[self._undecoded[key]] += 1
                continue
            self.outcomes["success"] += 1
            self.copied += row is not None
            self.metadata.append({"row": len(rows), "status": "success", **self._record(key)})
            rows.append(next(fresh) if row is None else row)
        return np.stack(rows) if rows else embedded

    @property
    def killers(self) -> list[str]:
        """The keys of the images that killed their decoder."""
        return [key for key, outcome in self._undecoded.items() if outcome == DECODER_DIED]

    def _record(self, key: str) -> dict[str, Any]:
        record = self._records.get(key, {})
        return {"key": key} | {name: record.get(name) for name in _KNOWN}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Decoded:
    """A batch's pictures that could be decoded, (n, C, H, W); the outcomes of the others by key; how long it took."""

    pictures: torch.Tensor | None
    failed: dict[str, str]
    seconds: float


def _decode(fit: Fit, preprocessing: Preprocessing, chunk: list[tuple[str, bytes]]) -> _Decoded:
    """Runs on a decoder."""
    started = time.monotonic()
    images, failed = [], {}
    for key, encoded in chunk:
        try:
            images.append(fit(preprocessing, encoded))
        except DiedError:
            failed[key] = DECODER_DIED
        except BrokenExecutor:  # no process can be started: nothing of the image
            raise
        except Exception:  # Pillow's plugins raise what they like on damaged data
            failed[key] = "decode_error"
    batch = preprocessing.scaled(torch.from_numpy(np.stack(images))) if images else None
    return _Decoded(pictures=batch, failed=failed, seconds=time.monotonic() - started)


_Ahead = Callable[[Preprocessing, Iterator[list[tuple[str, bytes]]], int], Iterator[_Decoded]]


def _ahead(
    pool: Executor,
    fit: Fit,
    preprocessing: Preprocessing,
    chunks: Iterator[list[tuple[str, bytes]]],
    depth: int,
) -> Iterator[_Decoded]:
    """Decoded chunks in order. The first ``depth`` are submitted now, a further one for each that is taken."""
    pending: deque[Future[_Decoded]] = deque(
        pool.submit(_decode, fit, preprocessing, chunk) for chunk in itertools.islice(chunks, depth)
    )

    def drain() -> Iterator[_Decoded]:
        while pending:
            done = pending.popleft().result()
            pending.extend(pool.submit(_decode, fit, preprocessing, chunk) for chunk in itertools.islice(chunks, 1))
            yield done

    return drain()


def _timed(samples: Iterator[tuple[str, bytes]], clock: Clock) -> Iterator[tuple[str, bytes]]:
    """``samples``, the time they take to read on the clock."""
    while True:
        started = time.monotonic()
        sample = next(samples, None)
        clock["read_s"] += time.monotonic() - started
        if sample is None:
            return
        yield sample


def _pool(feeding: WorkerConfig) -> Executor:
    if not feeding.cuda:
        return ThreadPoolExecutor(feeding.decoders)
    # Started anew rather than forked: a copy of a process that holds CUDA and threads may hang.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(feeding.decoders, mp_context=spawn, initializer=_init_decoder)


def _init_decoder() -> None:
    """One thread, and no life after the worker's, which may be killed."""
    torch.set_num_threads(1)
    follow_parent()


def _decoder(fit: Fit) -> Fit:
    """``fit``, in a process that has become a decoder."""
    torch.set_num_threads(1)
    return fit


def _image(record: dict[str, Any]) -> Picture:
    return record["key"], record["sha256"], record["width"], record["height"]
