"""Cost of adding 10,000 images with the flow rebuild-index to databases of two sizes.

Both domains are synthetic and have the files that the flows write: rows near the embeddings of Twemoji, manifests, URL
histories and a registered champion; only their tars are empty. The new images are Twemoji, rotated by another angle in
each round, from nginx on loopback. The URL list has only the new images.

``time_ratio`` is of the whole flow: download, embed, index, register. ``index_ratio`` is of the index stage, the only
one that depends on the size: there are 4 times as many inverted lists, each with 2.4 times as many rows.
nginx must be on the PATH (``apt-get install nginx-light``).
"""

import contextlib
import dataclasses
import hashlib
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from download import nginx, without_nginx
from numpy.typing import NDArray
from PIL import Image

from flows.demo.images import twemoji_folder
from infra import artifacts, compute, storage
from infra.download.downloader import DownloadPolicy
from infra.prefect_server import prefect_api
from infra.settings import Settings
from model.encoder.clip import Encoder
from tasks.download.config import DownloadConfig
from tasks.embed.task import EmbedConfig
from tasks.index.config import IndexConfig
from tasks.index.task import index
from tasks.references.domain_folder import DomainFolder
from tasks.references.types import METADATA_SCHEMA, EmbeddingShards, ImageShards, config_to_dict
from tasks.references.url_history import hashes_of, write_seen
from tasks.register import register_database

SHARD_ROWS = 1000
ADDED = 10_000
SIZES = (100_000, 1_000_000)
ROUNDS = 2
SPREAD = 0.7  # length of a row's offset from its centre; the cosine is 0.82
STAGES = ("download", "embed", "index")


def bench_delta(sizes: tuple[int, int] = SIZES, added: int = ADDED) -> dict[str, Any]:
    """Return median seconds of rebuilds of each size, alternating after a warm-up, and their ratios."""
    if missing := without_nginx("delta"):
        return missing
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        lists = [turned_images(folder / "www", number, added) for number in range(ROUNDS)]
        lists.insert(0, turned_images(folder / "www", ROUNDS, SHARD_ROWS))
        host = stack.enter_context(nginx(folder / "nginx", folder / "www"))
        stack.enter_context(prefect_and_cache(folder))
        stack.enter_context(compute.cluster())
        encoder = Encoder()
        centres = encoder.embed_images(
            [Image.open(path).convert("RGB") for path in sorted(twemoji_folder().glob("*.png"))]
        ).numpy()
        domains = [SyntheticDomain(folder / "data", rows, host, encoder, centres) for rows in sizes]
        times: list[list[dict[str, float]]] = [[], []]
        for number, files in enumerate(lists):
            for domain, domain_times in zip(domains, times, strict=True):
                domain_times.append(domain.rebuild_with(number, files))
                print(f"  onto {domain.rows:9,}: {domain_times[-1]}, load {os.getloadavg()[0]:.1f}", flush=True)
    medians = [{part: statistics.median(time[part] for time in each[1:]) for part in each[0]} for each in times]
    smaller, larger = medians
    return {
        "added": added,
        **{f"onto_{rows}": median for rows, median in zip(sizes, medians, strict=True)},
        "index_ratio": larger["index_s"] / smaller["index_s"],
        "time_ratio": larger["seconds"] / smaller["seconds"],
    }


