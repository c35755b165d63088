"""Tests of untrusted manifests and markers: each fault raises an error of one line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fakes import LoopbackServer, Reply
from support.hostile import DIGEST, changed, file_entry, shard_entry

from infra import artifacts, manifest, validation
from infra.artifacts import File, Manifest, Shard
from infra.errors import IntegrityError

Fields = dict[str, Any]

BAD_DIGESTS = [
    "", "0" * 63, "0" * 65, "A" * 64, "g" * 64, f"{'0' * 64}\n", f"{'0' * 64}/../../../../Documents", "../" * 21 + "0",
    "٠" * 64, 0, None, True, ["0" * 64],
]  # fmt: skip
BAD_NAMES = [
    "", ".", "..", "../a", "a/..", "a/../b", "a/./b", "./a", "/etc/passwd", "a//b", "a/", "//host/a", "a\\b", "..\\a",
    "a\x00b", "a\nb", "a\x7fb", "a\x9bb", "a\u2028b", "a\u202eb", "a\ud800b", "a" * 256, "é" * 128, "a/" * 600 + "a",
    "../../../../.bashrc", 1, None, ["a"],
]  # fmt: skip
BAD_COUNTS = [-1, 2**63, 10**400, 1.0, 1e300, True, "3", None, [], float("nan")]
BAD_SHARD_NAMES = ["", ".", "..", ".a", "a/b", "../a", "a\\b", "a\x00", "a\n", "a b", "é", "a" * 129, 0, None, True]
BAD_FOLDERS = ["", "a\x00b", "s3://b/a\nb", "/a\x1b[2J", "a" * 5000, 1, True, []]


def refusal(data: bytes) -> str:
    with pytest.raises(IntegrityError) as caught:
        Manifest.from_json(data, "http://host/db/manifest.json")
    message = str(caught.value)
    assert message.startswith("http://host/db/manifest.json is not a manifest (")
    assert message.endswith("); delete its folder and run again")
    assert message.isprintable()
    assert len(message) < 500
    return message


def in_file(name: str, value: Any) -> Callable[[Fields], Any]:
    return lambda fields: fields["shards"][0]["files"][0].update({name: value})


def in_shard(name: str, value: Any) -> Callable[[Fields], Any]:
    return lambda fields: fields["shards"][0].update({name: value})


def in_manifest(name: str, value: Any) -> Callable[[Fields], Any]:
    return lambda fields: fields.update({name: value})


def in_input(name: str, value: Any) -> Callable[[Fields], Any]:
    return lambda fields: fields["inputs"]["urls"].update({name: value})


def test_from_json_parses_a_valid_manifest() -> None:
    parsed = Manifest.from_json(changed(lambda fields: None), "here")
    assert parsed.files == (File(name="00000.tar", sha256=DIGEST, bytes=8),)


@pytest.mark.parametrize("value", BAD_DIGESTS, ids=ascii)
def test_from_json_with_a_malformed_digest_raises_integrity_error(value: Any) -> None:
    assert "64 lower-case hexadecimal digits" in refusal(changed(in_file("sha256", value)))
    assert "64 lower-case hexadecimal digits" in refusal(changed(in_input("digest", value)))


@pytest.mark.parametrize("value", BAD_NAMES, ids=ascii)
def test_from_json_with_a_file_name_outside_its_folder_raises_integrity_error(value: Any) -> None:
    assert "a file name must be a relative path" in refusal(changed(in_file("name", value)))


@pytest.mark.parametrize("value", BAD_COUNTS, ids=lambda value: str(value)[:9] if value != 10**400 else "10**400")
def test_from_json_with_an_invalid_count_raises_integrity_error(value: Any) -> None:
    assert "the size of a file must be an integer" in refusal(changed(in_file("bytes", value)))
    assert "the rows of a shard must be an integer" in refusal(changed(in_shard("rows", value)))
    refusal(changed(in_manifest("rows", value)))


@pytest.mark.parametrize("value", BAD_SHARD_NAMES, ids=ascii)
def test_from_json_with_an_invalid_shard_name_raises_integrity_error(value: Any) -> None:
    assert "the name of a shard must be" in refusal(changed(in_shard("name", value)))


@pytest.mark.parametrize("value", BAD_FOLDERS, ids=lambda value: ascii(value)[:20])
def test_from_json_with_an_invalid_folder_raises_integrity_error(value: Any) -> None:
    assert "the folder of a shard must be" in refusal(changed(in_shard("folder", value)))
    assert "the uri of an input must be" in refusal(changed(in_input("uri", value)))


@pytest.mark.parametrize(
    "change",
    [
        in_manifest("kind", "../images"),
        in_manifest("kind", 1),
        in_manifest("key", "../../x"),
        in_manifest("created_at", "x" * 100),
        in_manifest("created_at", 5),
        in_manifest("schema_version", True),
        in_manifest("schema_version", "1"),
        in_manifest("info", []),
        in_manifest("config", None),
        in_manifest("identity", "x"),
        in_manifest("inputs", []),
        in_manifest("inputs", {"urls": "x"}),
        in_manifest("inputs", {"urls": {"uri": "u", "digest": DIGEST, "more": 1}}),
        in_manifest("shards", {}),
        in_manifest("shards", [1]),
        in_manifest("shards", "00000"),
        in_manifest("rows", 4),
        in_shard("files", {}),
        in_shard("files", [1]),
        in_shard("files", None),
        in_shard("info", []),
        in_shard("colour", "red"),
        in_file("colour", "red"),
    ],
)
def test_from_json_with_a_field_of_another_type_raises_integrity_error(change: Callable[[Fields], Any]) -> None:
    refusal(changed(change))


@pytest.mark.parametrize(
    "shards",
    [
        [shard_entry("00000", file_entry("a"), file_entry("a"))],
        [shard_entry("00000", file_entry("a/b"), file_entry("A/B"))],
        [shard_entry("00000", file_entry("a")), shard_entry("00001", file_entry("a"))],
        [shard_entry("00000", file_entry("a"), file_entry("a/b"))],
        [shard_entry("00000", file_entry("A/b/c"), file_entry("a/B"))],
        [shard_entry("00000"), shard_entry("00000")],
        [shard_entry("a"), shard_entry("A")],
    ],
    ids=["name", "case", "across shards", "file and folder", "deeper", "shard", "shard case"],
)
def test_from_json_with_duplicate_names_raises_integrity_error(shards: list[Fields]) -> None:
    rows = sum(shard["rows"] for shard in shards)
    refusal(changed(lambda fields: fields.update(shards=shards, rows=rows)))


def test_from_json_of_overlapping_databases_allows_shared_files_only() -> None:
    def parsed(*shas: str) -> Manifest:
        shards = [shard_entry(f"0000{n}", file_entry("a", sha256=sha), folder="s3://b/1") for n, sha in enumerate(shas)]
        return Manifest.from_json(changed(lambda fields: fields.update(shards=shards, rows=6)), "here")

    assert len(parsed(DIGEST, DIGEST).shards) == 2
    with pytest.raises(IntegrityError, match="is not unique"):
        parsed(DIGEST, "cd" * 32)


def test_shard_file_without_a_match_raises_integrity_error() -> None:
    (shard,) = Manifest.from_json(changed(lambda fields: None), "here").shards
    assert shard.file(".tar").name == "00000.tar"
    with pytest.raises(IntegrityError, match=r"shard 00000 has 0 files \*\.npy instead of 1"):
        shard.file(".npy")


def test_from_json_with_shards_of_several_folders_allows_equal_file_names() -> None:
    shards = [shard_entry(f"0000{n}", file_entry("a"), folder=f"s3://b/{n}") for n in range(2)]
    assert len(Manifest.from_json(changed(lambda fields: fields.update(shards=shards, rows=6)), "here").shards) == 2


@pytest.mark.parametrize("depth", [65, 900, 200_000])
def test_from_json_nested_too_deep_raises_integrity_error(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    data = changed(lambda fields: None).replace(b'"config": {}', f'"config": {{"a": {nested}}}'.encode())
    assert "nested deeper than 64 levels" in refusal(data)


def test_from_json_above_the_size_limit_raises_integrity_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = changed(lambda fields: None)
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", len(data) - 1)
    assert f"it has {len(data)} bytes" in refusal(data)


def test_read_manifest_from_an_endless_response_stops_at_the_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, sent = 1 << 20, 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(256):  # bounds the test where the limit is missing
            sent += limit
            yield b" " * limit

    for module in (manifest, artifacts):
        monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", limit)
    with (
        LoopbackServer({"/domain/manifest.json": Reply(body=endless)}) as server,
        pytest.raises(IntegrityError, match=f"more than the limit of {limit}"),
    ):
        artifacts.read_manifest(server.url("/domain"))
    assert sent < 64 * limit, "buffers of the sockets included"


def test_read_shard_with_an_invalid_marker_raises_integrity_error(tmp_path: Path) -> None:
    marker = tmp_path / "shards" / "00000.json"
    marker.parent.mkdir()
    for shard in (
        shard_entry("00001"),
        shard_entry("00000", file_entry("../a")),
        shard_entry("00000", file_entry(sha256="x")),
        shard_entry("00000", rows=-1),
        shard_entry("00000", folder="a\nb"),
    ):
        marker.write_text(json.dumps(shard))
        with pytest.raises(IntegrityError, match=r"00000\.json is damaged \(.*\); delete it and run again$"):
            artifacts.read_shard(str(tmp_path), "00000")


def test_records_with_invalid_fields_raise_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a file name must be"):
        File(name="../a", sha256=DIGEST, bytes=0)
    with pytest.raises(ValueError, match="the name of a shard"):
        Shard(name="a/b", rows=0, files=(), info={})
    shards = [Shard(name=name, rows=0, files=(), info={}) for name in ("a", "A")]
    with pytest.raises(ValueError, match="names that differ only in case"):
        artifacts.ArtifactBuilder(str(tmp_path), "images", inputs={}, config={}).commit(shards, info={})


@pytest.mark.parametrize(
    "name", ["a", "a b.txt", "a/b/c.npy", "é/ü.json", "...", ".hidden", "a..b", "model.fp16.safetensors", "a" * 255]
)
def test_file_name_accepts_an_ordinary_name(name: str) -> None:
    assert validation.file_name(name) == name
