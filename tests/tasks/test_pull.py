"""Tests of copies in a folder: search works without the original, damage and interruptions are repaired."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.embedding_rows import build, stored
from support.tiny_models import unit_rows

from infra import artifacts
from infra.errors import IntegrityError
from infra.settings import Settings
from tasks.pull import pull_database
from tasks.references.database import open_database
from tasks.references.trust import open_folder
from tasks.references.types import DatabaseVersion


@pytest.fixture
def version(tmp_path: Path, alone: object) -> DatabaseVersion:
    base = tmp_path / "root" / "birds"
    return build(stored(base, [unit_rows(300), unit_rows(200, seed=1)]), base)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(root=str(tmp_path / "root"), cache=tmp_path / "cache")


def test_pulled_database_answers_like_the_original_without_it(
    version: DatabaseVersion, settings: Settings, tmp_path: Path
) -> None:
    queries = unit_rows(5, seed=2).astype(np.float32)
    before = open_database(version, settings.cache_folder).search(queries, 3)
    copy = tmp_path / "copy"
    assert pull_database(version.uri, copy, settings).digest == version.digest
    shutil.rmtree(tmp_path / "root")
    artifacts._manifest_of.cache_clear()
    found = open_folder(DatabaseVersion, str(copy), Settings(root=str(tmp_path / "other")), trust=True)
    after = open_database(found, tmp_path / "new-cache").search(queries, 3)
    np.testing.assert_array_equal(after.ids, before.ids)


def test_pull_resumes_and_replaces_a_damaged_copy(version: DatabaseVersion, settings: Settings, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    pull_database(version.uri, copy, settings)
    files = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    damaged, missing, *_ = (path for path in sorted(files) if path.suffix in {".faiss", ".npy"})
    damaged.write_bytes(b"x" * len(files[damaged]))
    missing.unlink()
    pull_database(version.uri, copy, settings)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == files


def test_pull_of_a_damaged_original_is_refused(version: DatabaseVersion, settings: Settings, tmp_path: Path) -> None:
    index = next(Path(version.uri).rglob("*.faiss"))
    index.write_bytes(b"x" * index.stat().st_size)
    with pytest.raises(IntegrityError, match="differs from its committed digest"):
        pull_database(version.uri, tmp_path / "copy", settings)
    assert not (tmp_path / "copy" / artifacts.MANIFEST).exists()
