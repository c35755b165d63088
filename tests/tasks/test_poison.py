"""An image that kills the process decoding it loses only its own row, in the download and in the embedding stage."""

import dataclasses
import hashlib
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support import poison
from support.fakes import LoopbackServer, Reply
from support.tiny_artifacts import image_shards
from support.tiny_domain import COLOURS, SHAPES, drawn, encoded

from infra import artifacts, isolation
from infra.download.downloader import DownloadPolicy, download_shard
from infra.formats.tables import read_table
from tasks.embed import worker
from tasks.embed.worker import DECODER_DIED, EmbedShard, WorkerConfig

HEALTHY = [encoded(drawn(colour, shape)) for colour in COLOURS for shape in SHAPES][:7]
POISONED = HEALTHY[3] + poison.MARK
CONFIG = WorkerConfig(encoder="sticker-clip", batch_size=4, cuda=False, decoders=1)


def images_of(base: Path, *bodies: bytes) -> tuple[str, artifacts.Shard]:
    images = image_shards(base, [[(f"http://host/{n}.png", body) for n, body in enumerate(bodies)]])
    (shard,) = images.manifest().shards
    return images.uri, shard


def rows_of(uri: str, shard: artifacts.Shard, cache: Path) -> Any:
    return np.load(artifacts.fetch_shard(uri, shard, ".npy", cache))


class Broken(ThreadPoolExecutor):
    """Decoders that have died before."""

    def submit(self, *_: Any, **__: Any) -> Any:
        raise BrokenExecutor


def test_embed_shard_after_second_decoder_death_skips_only_the_image_that_kills_its_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, source = images_of(tmp_path / "a", *HEALTHY[:3], POISONED, *HEALTHY[4:])
    out = str(tmp_path / "out")
    embed = EmbedShard(uri, out, CONFIG, tmp_path / "cache", poison.fit)
    processes = partial(worker._decoder_pool, dataclasses.replace(CONFIG, cuda=True))
    monkeypatch.setattr(worker, "_decoder_pool", lambda _: processes())
    monkeypatch.setattr(isolation, "TRIES", 1)  # each try imports the decoder in a new process
    embed._decoders = Broken()
    shard = embed((source.name, (source, None, None)))
    assert shard.info["outcomes"] == {"success": 6, DECODER_DIED: 1}
    (key,) = shard.info[DECODER_DIED]
    assert key.endswith("3")
    table = read_table(artifacts.fetch_shard(out, shard, ".parquet", tmp_path / "cache"))
    assert key not in table["key"].to_pylist()

    monkeypatch.undo()
    uri, source = images_of(tmp_path / "b", *HEALTHY[:3], HEALTHY[3][:60], *HEALTHY[4:])
    damaged = EmbedShard(uri, str(tmp_path / "other"), CONFIG, tmp_path / "cache")((source.name, (source, None, None)))
    assert damaged.info["outcomes"] == {"success": 6, "decode_error": 1}
    expected = rows_of(str(tmp_path / "other"), damaged, tmp_path / "cache")
    np.testing.assert_array_equal(rows_of(out, shard, tmp_path / "cache"), expected)


@pytest.fixture
def listed() -> Any:
    """A URL list whose fourth image kills its decoder, a policy that allows its host, and the server."""
    replies = {f"/{n}.png": Reply(body=body) for n, body in enumerate([*HEALTHY[:3], POISONED, *HEALTHY[4:]])}
    with LoopbackServer(replies) as server:
        policy = DownloadPolicy(allow_hosts=(server.host,), threads=2, retries=0)
        yield pa.table({"url": [server.url(path) for path in replies]}), policy, server


def test_download_shard_with_image_that_kills_records_decoder_died(
    listed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, policy, server = listed
    with monkeypatch.context() as patch:
        patch.setattr("infra.download.downloader.NormaliserProcess", poison.Normaliser)
        counts = download_shard(0, rows, tmp_path / "a", policy)
    assert counts.outcomes == {"decoder_died": 1, "success": 6}
    table = read_table(tmp_path / "a" / "00000.parquet")
    assert table["error_class"].to_pylist()[3] == "decoder_died"

    server.replies["/3.png"] = Reply(status=404)
    download_shard(0, rows, tmp_path / "b", policy)
    tars = [(tmp_path / folder / "00000.tar").read_bytes() for folder in "ab"]
    assert hashlib.sha256(tars[0]).digest() == hashlib.sha256(tars[1]).digest(), "the other images must be unaffected"
