"""What adding rows costs beside what is there: the same 10,000 new rows onto 100,000 and onto 1,000,000.

``time_ratio`` is of what a rebuild does itself: looking the URL list up in what the database has seen, the manifests of
the new versions, and the index with its near-duplicates and its effort. The shards are seeded and written beforehand.

``with_embedding_ratio`` adds the seconds that the embedding stage takes for 10,000 pictures of Twemoji, once for each
size. It sees the new pictures alone, so its seconds are the same but for noise; they say how much of a rebuild the rest
is. Fetching is left out of both.
"""

import hashlib
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from embed import write_shards

from infra import artifacts, compute, shards, storage
from model.retrieval.factory import choose_index
from tasks.contracts import METADATA_SCHEMA, DatabaseVersion, EmbeddingShards, ImageShards
from tasks.download import DownloadConfig, new_rows
from tasks.embed import EmbedConfig, embed_images
from tasks.index import IndexConfig, build_database
from tasks.seen import Seen, hashes_of, write_seen
from tasks.takedown import Entries

WIDTH = 256
SHARD_ROWS = 1000
ADDED = 10_000
SIZES = (100_000, 1_000_000)
ROUNDS = 3
IDENTITY = {
    "encoder": {"name": "seeded", "weights_digest": "0" * 64, "preprocess_digest": "0" * 64, "dimension": WIDTH}
}


