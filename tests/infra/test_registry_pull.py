"""Tests of the model registry: pull a version by any reference, and the errors of wrong ones."""

import json
import shutil
from pathlib import Path

import pytest
from support.registry_project import DATABASE, Project, fill

from infra import artifacts
from infra.errors import IntegrityError
from infra.registry import RegisteredVersion
from infra.registry_tags import DATABASE_PREFIX, GENERATOR_NAME

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # MLflow's advice on type hints and examples


def test_pull_of_a_registered_database_accepts_every_reference(project: Project) -> None:
    uri, manifest = project.folder()
    registered = project.register(DATABASE, uri, tags={"encoder": "tiny", "rows": "3"})
    assert registered == RegisteredVersion(
        name=DATABASE,
        version=1,
        uri=f"models:/{DATABASE}/1",
        alias_uri=f"models:/{DATABASE}@champion",
        existed=False,
    )
    for reference in ("twemoji", DATABASE, registered.uri, registered.alias_uri):
        pulled = project.registry.pull(reference, kind="database")
        assert (pulled.folder_uri, pulled.manifest) == (uri, manifest)
        assert (pulled.name, pulled.version) == (DATABASE, 1)
    (version,) = project.registry.versions("database")
    assert version["created_ms"] > 1_700_000_000_000
    expected = {"encoder": "tiny", "rows": 3, "digest": manifest.digest, "uri": uri, "aliases": ["champion"]}
    assert version.items() >= {"name": DATABASE, "version": 1, **expected}.items()


def test_pull_of_a_folder_needs_no_registration(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, manifest = project.folder()
    monkeypatch.chdir(tmp_path)
    for reference in (uri, f"{uri}/", f"file://{uri}", str(Path(uri).relative_to(tmp_path))):
        pulled = project.registry.pull(reference, kind="database")
        assert (pulled.folder_uri, pulled.manifest) == (uri, manifest)
        assert (pulled.local, pulled.name, pulled.version) == (None, None, None)


def test_pull_of_an_unknown_name_lists_the_registered_versions(project: Project) -> None:
    store = project.settings.tracking_uri
    assert project.refusal("twemoij", kind="database") == (
        f"no database is registered as models:/knn-database.twemoij@champion at {store}; registered: none"
    )
    database, _ = project.folder()
    project.register(DATABASE, database)
    project.register(f"{DATABASE_PREFIX}openmoji", database, alias="trial")
    project.register(GENERATOR_NAME, project.folder("generator")[0])
    registered = "registered: knn-database.openmoji@trial, knn-database.twemoji@champion"
    for reference, looked_up in (
        ("twemoij", "models:/knn-database.twemoij@champion"),
        ("openmoji", "models:/knn-database.openmoji@champion"),
        (f"models:/{DATABASE}@challenger", f"models:/{DATABASE}@challenger"),
        (f"models:/{DATABASE}/2", f"models:/{DATABASE}/2"),
    ):
        message = project.refusal(reference, kind="database")
        assert message == f"no database is registered as {looked_up} at {store}; {registered}"
    assert project.refusal("knn-difusion", kind="generator").endswith("registered: knn-diffusion@champion")


@pytest.mark.parametrize("reference", ["models:/twemoji", "models:/a@b@c", "models:/a/b/c", "models:/", "models:/a/v1"])
def test_pull_of_a_malformed_uri_names_the_valid_forms(reference: str, project: Project) -> None:
    assert project.refusal(reference, kind="database") == (
        f"not an MLflow model URI: {reference}; use models:/NAME@ALIAS or models:/NAME/VERSION"
    )


def test_pull_of_an_uncommitted_folder_or_another_kind_raises_not_found_error(project: Project, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    for folder in (tmp_path / "half", tmp_path / "none"):
        message = f"{folder} holds no committed database: there is no manifest.json in it"
        assert project.refusal(str(folder), kind="database") == message
    uri, _ = project.folder("generator")
    assert project.refusal(uri, kind="database") == f"{uri} holds generator, not a database"
    project.register(GENERATOR_NAME, uri)
    assert project.refusal(f"models:/{GENERATOR_NAME}/1", kind="database") == f"{uri} holds generator, not a database"


def test_pull_of_a_database_changed_after_registration_raises_integrity_error(project: Project) -> None:
    uri, _ = project.folder(rows=3)
    project.register(DATABASE, uri)
    manifest = Path(uri, "manifest.json")
    original = manifest.read_bytes()

    stage = artifacts.ArtifactBuilder(f"{project.settings.root}/twemoji", "database", inputs={}, config={"rows": 3})
    assert stage.uri == uri
    fill(stage, rows=7)  # valid, but other content
    for reference in ("twemoji", f"models:/{DATABASE}/1"):
        with pytest.raises(IntegrityError) as caught:
            project.registry.pull(reference, kind="database")
        full = reference if "/" in reference else f"models:/{DATABASE}@champion"
        assert str(caught.value) == (f"{uri} changed after {full} was registered; restore it or register it again")

    manifest.write_text(json.dumps({**json.loads(original), "rows": 4}))
    with pytest.raises(IntegrityError, match=r"manifest\.json was changed after it was committed"):
        project.registry.pull("twemoji", kind="database")

    manifest.write_bytes(original)
    assert project.registry.pull("twemoji", kind="database").manifest.rows == 3
    shutil.rmtree(uri)
    assert project.refusal("twemoji", kind="database").startswith(f"{uri} has no manifest.json")
