"""Embedding: one shard for one shard, nothing twice that an earlier version holds, the same content either way."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.fakes import workers_of
from support.tiny_domain import COLOURS, SHAPES, drawn, encoded

import model.encoder.clip
from infra import artifacts, compute
from infra.errors import StageError
from infra.formats.tables import read_table, write_table
from model.encoder.clip import Encoder
from tasks.embed import worker
from tasks.embed.task import EmbedConfig, _feeding, _parts, _resources, _reusable, embed
from tasks.embed.worker import EmbedShard, WorkerConfig
from tasks.references.types import METADATA_SCHEMA, EmbeddingShards, ImageShards
from tasks.upkeep.rewrite_embeddings import KeepRows

SHIPPED = Path(model.encoder.clip.__file__).parent.parent / "pretrained" / "sticker-clip"
CONFIG = EmbedConfig(workers=1, batch_size=8)
IMAGES = [encoded(drawn(colour, shape)) for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with compute.cluster(cores=2):
        yield


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder()


def image_shards(base: Path, **shards: Sequence[bytes]) -> ImageShards:
    """Image shards as a download leaves them; keyword ``s00000`` names shard 00000."""
    names = {name[1:]: list(pictures) for name, pictures in shards.items()}
    content = {name: [hashlib.sha256(p).hexdigest() for p in pictures] for name, pictures in names.items()}
    stage = artifacts.ArtifactBuilder(str(base), ImageShards.kind, inputs={}, config={"content": content})
    done = [commit_images(stage.uri, name, pictures, base / "local") for name, pictures in names.items()]
    return ImageShards.of(stage.commit(done, info={}), stage.uri)


def commit_images(uri: str, name: str, pictures: Sequence[bytes], scratch: Path) -> artifacts.Shard:
    records = []
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with tarfile.open(scratch / f"{name}.tar", "w") as tar:
        for data in pictures:
            digest = hashlib.sha256(data).hexdigest()
            key = f"{name}{digest[:6]}"
            member = tarfile.TarInfo(f"{key}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            known = {"key": key, "url": f"http://x/{key}", "sha256": digest, "width": 48, "height": 48}
            records.append({"row": len(records), "status": "success", **known})
    write_table(records, METADATA_SCHEMA, scratch / f"{name}.parquet")
    return artifacts.commit_shard(uri, name, scratch, rows=len(pictures), info={})


def rows_of(embeddings: EmbeddingShards, shard: artifacts.Shard) -> np.ndarray[Any, Any]:
    rows: np.ndarray[Any, Any] = np.load(
        artifacts.fetch_shard(embeddings.uri, shard, ".npy", Path(embeddings.uri, "cache"))
    )
    return rows


def embedded(images: ImageShards, base: Path, config: EmbedConfig = CONFIG, **options: Any) -> EmbeddingShards:
    return embed(images, str(base), config, cache=base / "cache", **options).reference


def test_one_shard_for_one_shard_in_the_order_of_the_tar(cluster: None, encoder: Encoder, tmp_path: Path) -> None:
    broken = IMAGES[3][:60]
    images = image_shards(tmp_path, s00000=[*IMAGES[:3], broken, *IMAGES[4:11]], s00001=IMAGES[11:13])
    outcome = embed(images, str(tmp_path), CONFIG, cache=tmp_path / "cache")
    manifest = outcome.reference.manifest()
    assert [(shard.name, shard.rows) for shard in manifest.shards] == [("00000", 10), ("00001", 2)]
    assert manifest.info["outcomes"] == {"success": 12, "decode_error": 1}

    expected = encoder.embed_images([Image.open(io.BytesIO(p)).convert("RGB") for p in IMAGES[:3] + IMAGES[4:13]])
    rows = np.concatenate([rows_of(outcome.reference, shard) for shard in manifest.shards])
    assert rows.dtype == np.float16
    np.testing.assert_allclose(rows, expected.numpy(), atol=1e-3)
    table = read_table(Path(outcome.reference.uri) / "metadata" / "metadata_00000.parquet")
    digests = [hashlib.sha256(p).hexdigest() for p in IMAGES[:3] + IMAGES[4:11]]
    assert table["sha256"].to_pylist() == digests
    assert table["row"].to_pylist() == list(range(10))

    for shard, source in zip(manifest.shards, images.manifest().shards, strict=True):
        assert shard.info["source"] == source.file(".tar").sha256
        assert all(shard.info[name] > 0 for name in worker.SECONDS)
        assert shard.info["compute_s"] <= shard.info["turn_s"]
    for name in worker.SECONDS:
        assert manifest.info[name] == pytest.approx(sum(shard.info[name] for shard in manifest.shards))
    assert manifest.info["accelerator_busy"] == pytest.approx(manifest.info["compute_s"] / manifest.info["turn_s"])
    assert "accelerator" in outcome.note
    assert "copied" not in outcome.note


def test_what_an_earlier_version_holds_is_not_embedded_again(cluster: None, tmp_path: Path) -> None:
    first = image_shards(tmp_path, s00000=IMAGES[:9], s00001=IMAGES[9:20], s00002=IMAGES[20:24])
    # The second shard lost two pictures and won one, the third is as it was, the fourth is new.
    stayed = [*IMAGES[9:12], *IMAGES[14:20], IMAGES[30]]
    second = image_shards(tmp_path, s00000=IMAGES[:9], s00001=stayed, s00002=IMAGES[20:24], s00003=IMAGES[40:43])
    earlier = embedded(first, tmp_path)
    outcome = embed(second, str(tmp_path), CONFIG, cache=tmp_path / "cache", previous=earlier)
    manifest = outcome.reference.manifest()
    assert [shard.folder for shard in manifest.shards] == [earlier.uri, None, earlier.uri, None]
    info = manifest.info
    assert (info["shards_taken_over"], info["copied"], info["embedded"]) == (2, 9, 4)
    assert info["outcomes"] == {"success": 26}
    assert "9 rows copied, 2 of 4 shards taken over" in outcome.note

    anew = embedded(second, tmp_path / "elsewhere")
    assert anew.digest == outcome.reference.digest, "the same content"
    assert Path(anew.uri).name == Path(outcome.reference.uri).name, "and the same key"
    assert anew.manifest().info["embedded"] == 26

    third = embedded(second, tmp_path / "third", previous=outcome.reference)
    assert {shard.folder for shard in third.manifest().shards} == {earlier.uri, outcome.reference.uri}, "not a chain"
    assert third.digest == anew.digest


def test_a_image_stored_in_another_size_is_another(cluster: None, tmp_path: Path) -> None:
    """The digest is of the bytes as downloaded; a list fetched again with a smaller bound has the same."""
    embed = EmbedShard(
        "none", "none", WorkerConfig(encoder="sticker-clip", batch_size=4, cuda=False, decoders=1), tmp_path
    )
    images = image_shards(tmp_path, s00000=IMAGES[:3])
    earlier = embedded(images, tmp_path)
    (shard,) = earlier.manifest().shards
    known = embed._rows_of(shard.reused_from(earlier.uri))
    records = read_table(Path(images.uri) / "00000.parquet").to_pylist()
    assert [worker._image(record) in known for record in records] == [True] * 3
    assert not any(worker._image({**record, "width": 24}) in known for record in records)


def test_rows_of_another_making_are_not_taken(cluster: None, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(SHIPPED, folder)
    config = dataclasses.replace(CONFIG, encoder=f"local-dir:{folder}")
    images = image_shards(tmp_path, s00000=IMAGES[:5])
    earlier = embedded(images, tmp_path / "before", config)
    assert _reusable(earlier, dataclasses.replace(config, batch_size=4), {"00000"}) == {}
    assert _reusable(earlier, dataclasses.replace(config, gpus_per_worker=1), {"00000"}) == {}, "bfloat16"
    assert _reusable(earlier, config, {"00001"}) == {}
    assert set(_reusable(earlier, config, {"00000", "00001"})) == {"00000"}

    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.conv1.weight"][0, 0, 0, 0] += 0.5
    save_file(weights, folder / "open_clip_model.safetensors")
    changed = embedded(images, tmp_path / "changed", config, previous=earlier).manifest()
    assert (changed.info["shards_taken_over"], changed.info["copied"], changed.info["embedded"]) == (0, 0, 5)
    assert changed.digest != earlier.digest


def test_a_version_that_kept_no_source_has_its_rows_copied(cluster: None, tmp_path: Path) -> None:
    images = image_shards(tmp_path, s00000=IMAGES[:5])
    earlier = without_source(embedded(images, tmp_path / "before"))
    again = embedded(images, tmp_path / "after", previous=earlier).manifest()
    assert (again.info["shards_taken_over"], again.info["copied"], again.info["embedded"]) == (0, 5, 0)
    assert again.digest == earlier.digest


def without_source(embeddings: EmbeddingShards) -> EmbeddingShards:
    """As a release wrote them that did not keep it."""
    manifest = embeddings.manifest()
    bare = [
        dataclasses.replace(shard, info={name: value for name, value in shard.info.items() if name != "source"})
        for shard in manifest.shards
    ]
    path = Path(embeddings.uri) / artifacts.MANIFEST
    path.write_text(dataclasses.replace(manifest, shards=tuple(bare), checksum="").to_json())
    return EmbeddingShards.open(embeddings.uri)


def test_the_same_model_by_another_name_shares_its_rows(cluster: None, tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "clip")
    images = image_shards(tmp_path, s00000=IMAGES[:5])
    earlier = embedded(images, tmp_path)
    named = dataclasses.replace(CONFIG, encoder=f"local-dir:{tmp_path / 'clip'}")
    manifest = embedded(images, tmp_path, named, previous=earlier).manifest()
    assert manifest.info["shards_taken_over"] == 1
    assert manifest.identity["encoder"]["name"] == named.encoder


def test_what_a_subset_left_out_stays_out_whatever_embeds_it(cluster: None, tmp_path: Path) -> None:
    second_tar = [b"no picture", *IMAGES[6:10]]
    images = image_shards(tmp_path, s00000=[*IMAGES[:6], b"nor this"], s00001=second_tar)
    # A picture of the first tar is left out; then what could not be decoded is taken down, and compacted away.
    grown = image_shards(tmp_path / "grown", s00000=IMAGES[:6], s00001=second_tar, s00002=IMAGES[10:12])
    whole, kept = embedded(images, tmp_path), np.arange(6) != 1
    first, second = whole.manifest().shards
    before, after = (pictures.manifest().shards[0].file(".tar").sha256 for pictures in (images, grown))
    folders = [str(tmp_path / "embeddings" / name) for name in ("part", "compacted")]
    part = KeepRows(whole.uri, folders[0], tmp_path / "cache", part=True)((first.name, (first, kept, before)))
    compacted = KeepRows(folders[0], folders[1], tmp_path / "cache")((first.name, (part, np.ones(5, np.bool_), after)))
    stage = artifacts.ArtifactBuilder(
        str(tmp_path), EmbeddingShards.kind, inputs={"images": images.as_input()}, config={}
    )
    every = [compacted.reused_from(folders[1]), second.reused_from(whole.uri)]
    earlier = EmbeddingShards.of(stage.commit(every, identity=whole.manifest().identity, info={}), stage.uri)

    other = dataclasses.replace(CONFIG, batch_size=2)
    again = embedded(grown, tmp_path / "again", other, previous=earlier)
    manifest = again.manifest()
    assert [shard.rows for shard in manifest.shards] == [5, 4, 2]
    assert manifest.info["outcomes"] == {"success": 11, "decode_error": 1}, "what could not be decoded is tried again"
    np.testing.assert_allclose(rows_of(again, manifest.shards[0]), rows_of(whole, first)[kept], atol=1e-3)
    assert set(_parts(again, grown.manifest().shards)) == {"00000"}, "and at the next time, too"


def test_an_encoder_that_changed_between_two_shards_is_found(cluster: None, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(SHIPPED, folder)
    config = dataclasses.replace(CONFIG, encoder=f"local-dir:{folder}")
    images = image_shards(tmp_path, s00000=IMAGES[:3], s00001=IMAGES[3:5])
    whole = Path(embedded(images, tmp_path, config).uri)
    for left_out in (artifacts.MANIFEST, "shards/00001.json"):  # as after a kill
        (whole / left_out).unlink()
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["preprocess_cfg"]["mean"] = [0.9, 0.1, 0.5]
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(StageError, match=r"changed while .* was filled; delete that folder and run again"):
        embedded(images, tmp_path, config)


def test_nothing_that_can_be_decoded_is_an_error(cluster: None, tmp_path: Path) -> None:
    images = image_shards(tmp_path, s00000=[b"no picture", b"nor this"])
    with pytest.raises(StageError, match=r"no picture of .* could be decoded \(\{'decode_error': 2\}\)"):
        embedded(images, tmp_path)


def test_a_image_that_pillow_finds_no_class_of_error_for_costs_itself_alone(cluster: None, tmp_path: Path) -> None:
    start = IMAGES[0].index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", IMAGES[0], start)
    data = IMAGES[0][start + 8 : start + 8 + length // 2]
    broken = IMAGES[0][:start] + png_chunk(b"IDAT", data) + png_chunk(b"ID\0T", b"")
    with Image.open(io.BytesIO(broken)) as image, pytest.raises(SyntaxError, match="broken PNG file"):
        image.load()
    images = image_shards(tmp_path, s00000=[IMAGES[1], broken, IMAGES[2]])
    assert embedded(images, tmp_path).manifest().info["outcomes"] == {"success": 2, "decode_error": 1}


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.slow
def test_a_killed_worker_costs_the_shards_in_hand(cluster: None, tmp_path: Path) -> None:
    shards: Mapping[str, Any] = {f"s{n:05d}": IMAGES[4 * n : 4 * n + 4] * 3 for n in range(10)}
    images = image_shards(tmp_path, **shards)
    killed: list[set[str]] = []

    def kill() -> None:
        """Kill the worker as soon as it has committed a shard."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            markers = {path.stem for path in (tmp_path / "embeddings").glob("*/shards/[0-9]*.json")}
            if markers:
                time.sleep(0.05)  # until its result has come back: before, it counts as in hand
                (worker,) = workers_of(os.getpid())
                os.kill(worker, signal.SIGKILL)
                killed.append(markers)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=kill)
    thread.start()
    broken = embedded(images, tmp_path)
    thread.join()
    assert killed
    assert len(killed[0]) < 10, "it was killed in the middle"
    whole = embedded(images, tmp_path / "unbroken")
    assert broken.digest == whole.digest
    first = {path.stem: path.stat().st_mtime_ns for path in Path(broken.uri).glob("shards/*.json")}
    rewritten = {name for name in killed[0] if first[name] > min(first[other] for other in set(first) - killed[0])}
    assert not rewritten, "what was committed stays"