def clustered(rows: int, seed: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    """Unit rows (rows, WIDTH) around 1,000 seeded centres, as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((1000, WIDTH), dtype=np.float32)
    points = centres[rng.integers(1000, size=rows)] + 0.7 * rng.standard_normal((rows, WIDTH), dtype=np.float32)
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16)


class Grower:
    """A database of ``rows`` made-up pictures, and rounds of adding to it."""

    def __init__(self, folder: Path, rows: int, added: int) -> None:
        self.folder, self.cache, self.added = folder, folder / "cache", added
        self.images = self._images_stage("base", rows)
        done = [self._image_shard(self.images.uri, n, f"base{rows}") for n in range(rows // SHARD_ROWS)]
        seen = [write_seen(self.images.uri, hashes_of(self.images.uri, done, self.cache))]
        self.base_images = ImageShards.of(self.images.commit(done, info={"seen": seen}), self.images.uri)
        stage = self._embeddings_stage(self.base_images)
        filled = [self._embedding_shard(stage.uri, n, f"base{rows}", n) for n in range(rows // SHARD_ROWS)]
        self.base_rows = EmbeddingShards.of(stage.commit(filled, identity=IDENTITY, info={}), stage.uri)
        self.config = IndexConfig(index=choose_index(max(rows, 100_001), WIDTH))
        built = build_database(self.base_rows, str(folder), self.config, cache=self.cache)
        self.database: DatabaseVersion = built.reference

    def grow(self, number: int) -> dict[str, float]:
        """Add ``added`` rows to the base; seconds of each part."""
        stage, name = self._images_stage(f"delta{number}", 0), f"delta{number}-{self.database.rows}"
        first = self.database.rows // SHARD_ROWS
        numbers = range(first, first + self.added // SHARD_ROWS)
        pictures = [self._image_shard(stage.uri, n, name) for n in numbers]
        rows_uri = storage.join(str(self.folder), "rows", name)
        filled = [self._embedding_shard(rows_uri, n, name, 10_000 * (number + 1) + n) for n in numbers]
        listed = self.folder / f"{name}.parquet"
        pq.write_table(pa.table({"url": [url for n in numbers for url in urls(name, n)]}), listed)

        clock = [time.perf_counter()]
        seen = Seen.of(self.base_images, self.cache)
        asked = new_rows(shards.read_url_list(str(listed)), seen, Entries(), DownloadConfig())
        assert asked.num_rows == self.added
        clock.append(time.perf_counter())
        taken = [shard.taken_over(self.base_images.uri) for shard in self.base_images.manifest().shards]
        info = {"seen": seen.extended(stage.uri, hashes_of(stage.uri, pictures, self.cache))}
        images = ImageShards.of(stage.commit([*taken, *pictures], info=info), stage.uri)
        rows = self._embeddings_stage(images)
        before = [shard.taken_over(self.base_rows.uri) for shard in self.base_rows.manifest().shards]
        after = [shard.taken_over(rows_uri) for shard in filled]
        embeddings = EmbeddingShards.of(rows.commit([*before, *after], identity=IDENTITY, info={}), rows.uri)
        clock.append(time.perf_counter())
        grown = build_database(
            embeddings, str(self.folder), self.config, cache=self.cache, previous=self.database
        ).reference
        clock.append(time.perf_counter())
        assert grown.manifest().info["shards_taken_over"] > 0
        assert grown.rows == self.database.rows + self.added
        return dict(zip(("lookup_s", "manifests_s", "index_s"), np.diff(clock).tolist(), strict=True))

    def _images_stage(self, name: str, rows: int) -> artifacts.Stage:
        return artifacts.Stage(str(self.folder), "images", inputs={}, config={"made": name, "rows": rows})

    def _embeddings_stage(self, images: ImageShards) -> artifacts.Stage:
        return artifacts.Stage(str(self.folder), "embeddings", inputs={"images": images.as_input()}, config={})

    def _image_shard(self, uri: str, number: int, name: str) -> artifacts.Shard:
        listed = urls(name, number)
        columns = {"url": listed, "sha256": digests(listed), "error_class": ["success"] * SHARD_ROWS}
        with storage.scratch() as folder:
            pq.write_table(pa.table({"key": keys(number), **columns}), folder / f"{number:05d}.parquet")
            tarfile.open(folder / f"{number:05d}.tar", "w").close()
            return artifacts.commit_shard(uri, f"{number:05d}", folder, rows=SHARD_ROWS, info={})

    def _embedding_shard(self, uri: str, number: int, name: str, seed: int) -> artifacts.Shard:
        listed, sides = urls(name, number), pa.array(np.full(SHARD_ROWS, 64, np.int32))
        columns = [
            pa.array(range(SHARD_ROWS)), keys(number), listed, digests(listed), sides, sides, ["success"] * SHARD_ROWS,
        ]  # fmt: skip
        with storage.scratch() as folder:
            (folder / "img_emb").mkdir()
            (folder / "metadata").mkdir()
            np.save(folder / "img_emb" / f"img_emb_{number:05d}.npy", clustered(SHARD_ROWS, seed + 1))
            pq.write_table(
                pa.table(columns, schema=METADATA_SCHEMA), folder / "metadata" / f"metadata_{number:05d}.parquet"
            )
            return artifacts.commit_shard(uri, f"{number:05d}", folder, rows=SHARD_ROWS, info={})


def urls(name: str, number: int) -> list[str]:
    return [f"http://host/{name}/{number}/{row}.png" for row in range(SHARD_ROWS)]


def digests(listed: list[str]) -> list[str]:
    return [hashlib.sha256(url.encode()).hexdigest() for url in listed]


def keys(number: int) -> list[str]:
    return [f"{number:05d}{row:04d}" for row in range(SHARD_ROWS)]


def bench_delta(sizes: tuple[int, int] = SIZES, added: int = ADDED) -> dict[str, Any]:
    """Median seconds of a delta onto each size, in turn after a warm-up, and the larger's over the smaller's."""
    with tempfile.TemporaryDirectory() as name, compute.cluster():
        folder = Path(name)
        growers = [Grower(folder / str(rows), rows, added) for rows in sizes]
        times: list[list[dict[str, float]]] = [[], []]
        for number in range(ROUNDS + 1):
            for grower, kept in zip(growers, times, strict=True):
                kept.append(grower.grow(number))
        stage = artifacts.Stage(str(folder), "images", inputs={}, config={"pictures": added})
        done = write_shards(Path(stage.uri), added // SHARD_ROWS, SHARD_ROWS)
        new, embeds = ImageShards.of(stage.commit(done, info={}), stage.uri), []
        for grower in growers:
            started = time.perf_counter()
            made = embed_images(new, str(grower.folder), EmbedConfig(), cache=grower.cache)
            assert made.reference.rows == added
            embeds.append(time.perf_counter() - started)
    parts = [{part: statistics.median(time[part] for time in kept[1:]) for part in kept[0]} for kept in times]
    indexed = [statistics.median(sum(time.values()) for time in kept[1:]) for kept in times]
    return {
        "added": added,
        **{
            f"onto_{rows}": {"seconds": total, **part, "index": grower.config.index, "embed_s": embed}
            for rows, total, embed, part, grower in zip(sizes, indexed, embeds, parts, growers, strict=True)
        },
        "time_ratio": indexed[1] / indexed[0],
        "with_embedding_ratio": (indexed[1] + embeds[1]) / (indexed[0] + embeds[0]),
    }
