"""Tests of references, encoder checks and stage configs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from infra import artifacts, storage
from infra.artifacts import Manifest
from infra.errors import EncoderMismatchError, InputError, IntegrityError, NotFoundError
from infra.key_fields import IN_KEY_IF_SET, NOT_IN_KEY
from model.encoder.identity import EncoderIdentity
from tasks.references import types
from tasks.references.types import DatabaseVersion, EmbeddingShards, Generator, ImageShards, Neighbours, Reference

TINY = EncoderIdentity(name="sticker-clip", weights_digest="a" * 64, preprocess_digest="b" * 64, dimension=256)
BASE = EncoderIdentity(
    name="ViT-B-32/laion2b_s34b_b79k", weights_digest="c" * 64, preprocess_digest="d" * 64, dimension=512
)


def committed(
    base: Path,
    kind: str,
    *,
    encoder: EncoderIdentity = TINY,
    rows: int = 3,
    inputs: dict[str, dict[str, str]] | None = None,
) -> tuple[str, Manifest]:
    stage = artifacts.ArtifactBuilder(str(base), kind, inputs=inputs or {}, config={})
    with storage.scratch() as scratch:
        (scratch / "00000.npy").write_bytes(b"row" * rows)
        shard = artifacts.commit_shard(stage.uri, "00000", scratch, rows=rows, info={})
    return stage.uri, stage.commit([shard], identity={"encoder": dataclasses.asdict(encoder)}, info={})


def manifest_of(tmp_path: Path, name: str, encoder: EncoderIdentity) -> Manifest:
    return committed(tmp_path / name, "database", encoder=encoder)[1]


@pytest.mark.parametrize("reference", [ImageShards, EmbeddingShards, DatabaseVersion, Neighbours, Generator])
def test_open_accepts_only_folders_of_its_kind(reference: type[Reference], tmp_path: Path) -> None:
    uri, manifest = committed(tmp_path, reference.kind, rows=5)
    opened = reference.open(uri)
    assert opened == reference(uri=uri, rows=5, digest=manifest.digest)
    assert opened.manifest() == manifest

    wrong = Neighbours if reference is not Neighbours else Generator
    with pytest.raises(InputError) as caught:
        wrong.open(uri)
    assert str(caught.value) == f"{uri} is an artifact of kind {reference.kind}; give one of kind {wrong.kind}"


def test_reference_kinds_have_their_persisted_names() -> None:
    kinds = [reference.kind for reference in (ImageShards, EmbeddingShards, DatabaseVersion, Neighbours, Generator)]
    assert kinds == ["images", "embeddings", "database", "neighbours", "generator"]


def test_open_of_uncommitted_folder_raises_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"has no manifest\.json: it is not a committed artifact"):
        ImageShards.open(str(tmp_path))


def test_manifest_of_changed_folder_raises_integrity_error(tmp_path: Path) -> None:
    uri, manifest = committed(tmp_path, "embeddings", rows=3)
    reference = EmbeddingShards.open(uri)
    assert committed(tmp_path, "embeddings", rows=4)[0] == uri
    with pytest.raises(IntegrityError) as caught:
        reference.manifest()
    assert str(caught.value) == (
        f"{uri} has changed: its digest is no longer {manifest.digest[:12]}…; give the version to use"
    )


def test_as_input_is_stored_in_the_manifest_of_the_output(tmp_path: Path) -> None:
    uri, manifest = committed(tmp_path, "images")
    source = ImageShards.open(uri).as_input()
    assert source == {"uri": uri, "digest": manifest.digest}
    _, made = committed(tmp_path, "embeddings", inputs={"images": source})
    assert made.inputs == {"images": source}


def test_encoder_of_returns_the_committed_encoder(tmp_path: Path) -> None:
    uri, _ = committed(tmp_path, "database", encoder=BASE)
    assert types.encoder_of(artifacts.read_manifest(uri)) == BASE


@pytest.mark.parametrize("uri", ["s3://bucket/root/shapes/database/0123", "/data/shapes/database/0123/"])
def test_domain_of_returns_the_folder_above_the_kind(uri: str) -> None:
    assert types.domain_of(types.DatabaseVersion(uri=uri, rows=1, digest="")) == "shapes"


def test_require_same_encoder_with_equal_encoders_returns_it(tmp_path: Path) -> None:
    database, generator = manifest_of(tmp_path, "1", BASE), manifest_of(tmp_path, "2", BASE)
    assert types.require_same_encoder(database=database, generator=generator) == BASE
    assert types.require_same_encoder(database=database) == BASE


def test_require_same_encoder_ignores_the_name(tmp_path: Path) -> None:
    copied = dataclasses.replace(TINY, name="local-dir:/models/tiny")
    shared = types.require_same_encoder(
        database=manifest_of(tmp_path, "1", TINY), generator=manifest_of(tmp_path, "2", copied)
    )
    assert shared == TINY


def test_require_same_encoder_with_different_encoders_names_both(tmp_path: Path) -> None:
    database, generator = manifest_of(tmp_path, "1", TINY), manifest_of(tmp_path, "2", BASE)
    with pytest.raises(EncoderMismatchError) as caught:
        types.require_same_encoder(database=database, generator=generator)
    assert str(caught.value) == (
        "database was made by sticker-clip (256-d, aaaaaaaa/bbbbbbbb), "
        "generator by ViT-B-32/laion2b_s34b_b79k (512-d, cccccccc/dddddddd): their embeddings are not comparable; "
        "rebuild one with the other's encoder"
    )


@pytest.mark.parametrize(
    "change", [{"weights_digest": "e" * 64}, {"preprocess_digest": "e" * 64}, {"dimension": 255}], ids=lambda c: str(*c)
)
def test_require_same_encoder_compares_digests_and_dimension(change: dict[str, Any], tmp_path: Path) -> None:
    other = dataclasses.replace(TINY, **change)
    manifests = [manifest_of(tmp_path, name, encoder) for name, encoder in (("1", TINY), ("2", TINY), ("3", other))]
    with pytest.raises(EncoderMismatchError) as caught:
        types.require_same_encoder(database=manifests[0], neighbours=manifests[1], generator=manifests[2])
    assert str(caught.value).startswith(f"database was made by {TINY}, generator by {other}: ")


@dataclasses.dataclass(frozen=True)
class Limits:
    side_px: int = 64


@dataclasses.dataclass(frozen=True)
class Config:
    k: int = 10
    threads: int = 4
    limits: Limits = dataclasses.field(default_factory=Limits)


def test_config_to_dict_excludes_speed_settings_from_the_stage_key(tmp_path: Path) -> None:
    assert types.config_to_dict(Config(), without=("threads",)) == {"k": 10, "limits": {"side_px": 64}}

    def key(config: Config) -> str:
        settings = types.config_to_dict(config, without=("threads",))
        return artifacts.ArtifactBuilder(str(tmp_path), "neighbours", inputs={}, config=settings).key

    assert key(Config(threads=1)) == key(Config(threads=64))
    assert key(Config(k=11)) != key(Config())
    assert key(Config(limits=Limits(side_px=65))) != key(Config())


@dataclasses.dataclass(frozen=True)
class GrownConfig(Config):
    rate: float = dataclasses.field(default=1.0, metadata=NOT_IN_KEY)
    agent: str | None = dataclasses.field(default=None, metadata=IN_KEY_IF_SET)


def test_config_to_dict_new_fields_keep_the_key_of_stored_artifacts() -> None:
    assert types.config_to_dict(GrownConfig(rate=2.0)) == types.config_to_dict(Config())
    assert types.config_to_dict(GrownConfig(agent="birds")) == {**types.config_to_dict(Config()), "agent": "birds"}


def test_metadata_schema_has_the_columns_that_other_tools_read() -> None:
    assert [(field.name, str(field.type)) for field in types.METADATA_SCHEMA] == [
        ("row", "int64"),
        ("key", "string"),
        ("url", "string"),
        ("sha256", "string"),
        ("width", "int32"),
        ("height", "int32"),
        ("status", "string"),
    ]
