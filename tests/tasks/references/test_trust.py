"""Tests of trust: which files and encoders a database or generator from a foreign folder may have opened."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fakes import LoopbackServer
from support.tiny_models import pipeline

from infra import artifacts, storage
from infra.errors import InputError, IntegrityError, KNNDiffusionError
from infra.settings import Settings
from model.encoder.clip import Encoder
from tasks.references.domain_folder import DomainFolder
from tasks.references.lineage import embeddings_of, images_of
from tasks.references.trust import open_folder, open_named, own_root, saved_pipeline
from tasks.references.types import DatabaseVersion, EmbeddingShards, Generator, ImageShards
from tasks.references.url_history import UrlHistory
from tasks.serve.load import load_pipeline, search_database
from tasks.train.adopt import adopt

BUNDLED = "sticker-clip"
FOREIGN_ENCODERS = ["hf-hub:evil/clip", "local-dir:/etc", "ViT-B-32/laion2b_s34b_b79k"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The user's settings. The module shares one registry because creating it takes seconds."""
    folder = tmp_path_factory.mktemp("user")
    return Settings(root=str(folder / "root"), cache=folder / "cache")


def commit(base: Path | str, kind: str, *, encoder: str = BUNDLED, **parts: Any) -> str:
    """Commit an artifact without rows, and return its folder."""
    stage = artifacts.ArtifactBuilder(str(base), kind, inputs=parts.get("inputs", {}), config={"encoder": encoder})
    identity = {"name": encoder, "weights_digest": "w", "preprocess_digest": "p", "dimension": 4}
    stage.commit(parts.get("shards", []), identity={"encoder": identity}, info=parts.get("info", {}))
    return stage.uri


def database(base: Path | str, embeddings_uri: str, **parts: Any) -> str:
    """Commit a database version over the embeddings at ``embeddings_uri``, which need not exist."""
    local = storage.is_local(embeddings_uri) and storage.exists(f"{embeddings_uri}/{artifacts.MANIFEST}")
    digest = artifacts.read_manifest(embeddings_uri).digest if local else "0" * 64
    return commit(base, "database", inputs={"embeddings": {"uri": embeddings_uri, "digest": digest}}, **parts)


@pytest.mark.parametrize(
    "spelled", ["{elsewhere}", "file://{elsewhere}", "{root}/../elsewhere/{tail}", "{root}/link/{tail}"]
)
def test_embeddings_of_foreign_database_outside_its_root_needs_trust(
    tmp_path: Path, settings: Settings, spelled: str
) -> None:
    elsewhere = commit(tmp_path / "elsewhere" / "shapes", "embeddings")
    root, tail = tmp_path / "foreign", str(Path(elsewhere).relative_to(tmp_path / "elsewhere"))
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    uri = database(root / "shapes", spelled.format(elsewhere=elsewhere, root=root, tail=tail))
    version, _ = open_named(DatabaseVersion, uri, settings)
    with pytest.raises(InputError, match=rf"refers to .*, outside its own root {root}; .* add --trust") as caught:
        embeddings_of(version)
    assert "\n" not in str(caught.value)
    trusted, _ = open_named(DatabaseVersion, uri, settings, trust=True)
    assert embeddings_of(trusted).rows == 0


@pytest.mark.parametrize("chained", ["", "simplecache::"])
def test_search_of_foreign_database_requests_no_internal_service(
    tmp_path: Path, settings: Settings, chained: str
) -> None:
    with LoopbackServer({}) as internal:
        uri = database(tmp_path / "foreign" / "shapes", chained + internal.url("/shapes/embeddings/0"))
        with pytest.raises(InputError, match="add --trust"):
            search_database(uri, "cat", 1, settings)
        assert internal.requests == []
        with pytest.raises(KNNDiffusionError, match=r"^(?!.*--trust)"):
            search_database(uri, "cat", 1, settings, trust=True)
        assert internal.requests


def test_images_behind_foreign_embeddings_outside_first_root_need_trust(tmp_path: Path, settings: Settings) -> None:
    outside = commit(tmp_path / "shapes", "images")
    source = {"images": {"uri": outside, "digest": artifacts.read_manifest(outside).digest}}
    inner = commit(tmp_path / "foreign", "embeddings", inputs=source)  # opened directly, its own root is tmp_path
    assert own_root(inner, artifacts.read_manifest(inner)) == str(tmp_path)
    version, _ = open_named(DatabaseVersion, database(tmp_path / "foreign" / "shapes", inner), settings)
    embeddings = embeddings_of(version)
    with pytest.raises(InputError, match=f"outside its own root {tmp_path}/foreign; "):
        images_of(embeddings)


def test_shards_of_foreign_artifacts_outside_their_root_need_trust(tmp_path: Path, settings: Settings) -> None:
    shard = artifacts.Shard(name="00000", rows=0, files=(), info={}, folder=str(tmp_path / "private"))
    embeddings = commit(tmp_path / "foreign" / "shapes", "embeddings", shards=[shard])
    version, _ = open_named(DatabaseVersion, database(tmp_path / "foreign" / "shapes", embeddings), settings)
    with pytest.raises(InputError, match=r"refers to .*/private, outside its own root"):
        embeddings_of(version).manifest()
    uri = database(tmp_path / "foreign" / "shapes", embeddings, shards=[shard], encoder=BUNDLED)
    with pytest.raises(InputError, match=r"refers to .*/private, outside its own root"):
        open_named(DatabaseVersion, uri, settings)
    assert open_named(DatabaseVersion, uri, settings, trust=True)[0].manifest().shards == (shard,)


