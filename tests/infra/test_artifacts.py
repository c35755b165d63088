"""Tests of artifacts: commit, resume, keys and digests."""

import dataclasses
import json
import resource
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.committed_folders import CONFIG, INPUTS, committed, fill, new_builder

from infra import artifacts, storage
from infra.artifacts import File, Manifest, Shard
from infra.errors import InputError, IntegrityError, NotFoundError, StageError


def test_committed_of_the_same_request_returns_the_manifest(base: str) -> None:
    assert new_builder(base).committed_manifest() is None
    _, manifest = committed(base)
    assert new_builder(base).committed_manifest() == manifest
    assert new_builder(base, config={**CONFIG, "size": 65}).committed_manifest() is None
    assert new_builder(f"{base}-other").committed_manifest() is None


def test_committed_without_a_manifest_returns_none(base: str) -> None:
    builder = new_builder(base)
    fill(builder, "00000", {"00000.tar": b"x"})
    assert builder.committed_manifest() is None
    with pytest.raises(NotFoundError) as caught:
        artifacts.read_manifest(builder.uri)
    assert str(caught.value) == (
        f"{builder.uri} has no manifest.json: it is not a committed artifact; run the stage that makes it"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "embeddings"},
        {"config": {**CONFIG, "size": 65}},
        {"config": {**CONFIG, "limits": {"max_side_px": 1024, "hosts": ["b", "a"]}}},
        {"config": {**CONFIG, "more": None}},
        {"inputs": {**INPUTS, "images": {"uri": "/data/images/1", "digest": "33" * 32}}},
        {"inputs": {"images": INPUTS["images"]}},
        {"inputs": {"images": INPUTS["urls"], "urls": INPUTS["images"]}},
    ],
)
def test_key_of_another_request_differs(changes: dict[str, Any]) -> None:
    assert new_builder("/data", **changes).key != new_builder("/data").key


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": {name: {**source, "uri": "s3://moved/elsewhere"} for name, source in INPUTS.items()}},
        {"inputs": dict(reversed(INPUTS.items()))},
        {"config": dict(reversed(CONFIG.items()))},
        {"config": {**CONFIG, "limits": {"hosts": ("a", "b"), "max_side_px": 1024}}},
    ],
    ids=["inputs moved", "inputs in another order", "config in another order", "tuple for list"],
)
def test_key_of_an_equivalent_request_is_equal(changes: dict[str, Any]) -> None:
    assert new_builder("/data", **changes).key == new_builder("/data").key
    assert new_builder("/elsewhere", **changes).key == new_builder("/data").key


def test_key_has_16_hexadecimal_digits() -> None:
    assert len(new_builder("/data").key) == 16
    assert int(new_builder("/data").key, 16) >= 0


def test_builder_with_a_config_without_json_form_raises_type_error() -> None:
    with pytest.raises(TypeError, match=r"^PosixPath has no JSON form$"):
        new_builder("/data", config={"where": Path("/a")})


def test_uri_does_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        new_builder("domain").uri
        == new_builder(str(tmp_path / "domain")).uri
        == f"{tmp_path}/domain/images/{new_builder('x').key}"
    )


def test_done_of_a_resumed_stage_returns_committed_shards(base: str) -> None:
    builder = new_builder(base)
    assert builder.committed_shards() == {}
    first = fill(builder, "00000", {"00000.tar": b"a", "00000.parquet": b"b"}, rows=2, info={"lost": {"http_404": 1}})
    third = fill(builder, "00002", {"00002.tar": b"c"})
    storage.write_bytes(f"{builder.uri}/00001.tar", b"the worker died before the marker")
    storage.write_bytes(f"{builder.uri}/shards/.00001.json.123.partial", b'{"name": "00001", "ro')
    assert new_builder(base).committed_shards() == {"00000": first, "00002": third}
    assert (first.rows, first.info) == (2, {"lost": {"http_404": 1}})
    assert [file.name for file in first.files] == ["00000.parquet", "00000.tar"]
    assert new_builder(base, config={}).committed_shards() == {}


def test_commit_shard_that_fails_while_storing_writes_no_marker(tmp_path: Path) -> None:
    builder = new_builder(str(tmp_path / "d"))
    (tmp_path / "local").mkdir()
    (tmp_path / "local/a.tar").write_bytes(b"data")
    (tmp_path / "local/b.tar").symlink_to(tmp_path / "local/a.tar")
    (tmp_path / "d/images" / builder.key / "b.tar").mkdir(parents=True)  # so that b.tar cannot be stored
    with pytest.raises(InputError, match=r"b\.tar cannot be used"):
        artifacts.commit_shard(builder.uri, "00000", tmp_path / "local", rows=1, info={})
    assert storage.exists(f"{builder.uri}/a.tar")
    assert builder.committed_shards() == {}