def test_decoders_in_processes_give_what_threads_give(encoder: Encoder) -> None:
    samples = [(str(number), data) for number, data in enumerate([*IMAGES[:7], b"no picture", *IMAGES[8:10]])]
    chunks = [samples[:4], samples[4:8], samples[8:]]
    results = []
    feeding = WorkerConfig(encoder="sticker-clip", batch_size=4, cuda=True, decoders=2)
    for pool in (ThreadPoolExecutor(1), worker._pool(feeding)):
        with pool:
            results.append(list(worker._ahead(pool, worker.fitted, encoder.preprocessing, iter(chunks), depth=2)))
    for one, other in zip(*results, strict=True):
        assert one.pictures is not None
        assert other.pictures is not None
        assert torch.equal(one.pictures, other.pictures)
        assert one.failed == other.failed
    assert [batch.failed for batch in results[0]] == [{}, {"7": "decode_error"}, {}]


def test_decoders_that_were_killed_are_replaced(tmp_path: Path) -> None:
    images = image_shards(tmp_path, s00000=IMAGES[:5])
    feeding = WorkerConfig(encoder="sticker-clip", batch_size=4, cuda=False, decoders=1)
    embed = EmbedShard(images.uri, str(tmp_path / "out"), feeding, tmp_path)
    doomed: Any = worker._pool(dataclasses.replace(feeding, cuda=True))
    doomed.submit(int).result()
    for process in list(doomed._processes.values()):
        process.kill()
        process.join()
    embed._decoders = doomed
    (source,) = images.manifest().shards
    assert embed(("00000", (source, None, None))).rows == 5
    assert embed._decoders is not doomed