def test_url_history_of_foreign_images_outside_their_root_needs_trust(tmp_path: Path, settings: Settings) -> None:
    entry = {"folder": str(tmp_path / "private"), "file": {"name": "seen.npz", "sha256": "0", "bytes": 0}, "rows": 0}
    uri = commit(tmp_path / "foreign" / "shapes", "images", info={"seen": [entry]})
    with pytest.raises(InputError, match=r"refers to .*/private, outside its own root"):
        UrlHistory.of(open_folder(ImageShards, uri, settings), tmp_path)


@pytest.mark.parametrize("encoder", FOREIGN_ENCODERS)
@pytest.mark.parametrize("where", ["database", "embeddings"])
def test_encoder_named_by_foreign_artifact_needs_trust(
    tmp_path: Path, settings: Settings, encoder: str, where: str
) -> None:
    names = {"database": BUNDLED, "embeddings": BUNDLED} | {where: encoder}
    base = tmp_path / "foreign" / "shapes"
    uri = database(base, commit(base, "embeddings", encoder=names["embeddings"]), encoder=names["database"])

    def open_both(trust: bool) -> EmbeddingShards:
        version, _ = open_named(DatabaseVersion, uri, settings, trust=trust)
        embeddings = embeddings_of(version)
        embeddings.manifest()
        return embeddings

    with pytest.raises(InputError, match=rf"names the encoder {encoder}, .* add --trust"):
        open_both(trust=False)
    assert open_both(trust=True).rows == 0


@pytest.mark.parametrize("spelled", ["{root}", "{root}/", "file://{root}"])
def test_database_below_the_users_root_is_trusted(tmp_path: Path, settings: Settings, spelled: str) -> None:
    elsewhere = commit(tmp_path / "shapes", "embeddings", encoder="local-dir:/clip")
    uri = database(Path(settings.root) / tmp_path.name, elsewhere, encoder="local-dir:/clip")
    spelled_uri = uri.replace(settings.root, spelled.format(root=settings.root))
    version, _ = open_named(DatabaseVersion, spelled_uri, settings)
    assert embeddings_of(version).uri == elsewhere
    assert open_folder(DatabaseVersion, spelled_uri, settings).confined_to is None


def test_foreign_database_with_inputs_in_its_own_root_needs_no_trust(tmp_path: Path, settings: Settings) -> None:
    other = commit(tmp_path / "foreign" / "others", "embeddings")
    version, _ = open_named(DatabaseVersion, database(tmp_path / "foreign" / "shapes", other), settings)
    assert embeddings_of(version).uri == other


@pytest.mark.parametrize(
    ("folder", "root"),
    [
        ("/data/birds/database/{key}", "/data"),
        ("s3://bucket/line/birds/database/{key}", "s3://bucket/line"),
        ("http://host/birds/database/{key}", "http://host"),
        ("/birds/database/{key}", "/birds/database/{key}"),
        ("http://birds/database/{key}", "http://birds/database/{key}"),
        ("/data/birds/generator/{key}", "/data/birds/generator/{key}"),
        ("/data/birds/database/latest", "/data/birds/database/latest"),
        ("/copied", "/copied"),
    ],
)
def test_own_root_returns_root_of_the_layout_or_the_folder(tmp_path: Path, folder: str, root: str) -> None:
    manifest = artifacts.read_manifest(commit(tmp_path, "database"))
    assert own_root(folder.format(key=manifest.key), manifest) == root.format(key=manifest.key)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "index/../../secret"])
def test_read_manifest_with_file_outside_its_folder_raises_integrity_error(tmp_path: Path, name: str) -> None:
    file = artifacts.File(name="secret", sha256="0" * 64, bytes=1)
    uri = commit(tmp_path, "database", shards=[artifacts.Shard(name="00000", rows=0, files=(file,), info={})])
    path = Path(uri, artifacts.MANIFEST)
    path.write_text(path.read_text().replace('"secret"', f'"{name}"'))
    with pytest.raises(IntegrityError, match=rf"a file name must be .*{re.escape(name)}"):
        artifacts.read_manifest(uri)
    path.write_text(path.read_text().replace(f'"{name}"', '"secret"').replace('"00000"', f'"{name}"'))
    with pytest.raises(IntegrityError, match=rf"the name of a shard must be .*{re.escape(name)}"):
        artifacts.read_manifest(uri)


@pytest.mark.parametrize("encoder", FOREIGN_ENCODERS)
def test_encoder_named_by_foreign_pipeline_needs_trust(
    tmp_path: Path, settings: Settings, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "pipeline"
    made = pipeline(None)
    made.register_to_config(encoder_identity=dataclasses.asdict(made.identity) | {"name": encoder})
    made.save_pretrained(saved)
    monkeypatch.setattr("tasks.serve.load.load_database", lambda *_, **__: None)
    steps: list[Callable[[bool], Any]] = [
        lambda trust: load_pipeline(str(saved), "shapes", settings, trust=trust),
        lambda trust: adopt(
            str(saved),
            DomainFolder(uri=f"{tmp_path}/own"),
            confined_to=saved_pipeline(str(saved), "", settings, trust=trust).confined_to,
        ),
    ]
    for step in steps:
        with pytest.raises(InputError, match=rf"names the encoder {encoder}, .* add --trust"):
            step(False)
        step(True)


def test_bundled_pipelines_and_encoder_need_no_trust(settings: Settings) -> None:
    generator = saved_pipeline("sticker-generator", "", settings)
    assert (generator.uri, generator.confined_to) == ("sticker-generator", None)
    foreign = Generator(uri="/elsewhere", rows=0, digest="", confined_to="/elsewhere")
    foreign.require_known(Encoder().identity)
    with pytest.raises(KNNDiffusionError):
        foreign.require_known(dataclasses.replace(Encoder().identity, name="sticker-clip-2"))