@contextmanager
def full_disk(after_bytes: int) -> Iterator[None]:
    """Limit the size of files to ``after_bytes``."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("room", [0, 100, 600_000])
def test_commit_on_a_full_disk_keeps_committed_shards(room: int, tmp_path: Path) -> None:
    sizes = {"00000": 10, "00001": 1_000_000}
    undisturbed, broken = (new_builder(str(tmp_path / name)) for name in ("undisturbed", "broken"))
    expected = undisturbed.commit(
        [fill(undisturbed, name, {f"{name}.tar": bytes(size)}) for name, size in sizes.items()], info={}
    )
    first = fill(broken, "00000", {"00000.tar": bytes(10)})

    with storage.scratch() as scratch:
        (scratch / "00001.tar").write_bytes(bytes(1_000_000))
        with full_disk(room), pytest.raises(StageError) as caught:
            artifacts.commit_shard(broken.uri, "00001", scratch, rows=3, info={})
    assert str(caught.value).startswith(
        f"no space left for {broken.uri}/00001.tar; free some space or choose another location"
    )
    assert str(caught.value).endswith("and run again: committed work is kept")
    assert broken.committed_shards() == {"00000": first}
    with full_disk(min(room, 100)), pytest.raises(StageError, match=r"^no space left for .*manifest\.json; free some"):
        broken.commit([first], info={})
    assert broken.committed_manifest() is None
    assert [path.name for path in Path(broken.uri).rglob("*") if path.is_file()] == ["00000.tar", "00000.json"]

    second = fill(broken, "00001", {"00001.tar": bytes(1_000_000)})
    assert broken.commit([*broken.committed_shards().values()], info={}).digest == expected.digest
    assert broken.committed_shards()["00001"] == second


def test_done_returns_more_shards_than_one_listing_page(
    base: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    count = 1050 if "radosgw" in request.node.name else 25
    builder = new_builder(base)
    markers = {f"{number:05d}": Shard(name=f"{number:05d}", rows=1, files=(), info={}) for number in range(count)}

    def commit(shard: Shard) -> None:
        text = json.dumps(dataclasses.asdict(shard)).encode()
        storage.write_bytes(f"{builder.uri}/shards/{shard.name}.json", text)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(commit, markers.values()))
    assert builder.committed_shards() == markers


def test_done_with_a_damaged_marker_raises_integrity_error(base: str) -> None:
    builder = new_builder(base)
    fill(builder, "00000", {"00000.tar": b"a"})
    marker = f"{builder.uri}/shards/00000.json"
    for data in (storage.read_bytes(marker)[:30], b"[]", b'{"name": "00000"}', b""):
        storage.write_bytes(marker, data)
        with pytest.raises(IntegrityError) as caught:
            builder.committed_shards()
        assert str(caught.value).startswith(f"{marker} is damaged (")
        assert str(caught.value).endswith("); delete it and run again")


def test_commit_shard_keeps_subfolders_and_does_not_digest_timings(base: str) -> None:
    files = {"img_emb/img_emb_00000.npy": b"rows", "metadata/metadata_00000.parquet": b"meta", "00000_stats.json": b"1"}
    shard = fill(new_builder(base), "00000", files)
    assert [file.name for file in shard.files] == ["img_emb/img_emb_00000.npy", "metadata/metadata_00000.parquet"]
    for name, data in files.items():
        assert storage.read_bytes(f"{new_builder(base).uri}/{name}") == data


def test_digest_does_not_depend_on_order_time_location_or_interruption(tmp_path: Path) -> None:
    def run(base: str, order: str, stats: bytes, inputs: Mapping[str, Mapping[str, str]] = INPUTS) -> Manifest:
        builder = new_builder(str(tmp_path / base), inputs=inputs)
        shards = [
            fill(
                builder,
                number,
                {f"{number}.tar": number.encode(), f"{number}_stats.json": stats},
                info={"seconds": order.index(number)},
            )
            for number in order.split()
        ]
        return builder.commit(
            shards, identity={"b": 1, "a": {"d": 2}}, info={"seconds": len(base), "stats": str(stats)}
        )

    moved = {name: {**source, "uri": "s3://moved"} for name, source in INPUTS.items()}
    first = run("a", "00000 00001 00002", b"quick")
    second = run("elsewhere", "00002 00000 00001", b"slow", moved)
    resumed = new_builder(str(tmp_path / "a")).commit(
        reversed(new_builder(str(tmp_path / "a")).committed_shards().values()),
        identity={"a": {"d": 2}, "b": 1},
        info={"resumed": True},
    )
    later = dataclasses.replace(first, created_at="2199-01-01T00:00:00+00:00")
    assert first.digest == second.digest == resumed.digest == later.content_digest()
    assert first.info != second.info
    assert [shard.name for shard in second.shards] == ["00000", "00001", "00002"]


@pytest.mark.parametrize("what", ["bytes", "rows", "name", "shards", "identity", "inputs", "kind"])
def test_digest_of_other_content_differs(what: str, tmp_path: Path) -> None:
    def digest(changed: bool) -> str:
        inputs = {"images": {"uri": "u", "digest": "33" * 32}} if changed and what == "inputs" else INPUTS
        kind = "database" if changed and what == "kind" else "images"
        builder = new_builder(str(tmp_path / str(changed)), kind=kind, inputs=inputs)
        name = "b.tar" if changed and what == "name" else "a.tar"
        data = b"one bit flippec" if changed and what == "bytes" else b"one bit flipped"
        shards = [fill(builder, "00000", {name: data}, rows=4 if changed and what == "rows" else 3)]
        if changed and what == "shards":
            shards.append(fill(builder, "00001", {}, rows=0))
        identity = {"encoder": "other" if changed and what == "identity" else "same"}
        return builder.commit(shards, identity=identity, info={}).digest

    assert digest(True) != digest(False)
    assert digest(False) == digest(False)


def test_canonical_json_sorts_keys_and_omits_spaces() -> None:
    assert artifacts.canonical_json({"b": (1, 2.5), "a": None}) == '{"a":null,"b":[1,2.5]}'
    file, digest = File(name="é", sha256="0" * 64, bytes=1), "0" * 64
    assert artifacts.canonical_json(file) == f'{{"bytes":1,"name":"\\u00e9","sha256":"{digest}"}}'
    assert artifacts.digest_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
