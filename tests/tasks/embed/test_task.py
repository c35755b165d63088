"""Tests of the embedding stage: output per shard, reuse of earlier versions, decoders and resources."""

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import struct
import tarfile
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.fakes import WithoutRay, workers_of
from support.tiny_domain import COLOURS, SHAPES, drawn, encoded

import model.encoder.clip
from infra import artifacts, compute
from infra.errors import StageError
from infra.formats.tables import read_table, write_table
from model.encoder.clip import Encoder
from tasks.embed import worker
from tasks.embed.task import EmbedConfig, _partial_shards, _resources, _reusable, _worker_config, embed
from tasks.embed.worker import EmbedShard, WorkerConfig
from tasks.references.domain_folder import DomainFolder
from tasks.references.types import METADATA_SCHEMA, EmbeddingShards, ImageShards
from tasks.upkeep.rewrite_embeddings import KeepRows

BUNDLED_FOLDER = Path(model.encoder.clip.__file__).parent.parent / "pretrained" / "sticker-clip"
CONFIG = EmbedConfig(workers=1, batch_size=8)
pytestmark = pytest.mark.usefixtures("alone")
IMAGES = [encoded(drawn(colour, shape)) for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder()


def image_shards(base: Path, **shards: Sequence[bytes]) -> ImageShards:
    """Commit image shards as the download stage does; keyword ``s00000`` names shard 00000."""
    names = {name[1:]: list(bodies) for name, bodies in shards.items()}
    content = {name: [hashlib.sha256(body).hexdigest() for body in bodies] for name, bodies in names.items()}
    stage = artifacts.ArtifactBuilder(str(base), ImageShards.kind, inputs={}, config={"content": content})
    done = [commit_images(stage.uri, name, bodies, base / "local") for name, bodies in names.items()]
    return ImageShards.of(stage.commit(done, info={}), stage.uri)


def commit_images(uri: str, name: str, bodies: Sequence[bytes], scratch: Path) -> artifacts.Shard:
    records = []
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with tarfile.open(scratch / f"{name}.tar", "w") as tar:
        for data in bodies:
            digest = hashlib.sha256(data).hexdigest()
            key = f"{name}{digest[:6]}"
            member = tarfile.TarInfo(f"{key}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            record = {"key": key, "url": f"http://x/{key}", "sha256": digest, "width": 48, "height": 48}
            records.append({"row": len(records), "status": "success", **record})
    write_table(records, METADATA_SCHEMA, scratch / f"{name}.parquet")
    return artifacts.commit_shard(uri, name, scratch, rows=len(bodies), info={})


def rows_of(embeddings: EmbeddingShards, shard: artifacts.Shard) -> np.ndarray[Any, Any]:
    rows: np.ndarray[Any, Any] = np.load(
        artifacts.fetch_shard(embeddings.uri, shard, ".npy", Path(embeddings.uri, "cache"))
    )
    return rows


def embedded(images: ImageShards, base: Path, config: EmbedConfig = CONFIG, **options: Any) -> EmbeddingShards:
    return embed(images, DomainFolder(uri=str(base), cache=base / "cache"), config, **options).reference


def test_embed_writes_one_shard_per_shard_in_tar_order(encoder: Encoder, tmp_path: Path) -> None:
    broken = IMAGES[3][:60]
    images = image_shards(tmp_path, s00000=[*IMAGES[:3], broken, *IMAGES[4:11]], s00001=IMAGES[11:13])
    outcome = embed(images, DomainFolder(uri=str(tmp_path), cache=tmp_path / "cache"), CONFIG)
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
    assert "encoder busy for " in outcome.note
    assert "accelerator" not in outcome.note  # it ran on the CPU
    assert "copied" not in outcome.note


def test_embed_with_previous_reuses_shards_and_rows(tmp_path: Path) -> None:
    first = image_shards(tmp_path, s00000=IMAGES[:9], s00001=IMAGES[9:20], s00002=IMAGES[20:24])
    # The second shard lost two images and gained one, the third is unchanged, the fourth is new.
    changed = [*IMAGES[9:12], *IMAGES[14:20], IMAGES[30]]
    second = image_shards(tmp_path, s00000=IMAGES[:9], s00001=changed, s00002=IMAGES[20:24], s00003=IMAGES[40:43])
    earlier = embedded(first, tmp_path)
    outcome = embed(second, DomainFolder(uri=str(tmp_path), cache=tmp_path / "cache"), CONFIG, previous=earlier)
    manifest = outcome.reference.manifest()
    assert [shard.folder for shard in manifest.shards] == [earlier.uri, None, earlier.uri, None]
    info = manifest.info
    assert (info["shards_taken_over"], info["copied"], info["embedded"]) == (2, 9, 4)
    assert info["outcomes"] == {"success": 26}
    assert "9 rows copied, 2 of 4 shards reused" in outcome.note

    fresh = embedded(second, tmp_path / "elsewhere")
    assert fresh.digest == outcome.reference.digest, "the content must be the same"
    assert Path(fresh.uri).name == Path(outcome.reference.uri).name, "the key must be the same"
    assert fresh.manifest().info["embedded"] == 26

    third = embedded(second, tmp_path / "third", previous=outcome.reference)
    assert {shard.folder for shard in third.manifest().shards} == {earlier.uri, outcome.reference.uri}, (
        "no chain of folders"
    )
    assert third.digest == fresh.digest


def test_rows_of_image_stored_in_another_size_are_not_reused(tmp_path: Path) -> None:
    """The digest covers the downloaded bytes, so it is the same when a list is downloaded again with a smaller size."""
    embed = EmbedShard(
        "none", "none", WorkerConfig(encoder="sticker-clip", batch_size=4, cuda=False, decoders=1), tmp_path
    )
    images = image_shards(tmp_path, s00000=IMAGES[:3])
    earlier = embedded(images, tmp_path)
    (shard,) = earlier.manifest().shards
    reusable = embed._rows_of(shard.reused_from(earlier.uri))
    records = read_table(Path(images.uri) / "00000.parquet").to_pylist()
    assert [worker._identity_of(record) in reusable for record in records] == [True] * 3
    assert not any(worker._identity_of({**record, "width": 24}) in reusable for record in records)


def test_embed_with_other_settings_or_weights_reuses_no_rows(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(BUNDLED_FOLDER, folder)
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


def test_embed_with_previous_without_source_digest_copies_rows(tmp_path: Path) -> None:
    images = image_shards(tmp_path, s00000=IMAGES[:5])
    earlier = without_source(embedded(images, tmp_path / "before"))
    again = embedded(images, tmp_path / "after", previous=earlier).manifest()
    assert (again.info["shards_taken_over"], again.info["copied"], again.info["embedded"]) == (0, 5, 0)
    assert again.digest == earlier.digest


def without_source(embeddings: EmbeddingShards) -> EmbeddingShards:
    """Rewrite the manifest as an early release did, without the digest of the source tar."""
    manifest = embeddings.manifest()
    bare = [
        dataclasses.replace(shard, info={name: value for name, value in shard.info.items() if name != "source"})
        for shard in manifest.shards
    ]
    path = Path(embeddings.uri) / artifacts.MANIFEST
    path.write_text(dataclasses.replace(manifest, shards=tuple(bare), checksum="").to_json())
    return EmbeddingShards.open(embeddings.uri)


def test_embed_with_same_encoder_under_another_name_reuses_shards(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED_FOLDER, tmp_path / "clip")
    images = image_shards(tmp_path, s00000=IMAGES[:5])
    earlier = embedded(images, tmp_path)
    named = dataclasses.replace(CONFIG, encoder=f"local-dir:{tmp_path / 'clip'}")
    manifest = embedded(images, tmp_path, named, previous=earlier).manifest()
    assert manifest.info["shards_taken_over"] == 1
    assert manifest.identity["encoder"]["name"] == named.encoder


def test_embed_with_subset_as_previous_skips_the_omitted_images(tmp_path: Path) -> None:
    second_tar = [b"not an image", *IMAGES[6:10]]
    images = image_shards(tmp_path, s00000=[*IMAGES[:6], b"not one either"], s00001=second_tar)
    # One image of the first tar is omitted; then the one that cannot be decoded is taken down and compacted away.
    grown = image_shards(tmp_path / "grown", s00000=IMAGES[:6], s00001=second_tar, s00002=IMAGES[10:12])
    whole, kept = embedded(images, tmp_path), np.arange(6) != 1
    first, second = whole.manifest().shards
    before, after = (version.manifest().shards[0].file(".tar").sha256 for version in (images, grown))
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
    assert manifest.info["outcomes"] == {"success": 11, "decode_error": 1}, "decoding must be tried again"
    np.testing.assert_allclose(rows_of(again, manifest.shards[0]), rows_of(whole, first)[kept], atol=1e-3)
    assert set(_partial_shards(again, grown.manifest().shards)) == {"00000"}, "the mark must be inherited"


def test_embed_with_encoder_changed_between_shards_raises_stage_error(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(BUNDLED_FOLDER, folder)
    config = dataclasses.replace(CONFIG, encoder=f"local-dir:{folder}")
    images = image_shards(tmp_path, s00000=IMAGES[:3], s00001=IMAGES[3:5])
    whole = Path(embedded(images, tmp_path, config).uri)
    for left_out in (artifacts.MANIFEST, "shards/00001.json"):  # as after a kill
        (whole / left_out).unlink()
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["preprocess_cfg"]["mean"] = [0.9, 0.1, 0.5]
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(StageError, match=r"changed while .* was being written; delete that folder and run again"):
        embedded(images, tmp_path, config)


def test_embed_without_decodable_image_raises_stage_error(tmp_path: Path) -> None:
    images = image_shards(tmp_path, s00000=[b"not an image", b"not one either"])
    with pytest.raises(StageError, match=r"no image could be decoded: .* \(\{'decode_error': 2\}\)"):
        embedded(images, tmp_path)


def test_embed_of_image_that_raises_syntax_error_skips_only_that_image(tmp_path: Path) -> None:
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
@pytest.mark.on_ray
def test_embed_after_worker_was_killed_repeats_only_unfinished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards: Mapping[str, Any] = {f"s{n:05d}": IMAGES[4 * n : 4 * n + 4] * 3 for n in range(10)}
    images = image_shards(tmp_path, **shards)
    killed: list[set[str]] = []

    def kill() -> None:
        """Kill the worker as soon as it has committed a shard."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            markers = {path.stem for path in (tmp_path / "embeddings").glob("*/shards/[0-9]*.json")}
            if markers:
                time.sleep(0.05)  # wait until the driver has its result: until then the shard counts as unfinished
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
    assert len(killed[0]) < 10, "the worker must be killed halfway"
    WithoutRay().install(monkeypatch)
    whole = embedded(images, tmp_path / "unbroken")
    assert broken.digest == whole.digest
    first = {path.stem: path.stat().st_mtime_ns for path in Path(broken.uri).glob("shards/*.json")}
    rewritten = {name for name in killed[0] if first[name] > min(first[other] for other in set(first) - killed[0])}
    assert not rewritten, "committed shards must not be rewritten"

    unfinished = sorted(first)[4:]  # what a driver leaves that is killed while it embeds
    for name in ("manifest.json", *(f"shards/{shard}.json" for shard in unfinished)):
        (Path(broken.uri) / name).unlink()
    assert embedded(images, tmp_path).digest == whole.digest
    again = {path.stem: path.stat().st_mtime_ns for path in Path(broken.uri).glob("shards/*.json")}
    assert {name for name in first if again[name] != first[name]} == set(unfinished), "only unfinished shards"


def test_decoders_in_processes_and_threads_give_equal_results(encoder: Encoder) -> None:
    samples = [(str(number), data) for number, data in enumerate([*IMAGES[:7], b"not an image", *IMAGES[8:10]])]
    chunks = [samples[:4], samples[4:8], samples[8:]]
    results = []
    config = WorkerConfig(encoder="sticker-clip", batch_size=4, cuda=True, decoders=2)
    for pool in (ThreadPoolExecutor(1), worker._decoder_pool(config)):
        with pool:
            results.append(
                list(worker._decode_ahead(pool, worker.fitted, encoder.preprocessing, iter(chunks), depth=2))
            )
    for one, other in zip(*results, strict=True):
        assert one.images is not None
        assert other.images is not None
        assert torch.equal(one.images, other.images)
        assert one.failed == other.failed
    assert [batch.failed for batch in results[0]] == [{}, {"7": "decode_error"}, {}]


def test_embed_shard_with_killed_decoders_replaces_them(tmp_path: Path) -> None:
    images = image_shards(tmp_path, s00000=IMAGES[:5])
    config = WorkerConfig(encoder="sticker-clip", batch_size=4, cuda=False, decoders=1)
    embed = EmbedShard(images.uri, str(tmp_path / "out"), config, tmp_path)
    doomed = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    doomed.submit(int).result()
    for process in list(doomed._processes.values()):
        process.kill()
        process.join()
    embed._decoders = doomed
    (source,) = images.manifest().shards
    assert embed(("00000", (source, None, None))).rows == 5
    assert embed._decoders is not doomed


def test_embed_config_out_of_range_raises_value_error() -> None:
    for options in ({"batch_size": 0}, {"decoders": 0}, {"gpus_per_worker": -1}):
        with pytest.raises(ValueError, match=r"at least 1|use 0 for the CPU"):
            EmbedConfig(**options)


def test_embed_config_makes_path_of_local_encoder_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    whole = EmbedConfig(encoder="local-dir:clips/mine").encoder
    assert whole == f"local-dir:{tmp_path}/clips/mine"
    assert EmbedConfig(encoder=whole).encoder == whole
    assert EmbedConfig(encoder="local-dir:~/mine").encoder == "local-dir:/home/somebody/mine"
    for name in ("sticker-clip", "hf-hub:org/name", "ViT-B-32/laion2b_s34b_b79k"):
        assert EmbedConfig(encoder=name).encoder == name


@pytest.mark.parametrize(
    ("options", "expected", "decoders"),
    [
        ({}, {"actors": 16, "cpus_per_actor": 1, "gpus_per_actor": 0}, 1),
        ({"workers": 3}, {"actors": 3, "cpus_per_actor": 1, "gpus_per_actor": 0}, 1),
        ({"gpus_per_worker": 1}, {"actors": 16, "cpus_per_actor": 4, "gpus_per_actor": 1}, 3),
        ({"gpus_per_worker": 0.5}, {"actors": 16, "cpus_per_actor": 2, "gpus_per_actor": 0.5}, 1),
        ({"gpus_per_worker": 4, "decoders": 2}, {"actors": 16, "cpus_per_actor": 3, "gpus_per_actor": 4}, 2),
    ],
    ids=str,
)
def test_resources_share_cores_and_gpus_among_workers(
    options: dict[str, Any], expected: dict[str, Any], decoders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster with 16 cores and 4 GPUs; ``infra.compute`` limits the number of workers to what fits."""
    monkeypatch.setattr(compute, "cpus", lambda: 16)
    monkeypatch.setattr(compute, "gpus", lambda: 4.0)
    config = EmbedConfig(**options)
    assert _resources(config) == {**expected, "concurrency": 2}
    worker_config = _worker_config(config)
    assert (worker_config.decoders, worker_config.cuda) == (decoders, "gpus_per_worker" in options)
