"""Tests of pushed folders: they are candidates with the digests of the originals, and damage is refused."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.embedding_rows import build, stored
from support.tiny_models import unit_rows

from infra import artifacts, storage
from infra.errors import InputError, IntegrityError, NotFoundError
from infra.promotions import CANDIDATE, Promotions
from infra.registry import Registry
from infra.settings import Settings
from tasks.pull import pull_database
from tasks.push import kind_of, push_database, push_generator
from tasks.references.database import open_database
from tasks.references.types import DatabaseVersion

NAME = "knn-database.swallows"


@pytest.fixture
def pulled(tmp_path: Path, alone: object) -> tuple[DatabaseVersion, Path]:
    """A database that was pulled, and its copy in a folder that was moved since."""
    base = tmp_path / "root" / "birds"
    version = build(stored(base, [unit_rows(300), unit_rows(200, seed=1)]), base)
    pull_database(version.uri, tmp_path / "copy", Settings(root=str(tmp_path / "root"), cache=tmp_path / "cache"))
    (tmp_path / "copy").rename(tmp_path / "moved")
    return version, tmp_path / "moved"


@pytest.fixture
def target(tmp_path: Path, migrated_database: Path) -> Settings:
    (tmp_path / "other").mkdir()
    shutil.copy(migrated_database, tmp_path / "other" / "mlflow.db")
    return Settings(root=str(tmp_path / "other"), cache=tmp_path / "other-cache")


def test_push_registers_a_candidate_that_answers_like_the_original(
    pulled: tuple[DatabaseVersion, Path], target: Settings, tmp_path: Path
) -> None:
    version, folder = pulled
    queries = unit_rows(5, seed=2).astype(np.float32)
    before = open_database(version, tmp_path / "cache").search(queries, 3)
    digest = version.digest
    shutil.rmtree(tmp_path / "root")
    artifacts._manifest_of.cache_clear()
    assert kind_of(folder) == "database"
    registered = push_database(folder, "swallows", target, trust=True)
    assert (registered.uri, registered.alias_uri) == (f"models:/{NAME}/1", f"models:/{NAME}@{CANDIDATE}")
    assert Promotions(target).champion(NAME) is None
    shutil.rmtree(folder)
    found = Registry(target).pull(registered.uri, kind="database")
    assert found.manifest.digest == digest
    after = open_database(DatabaseVersion.of(found.manifest, found.folder_uri), target.cache_folder).search(queries, 3)
    np.testing.assert_array_equal(after.ids, before.ids)


def test_push_again_resumes_and_registers_nothing_new(
    pulled: tuple[DatabaseVersion, Path], target: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = pulled
    put, copied = storage.put, list[str]()

    def interrupted(local: Path, uri: str) -> None:
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(uri)
        put(local, uri)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "put", interrupted)
        push_database(folder, "swallows", target, trust=True)
    assert Registry(target).versions("database") == []
    with monkeypatch.context() as patch:
        patch.setattr(storage, "put", lambda local, uri: copied.append(uri) or put(local, uri))
        assert not push_database(folder, "swallows", target, trust=True).skipped
        assert len(copied) == len(set(copied)), "a file was copied twice"
    assert push_database(folder, "swallows", target, trust=True).skipped


def test_push_of_a_folder_outside_of_the_root_requires_trust(
    pulled: tuple[DatabaseVersion, Path], target: Settings
) -> None:
    with pytest.raises(InputError, match=r"is outside of the root, .* use --trust"):
        push_database(pulled[1], "swallows", target)
    with pytest.raises(InputError, match=r"is outside of the root, .* use --trust"):
        push_generator(pulled[1], "swallows", target)
    assert Registry(target).versions("database") == []


def _remove_manifest(folder: Path) -> None:
    (folder / "embeddings" / artifacts.MANIFEST).unlink()


def _remove_file(folder: Path) -> None:
    next(folder.rglob("*.npy")).unlink()


def _damage_file(folder: Path) -> None:
    path = next(folder.rglob("*.faiss"))
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "reason", "error"),
    [
        (_remove_manifest, "embeddings has no manifest.json.*; run pull again", NotFoundError),
        (_remove_file, "npy is missing; run pull again", IntegrityError),
        (_damage_file, "faiss differs from its digest .*; run pull again", IntegrityError),
    ],
)
def test_push_of_an_incomplete_folder_is_refused(
    pulled: tuple[DatabaseVersion, Path],
    target: Settings,
    damage: Callable[[Path], None],
    reason: str,
    error: type[Exception],
) -> None:
    damage(pulled[1])
    with pytest.raises(error, match=reason) as caught:
        push_database(pulled[1], "swallows", target, trust=True)
    assert "\n" not in str(caught.value)
    assert Registry(target).versions("database") == []
    assert not (Path(target.root) / "swallows" / "database").exists()


def test_push_of_a_folder_without_a_database_is_refused(tmp_path: Path, target: Settings) -> None:
    with pytest.raises(NotFoundError, match=r"has no manifest\.json"):
        kind_of(tmp_path)
    stage = artifacts.ArtifactBuilder(str(tmp_path), "generator", inputs={}, config={})
    stage.commit([], info={})
    assert kind_of(Path(stage.uri)) == "generator"
    with pytest.raises(InputError, match="give its domain"):
        push_generator(Path(stage.uri), None, target, trust=True)
    manifest = dataclasses.replace(artifacts.read_manifest(stage.uri), kind="images")
    Path(stage.uri, artifacts.MANIFEST).write_text(manifest.to_json())
    with pytest.raises((NotFoundError, IntegrityError)):
        kind_of(Path(stage.uri))
