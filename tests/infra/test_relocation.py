"""Roots that were moved or copied, on the root that release 0.1.0 wrote."""

import errno
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support.stored_root import FOLDERS, unpack_root

from infra.errors import InputError, StageError
from infra.registry import Registry
from infra.relocation import relocate
from infra.settings import Settings
from tasks.references.database import open_database
from tasks.references.lineage import embeddings_of, images_of, takedown_of
from tasks.references.types import DatabaseVersion


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return unpack_root(tmp_path / "original")


def uris_of(version: DatabaseVersion) -> list[str]:
    """Return the folders of a version, its inputs and the files that they reuse."""
    embeddings = embeddings_of(version)
    references = [version, embeddings, images_of(embeddings)]
    if takedown := takedown_of(version):
        references.append(takedown)
    shards = [shard for one in references for shard in one.manifest().shards]
    history = [file["folder"] for one in references for file in one.manifest().info.get("seen", ())]
    return [*(one.uri for one in references), *(shard.folder for shard in shards if shard.folder), *history]


def champion(root: Path, name: str = "shapes") -> DatabaseVersion:
    pulled = Registry(Settings(root=str(root))).pull(name, kind="database")
    return DatabaseVersion.of(pulled.manifest, pulled.folder_uri)


@pytest.mark.parametrize("is_moved", [True, False], ids=["moved", "copied"])
def test_relocate_repairs_a_moved_or_copied_root(is_moved: bool, original: Path, tmp_path: Path) -> None:
    root, cache = tmp_path / "elsewhere" / "copy", tmp_path / "cache"
    digests = {name: champion(original, name).digest for name in ("shapes", "plain")}
    (shutil.move if is_moved else shutil.copytree)(original, root)
    with pytest.raises(InputError, match=f"moved or copied from {original}.*knn-diffusion relocate {root}"):
        champion(root)
    with pytest.raises(InputError, match="knn-diffusion relocate"):
        open_database(DatabaseVersion.open(str(root / FOLDERS["database"])), cache)
    with pytest.raises(InputError, match="knn-diffusion relocate"):
        Registry(Settings(root=str(root))).pull("knn-diffusion", kind="generator")
    with pytest.raises(InputError, match="knn-diffusion relocate"):  # garbage collection would delete the copy
        Registry(Settings(root=str(root))).versions("database")
    modified = {path: path.stat().st_mtime for path in root.rglob("*.json")}
    modified_ns = {path: path.stat().st_mtime_ns for path in modified}
    done = relocate(Settings(root=str(root)))
    assert done.former == (str(original),)
    assert done.files > 4
    assert {path: path.stat().st_mtime for path in modified} == pytest.approx(modified, abs=0.002, rel=0), (
        "garbage collection deletes the newest manifest first"
    )
    assert sorted(modified, key=lambda path: path.stat().st_mtime_ns) == sorted(
        modified, key=lambda path: modified_ns[path]
    )
    if not is_moved:
        shutil.rmtree(original)
    for name, digest in digests.items():
        version = champion(root, name)
        assert version.digest == digest
        assert all(uri.startswith(f"{root}/") for uri in uris_of(version))
        assert len(open_database(version, cache)) > 0
    generator = Registry(Settings(root=str(root))).pull("knn-diffusion", kind="generator")
    assert str(generator.local).startswith(str(root))
    assert relocate(Settings(root=str(root))).former == ()
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        left = [line for line in database.iterdump() if str(original) in line]
    assert left == []


def test_relocate_leaves_paths_outside_the_root_and_similar_names(original: Path, tmp_path: Path) -> None:
    root = tmp_path / "original-2"
    shutil.copytree(original, root)
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        database.execute(
            "INSERT INTO tags (key, value, run_uuid) SELECT 'note', ?, run_uuid FROM runs LIMIT 1",
            (f'see {original}, "{original}/a", {original}-2/b and /x{original}/c',),
        )
    relocate(Settings(root=str(root)))
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        (note,) = database.execute("SELECT value FROM tags WHERE key = 'note'").fetchone()
    assert note == f'see {original}, "{root}/a", {root}/b and /x{original}/c'
    assert champion(original).uri.startswith(f"{original}/")


def test_relocate_remote_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the root is remote"):
        relocate(Settings(root="s3://bucket/data", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db"))


def test_pull_of_a_version_outside_the_root_without_a_counterpart_is_allowed(original: Path, tmp_path: Path) -> None:
    """A registry may refer to folders of another root, such as those of a merged database."""
    with closing(sqlite3.connect(original / "mlflow.db")) as database, database:
        shutil.move(original / "shapes", tmp_path / "shapes")
        database.execute(
            "UPDATE model_version_tags SET value = replace(value, ?, ?) WHERE key = 'uri'",
            (f"{original}/shapes/", f"{tmp_path}/shapes/"),
        )
    assert champion(original).uri.startswith(f"{tmp_path}/shapes/")


def test_relocate_on_a_full_disk_raises_stage_error_and_can_be_repeated(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(original, root)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("infra.storage.local_writes.os.fsync", full)
        with pytest.raises(StageError, match="no space left for"):
            relocate(Settings(root=str(root)))
    assert relocate(Settings(root=str(root))).former == (str(original),)