def test_a_config_that_feeds_nothing_is_refused() -> None:
    for options in ({"batch_size": 0}, {"decoders": 0}, {"gpus_per_worker": -1}):
        with pytest.raises(ValueError, match=r"at least 1|give 0 for the CPU"):
            EmbedConfig(**options)


def test_a_local_encoder_is_the_same_from_every_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    whole = EmbedConfig(encoder="local-dir:clips/mine").encoder
    assert whole == f"local-dir:{tmp_path}/clips/mine"
    assert EmbedConfig(encoder=whole).encoder == whole
    assert EmbedConfig(encoder="local-dir:~/mine").encoder == "local-dir:/home/somebody/mine"
    for name in ("sticker-clip", "hf-hub:org/name", "ViT-B-32/laion2b_s34b_b79k"):
        assert EmbedConfig(encoder=name).encoder == name


@pytest.mark.parametrize(
    ("options", "asked", "decoders"),
    [
        ({}, {"actors": 16, "cpus_per_actor": 1, "gpus_per_actor": 0}, 1),
        ({"workers": 3}, {"actors": 3, "cpus_per_actor": 1, "gpus_per_actor": 0}, 1),
        ({"gpus_per_worker": 1}, {"actors": 16, "cpus_per_actor": 4, "gpus_per_actor": 1}, 3),
        ({"gpus_per_worker": 0.5}, {"actors": 16, "cpus_per_actor": 2, "gpus_per_actor": 0.5}, 1),
        ({"gpus_per_worker": 4, "decoders": 2}, {"actors": 16, "cpus_per_actor": 3, "gpus_per_actor": 4}, 2),
    ],
    ids=str,
)
def test_workers_share_the_cores_and_gpus(
    options: dict[str, Any], asked: dict[str, Any], decoders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cluster with 16 cores and 4 GPUs; no more workers are started than these hold (``infra.compute``)."""
    monkeypatch.setattr(compute, "cpus", lambda: 16)
    monkeypatch.setattr(compute, "gpus", lambda: 4.0)
    config = EmbedConfig(**options)
    assert _resources(config) == {**asked, "concurrency": 2}
    feeding = _feeding(config)
    assert (feeding.decoders, feeding.cuda) == (decoders, "gpus_per_worker" in options)
