"""Tests of the files of registered versions: local stores, object stores, and their failures."""

import errno
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository
from support.hostile import is_untouched, victim
from support.object_stores import Bucket
from support.registry_project import DATABASE, Project

from infra import artifacts
from infra.errors import IntegrityError, KNNDiffusionError, StageError, TransientError
from infra.registry_tags import GENERATOR_NAME
from infra.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # MLflow's advice on type hints and examples


def test_pull_from_a_local_artifact_store_writes_nothing(project: Project) -> None:
    """The artifact store may be read-only for this process."""
    project.register(DATABASE, project.folder()[0])
    project.register(GENERATOR_NAME, project.folder("generator")[0])
    store = Path(project.settings.artifacts_uri)
    before = sorted(store.rglob("*"))
    assert any(path.name == artifacts.MANIFEST for path in before)
    for name, kind in (("twemoji", "database"), (GENERATOR_NAME, "generator")):
        pulled = project.registry.pull(name, kind=kind)
        assert pulled.local is not None
        assert (pulled.local / "artifacts" / artifacts.MANIFEST) in before
    assert sorted(store.rglob("*")) == before
    for path in store.rglob(artifacts.MANIFEST):
        path.unlink()
    with pytest.raises(IntegrityError, match=r"^the files of models:/.*/1 are missing: /.* mount or restore"):
        project.registry.pull(GENERATOR_NAME, kind="generator")


def test_register_and_pull_of_a_remote_folder_succeed(project: Project, bucket: Bucket) -> None:
    uri, manifest = project.folder(base=f"{bucket.uri}/twemoji")
    assert project.registry.pull(uri, kind="database").manifest == manifest
    project.register(DATABASE, uri)
    pulled = project.registry.pull("twemoji", kind="database")
    assert (pulled.folder_uri, pulled.manifest) == (uri, manifest)
    assert project.refusal(f"{bucket.uri}/nothing", kind="database") == (
        f"{bucket.uri}/nothing holds no committed database: there is no manifest.json in it"
    )


def test_register_and_pull_with_an_object_store_report_denied_access(
    mlflow_settings: Settings, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = mlflow_settings.model_copy(update={"artifacts": f"{bucket.uri}/mlflow", "cache": tmp_path / "cache"})
    project = Project(settings, tmp_path)
    (tmp_path / "words.txt").write_text("three words here")
    uri, manifest = project.folder("generator", base=f"{bucket.uri}/twemoji")
    project.register(GENERATOR_NAME, uri, files={"words": tmp_path / "words.txt"})
    assert any(key.startswith("mlflow/") and key.endswith("/words.txt") for key in list(bucket.keys()))
    pulled = project.registry.pull(GENERATOR_NAME, kind="generator")
    assert pulled.manifest == manifest
    assert pulled.local is not None
    assert (pulled.local / "artifacts/words.txt").read_text() == "three words here"
    other, _ = project.folder("generator", rows=4)
    with bucket.store.locked():
        for access in (
            lambda: project.registry.pull(GENERATOR_NAME, kind="generator"),
            lambda: project.register(GENERATOR_NAME, other),
        ):
            with pytest.raises(KNNDiffusionError) as caught:
                access()
            assert "\n" not in str(caught.value)
            assert f"{bucket.uri}/mlflow" in str(caught.value) or "cannot be fetched" in str(caught.value)


def test_pull_from_an_object_store_keeps_files_only_in_the_cache(
    mlflow_settings: Settings, moto_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, cache = tmp_path / "temporary", tmp_path / "cache"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    project = Project(
        mlflow_settings.model_copy(update={"artifacts": f"{moto_bucket.uri}/mlflow", "cache": cache}), tmp_path
    )
    project.register(DATABASE, project.folder()[0])
    pulled = project.registry.pull("twemoji", kind="database")
    assert (pulled.manifest.rows, pulled.local) == (3, None)

    uri, manifest = project.folder("generator")
    project.register(GENERATOR_NAME, uri, files={"00000.faiss": Path(uri, "00000.faiss")})
    local = project.registry.pull(GENERATOR_NAME, kind="generator").local
    assert local == cache / "registered" / manifest.digest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow.artifacts, "download_artifacts", lambda **_: pytest.fail("downloaded again"))
        assert project.registry.pull(GENERATOR_NAME, kind="generator").local == local
    for name, damage in itertools.product(("00000.faiss", "manifest.json"), (b"damaged", None)):
        (local / "artifacts" / name).unlink()
        if damage is not None:
            (local / "artifacts" / name).write_bytes(damage)
        assert project.registry.pull(GENERATOR_NAME, kind="generator").local == local
        assert (local / "artifacts/00000.faiss").read_bytes() == b"index" * 3
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("kind", ["database", "generator"])
def test_pull_with_a_temporary_failure_raises_another_error_than_lost_files(
    kind: str, mlflow_settings: Settings, moto_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"artifacts": f"{moto_bucket.uri}/mlflow", "cache": tmp_path / "cache"}
    project = Project(mlflow_settings.model_copy(update=changes), tmp_path)
    name = DATABASE if kind == "database" else GENERATOR_NAME
    project.register(name, project.folder(kind)[0])

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("reset by peer")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(S3ArtifactRepository, "_download_file", fail)
        with pytest.raises(TransientError, match=r"^the files of models:/.*/1 cannot be fetched .*; check that .*$"):
            project.registry.pull(f"models:/{name}/1", kind=kind)
    with monkeypatch.context() as patch:
        patch.setattr(S3ArtifactRepository, "_download_file", full)
        with pytest.raises(StageError, match=r"^no space left for "):
            project.registry.pull(f"models:/{name}/1", kind=kind)
    for key in list(moto_bucket.keys()):
        moto_bucket.delete(key)
    with pytest.raises(IntegrityError, match=r"^the files of models:/.*/1 cannot be fetched .*; register it again$"):
        project.registry.pull(f"models:/{name}/1", kind=kind)


def test_pull_of_a_generator_whose_digest_is_a_path_deletes_nothing(
    mlflow_settings: Settings, moto_bucket: Bucket, tmp_path: Path
) -> None:
    documents, cache = victim(tmp_path / "Documents"), tmp_path / "cache"
    project = Project(
        mlflow_settings.model_copy(update={"artifacts": f"{moto_bucket.uri}/mlflow", "cache": cache}), tmp_path
    )
    project.register(GENERATOR_NAME, project.folder("generator")[0])
    project.registry.tag(GENERATOR_NAME, 1, "digest", "../../Documents")  # from <cache>/fetching
    with pytest.raises(IntegrityError, match=r"unusable tag digest: .*; register it again$"):
        project.registry.pull(GENERATOR_NAME, kind="generator")
    assert is_untouched(documents)