class SyntheticDomain:
    """A domain of synthetic rows whose database is the champion."""

    def __init__(self, root: Path, rows: int, host: str, encoder: Encoder, centres: NDArray[np.float32]) -> None:
        """Write ``rows`` rows, and the manifests of download, embed and index."""
        self.rows, self._root, self._host, self._name = rows, root, host, f"rows-{rows}"
        self._settings = Settings(root=str(root))
        folder = DomainFolder.of(self._settings, self._name)
        self._base, cache = folder.uri, folder.cache
        policy = DownloadPolicy(allow_hosts=(host,), threads=32, retries=0)
        download = config_to_dict(DownloadConfig(shard_rows=SHARD_ROWS, policy=policy, workers=os.cpu_count() or 1))
        stage = artifacts.ArtifactBuilder(self._base, ImageShards.kind, inputs={}, config=download)
        numbers = range(rows // SHARD_ROWS)
        done = [self._image_shard(stage.uri, number) for number in numbers]
        info = {"seen": [write_seen(stage.uri, hashes_of(stage.uri, done, cache))], "outcomes": {"success": rows}}
        images = ImageShards.of(stage.commit(done, info=info), stage.uri)
        embed = {**config_to_dict(EmbedConfig()), "precision": "float32"}
        stage = artifacts.ArtifactBuilder(
            self._base, EmbeddingShards.kind, inputs={"images": images.as_input()}, config=embed
        )
        known = {"encoder": dataclasses.asdict(encoder.identity), "outcomes": {"success": SHARD_ROWS}}
        filled = [self._embedding_shard(stage.uri, shard, number, centres, known) for number, shard in enumerate(done)]
        identity = {"encoder": dataclasses.asdict(encoder.identity)}
        embeddings = EmbeddingShards.of(stage.commit(filled, identity=identity, info={}), stage.uri)
        built = index(embeddings, folder, IndexConfig())
        register_database(self._name, built.reference, self._settings)

    def rebuild_with(self, number: int, files: list[str]) -> dict[str, float]:
        """Rebuild with ``files``, and return the seconds of the flow and of its stages."""
        from flows.rebuild_config import RebuildIndexConfig  # Prefect reads its settings when imported
        from flows.rebuild_index import rebuild_index

        listed = self._root / f"{self._name}-{number}.parquet"
        pq.write_table(pa.table({"url": [f"http://{self._host}/{file}" for file in files]}), listed)
        started = time.perf_counter()
        rebuilt = rebuild_index(RebuildIndexConfig(domain=self._name, urls=str(listed), root=str(self._root)))
        seconds = time.perf_counter() - started
        after = rebuilt.after.database.manifest()
        new = after.rows - rebuilt.before.database.rows
        # A few images are the same after a rotation, and the download skips copies.
        assert 0.95 * len(files) < new <= len(files), f"{new} of {len(files)} were added"
        assert after.info["shards_taken_over"] > 0, "no shard was reused"
        return {"seconds": seconds, **{f"{name}_s": rebuilt.seconds[name] for name in STAGES}}

    def _image_shard(self, uri: str, number: int) -> artifacts.Shard:
        urls, name = self._urls(number), f"{number:05d}"
        columns = {"url": urls, "sha256": digests(urls), "error_class": ["success"] * SHARD_ROWS}
        with storage.scratch() as folder:
            pq.write_table(pa.table({"key": keys(number), **columns}), folder / f"{name}.parquet")
            tarfile.open(folder / f"{name}.tar", "w").close()
            info = {"outcomes": {"success": SHARD_ROWS}}
            return artifacts.commit_shard(uri, name, folder, rows=SHARD_ROWS, info=info)

    def _embedding_shard(
        self, uri: str, images: artifacts.Shard, number: int, centres: NDArray[np.float32], known: dict[str, Any]
    ) -> artifacts.Shard:
        urls, sides = self._urls(number), pa.array(np.full(SHARD_ROWS, 64, np.int32))
        positions, fine = pa.array(range(SHARD_ROWS)), ["success"] * SHARD_ROWS
        table = pa.table([positions, keys(number), urls, digests(urls), sides, sides, fine], schema=METADATA_SCHEMA)
        with storage.scratch() as folder:
            (folder / "img_emb").mkdir()
            (folder / "metadata").mkdir()
            np.save(folder / "img_emb" / f"img_emb_{images.name}.npy", around(centres, seed=number))
            pq.write_table(table, folder / "metadata" / f"metadata_{images.name}.parquet")
            info = {**known, "source": images.file(".tar").sha256}
            return artifacts.commit_shard(uri, images.name, folder, rows=SHARD_ROWS, info=info)

    def _urls(self, number: int) -> list[str]:
        return [f"http://host/{self._name}/{number}/{row}.png" for row in range(SHARD_ROWS)]


@contextmanager
def prefect_and_cache(folder: Path) -> Iterator[None]:
    """Provide a Prefect API and an own cache in the block."""
    before = os.environ.get("KNN_DIFFUSION_CACHE")
    os.environ["KNN_DIFFUSION_CACHE"] = str(folder / "cache")
    try:
        with prefect_api(folder / "prefect"):
            from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

            settings = (PREFECT_API_URL, PREFECT_API_AUTH_STRING)
            with temporary_settings({setting: os.environ[setting.name] for setting in settings}):
                yield
    finally:
        os.environ.pop("KNN_DIFFUSION_CACHE")
        if before is not None:
            os.environ["KNN_DIFFUSION_CACHE"] = before


def turned_images(folder: Path, number: int, count: int) -> list[str]:
    """Write ``count`` distinct images below ``folder``, and return their names."""
    files = sorted(twemoji_folder().glob("*.png"))
    (folder / str(number)).mkdir(parents=True)
    names = [f"{number}/{place}.png" for place in range(count)]
    sources = [files[place % len(files)] for place in range(count)]
    angles = [5.0 + 7.0 * number + 2.0 * (place // len(files)) for place in range(count)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_turn, sources, [folder / name for name in names], angles, chunksize=100))
    return names


def around(centres: NDArray[np.float32], seed: int) -> NDArray[np.float16]:
    """Return unit rows (SHARD_ROWS, D), each near one of ``centres``."""
    rng = np.random.default_rng(seed)
    width = centres.shape[1]
    off = rng.standard_normal((SHARD_ROWS, width), dtype=np.float32) * (SPREAD / np.sqrt(width))
    points = centres[rng.integers(len(centres), size=SHARD_ROWS)] + off
    unit: NDArray[np.float16] = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16)
    return unit


def digests(urls: list[str]) -> list[str]:
    return [hashlib.sha256(url.encode()).hexdigest() for url in urls]


def keys(number: int) -> list[str]:
    return [f"{number:05d}{row:04d}" for row in range(SHARD_ROWS)]


def _turn(source: Path, output: Path, angle: float) -> None:
    with Image.open(source) as image:
        image.convert("RGBA").rotate(angle, resample=Image.Resampling.BICUBIC).save(output)
