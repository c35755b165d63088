"""Tests of reading artifacts: verified manifests and files."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.committed_folders import CONFIG, INPUTS, committed
from support.fakes import LoopbackServer, Reply
from support.object_stores import Bucket

from infra import artifacts, storage
from infra.artifacts import File
from infra.errors import IntegrityError


def rewrite_manifest(folder_uri: str, change: Callable[[dict[str, Any]], Any]) -> None:
    uri = storage.join(folder_uri, artifacts.MANIFEST)
    raw = json.loads(storage.read_bytes(uri))
    change(raw)
    storage.write_bytes(uri, json.dumps(raw).encode())


def refusal(folder_uri: str) -> str:
    with pytest.raises(IntegrityError) as caught:
        artifacts.read_manifest(folder_uri)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_read_manifest_returns_what_was_committed(base: str) -> None:
    builder, manifest = committed(base)
    assert manifest.rows == 7
    assert manifest.inputs == INPUTS
    assert manifest.config == CONFIG
    assert (manifest.kind, manifest.identity, manifest.info) == ("images", {"encoder": "x"}, {"seconds": 1.5})
    assert [shard.name for shard in manifest.shards] == ["00000", "00001"]
    assert manifest.files[1] == File(name="00001.tar", bytes=7, sha256=hashlib.sha256(b"tar one").hexdigest())
    assert builder.uri == f"{base}/images/{builder.key}"
    assert artifacts.read_manifest(builder.uri) == manifest
    assert storage.list_names(builder.uri) == ["00000.tar", "00001.tar", "manifest.json", "shards"]
    assert storage.read_bytes(f"{builder.uri}/00001.tar") == b"tar one"


def test_read_manifest_from_a_store_without_modification_times_succeeds(tmp_path: Path) -> None:
    builder, manifest = committed(str(tmp_path))
    body = storage.read_bytes(f"{builder.uri}/manifest.json")
    with LoopbackServer({"/v/manifest.json": Reply(body=body)}) as server:
        assert artifacts.read_manifest(server.url("/v")) == manifest


def test_read_manifest_of_a_replaced_file_reads_it_again(base: str) -> None:
    builder, manifest = committed(base)
    assert artifacts.read_manifest(builder.uri) is artifacts.read_manifest(builder.uri)
    time.sleep(1.1)  # modification times of object stores have a resolution of one second
    other = builder.commit(manifest.shards, identity=manifest.identity, info={"seconds": 2.5})
    assert other != manifest
    assert artifacts.read_manifest(builder.uri) == other


def drop_a_shard(raw: dict[str, Any]) -> None:
    del raw["shards"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(rows=8),
        lambda raw: raw.update(kind="database"),
        lambda raw: raw.update(identity={"encoder": "y"}),
        lambda raw: raw["shards"][0]["files"][0].update(sha256="00" * 32),
        lambda raw: raw["shards"][0]["files"][0].update(bytes=9),
        lambda raw: raw["inputs"]["images"].update(digest="33" * 32),
        lambda raw: raw.update(digest="00" * 32),
        lambda raw: raw["config"].update(size=65),
        lambda raw: raw["info"].update(seconds=2.5),
        lambda raw: raw["shards"][0]["info"].update(more=1),
        lambda raw: raw.update(checksum="00" * 32),
        drop_a_shard,
    ],
)
def test_read_manifest_changed_by_hand_raises_integrity_error(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    builder, _ = committed(str(tmp_path))
    rewrite_manifest(builder.uri, change)
    message = f"{builder.uri}/manifest.json was changed after it was committed; delete its folder and run again"
    assert refusal(builder.uri) == message
    with pytest.raises(IntegrityError):
        builder.committed_manifest()


def test_read_manifest_with_moved_inputs_succeeds(tmp_path: Path) -> None:
    builder, manifest = committed(str(tmp_path))
    rewrite_manifest(builder.uri, lambda raw: raw["inputs"]["images"].update(uri="s3://moved"))
    rewrite_manifest(builder.uri, lambda raw: raw["shards"][0].update(folder="s3://moved"))
    assert artifacts.read_manifest(builder.uri).digest == manifest.digest


def test_read_manifest_without_a_checksum_succeeds(tmp_path: Path) -> None:
    builder, manifest = committed(str(tmp_path))
    rewrite_manifest(builder.uri, lambda raw: raw.pop("checksum"))
    assert artifacts.read_manifest(builder.uri).digest == manifest.digest


@pytest.mark.parametrize("version", [0, 2])
def test_read_manifest_of_another_schema_version_names_it(version: int, tmp_path: Path) -> None:
    builder, _ = committed(str(tmp_path))
    rewrite_manifest(builder.uri, lambda raw: raw.update(schema_version=version))
    assert refusal(builder.uri) == (
        f"{builder.uri}/manifest.json has schema version {version}, but this release reads 1; "
        "rebuild it, or use the release that wrote it"
    )


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"schema_version": 1}', b"\xff\xfe\x00", b'"text"'])
def test_read_manifest_of_another_file_raises_integrity_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    message = refusal(str(tmp_path))
    assert message.startswith(f"{tmp_path}/manifest.json is not a manifest (")
    assert message.endswith("); delete its folder and run again")


def test_read_manifest_with_an_unknown_field_names_it(tmp_path: Path) -> None:
    builder, _ = committed(str(tmp_path))
    rewrite_manifest(builder.uri, lambda raw: raw.update(colour="red"))
    assert "is not a manifest (" in refusal(builder.uri)
    assert "colour" in refusal(builder.uri)


def test_fetch_file_returns_the_stored_bytes(base: str, tmp_path: Path) -> None:
    builder, manifest = committed(base)
    for file, data in zip(manifest.files, (b"tar zero", b"tar one"), strict=True):
        assert artifacts.fetch_file(builder.uri, file, tmp_path / "cache").read_bytes() == data


def test_fetch_file_of_a_local_file_does_not_copy(tmp_path: Path) -> None:
    builder, manifest = committed(str(tmp_path / "d"))
    path = artifacts.fetch_file(builder.uri, manifest.files[0], tmp_path / "cache")
    assert path == Path(builder.uri) / "00000.tar"
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["verified"]  # no copy, only a stamp


@pytest.mark.parametrize("data", [b"tar zer", b"", b"tar zerO", b"tar zero and more"])
def test_fetch_file_that_differs_from_its_digest_raises_integrity_error(data: bytes, base: str, tmp_path: Path) -> None:
    builder, manifest = committed(base)
    file = manifest.files[0]
    storage.write_bytes(f"{builder.uri}/00000.tar", data)
    for _ in range(2):  # the damaged file must not be cached
        with pytest.raises(IntegrityError) as caught:
            artifacts.fetch_file(builder.uri, file, tmp_path / "cache")
        assert str(caught.value) == (
            f"{builder.uri}/00000.tar differs from its committed digest {file.sha256[:12]}…; "
            f"restore it, or delete {builder.uri} and run again"
        )
    assert artifacts.fetch_file(builder.uri, manifest.files[1], tmp_path / "cache").read_bytes() == b"tar one"
    storage.write_bytes(f"{builder.uri}/00000.tar", b"tar zero")
    assert artifacts.fetch_file(builder.uri, file, tmp_path / "cache").read_bytes() == b"tar zero"


def test_fetch_file_of_a_missing_file_raises_integrity_error(base: str, tmp_path: Path) -> None:
    builder, manifest = committed(base)
    storage.remove(f"{builder.uri}/00001.tar")
    with pytest.raises(IntegrityError) as caught:
        artifacts.fetch_file(builder.uri, manifest.files[1], tmp_path / "cache")
    assert str(caught.value) == (
        f"{builder.uri}/00001.tar is missing though it was committed; restore it, or delete {builder.uri} and run again"
    )


def test_fetch_file_of_a_remote_file_caches_it_by_digest(bucket: Bucket, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    builder, manifest = committed(f"{bucket.uri}/twemoji")
    file = manifest.files[0]
    cached = artifacts.fetch_file(builder.uri, file, cache)
    assert cached == cache / file.sha256[:2] / f"{file.sha256}.tar"
    assert list(cache.rglob("*.tar")) == [cached]

    storage.remove(builder.uri)
    assert bucket.keys() == []
    assert artifacts.fetch_file(builder.uri, file, cache) == cached
    assert artifacts.fetch_file(f"{bucket.uri}/a/newer/version", file, cache) == cached  # found by digest
    assert cached.read_bytes() == b"tar zero"
    with pytest.raises(IntegrityError, match="is missing though it was committed"):
        artifacts.fetch_file(builder.uri, manifest.files[1], cache)
