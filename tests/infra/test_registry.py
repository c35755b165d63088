"""Tests of the model registry: register, pull, aliases, tags and failures of its stores."""

import errno
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository
from mlflow.types import ColSpec, DataType, Schema
from support.hostile import is_untouched, victim
from support.object_stores import Bucket

from infra import artifacts, storage, tracking
from infra.artifacts import Manifest
from infra.errors import IntegrityError, KNNDiffusionError, NotFoundError, StageError, TransientError
from infra.registry import RegisteredVersion, Registry
from infra.registry_tags import DATABASE_PREFIX, GENERATOR_NAME
from infra.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # MLflow's advice on type hints and examples
DATABASE = f"{DATABASE_PREFIX}twemoji"
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "prompt")]), outputs=Schema([ColSpec(DataType.string, "answer")])
)
SCRIPT = """
import json
from pathlib import Path

import mlflow
import pandas as pd


class Model(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.rows = json.loads(Path(context.artifacts["manifest"]).read_text())["rows"]
        words = context.artifacts.get("words")
        self.words = Path(words, "words.txt").read_text() if words else "none"
        self.greeting = context.model_config["greeting"]

    def predict(self, context, model_input: pd.DataFrame, params=None):
        return [f"{self.greeting} {prompt}: {self.rows} rows, {self.words}" for prompt in model_input["prompt"]]


mlflow.models.set_model(Model())
"""


class Project:
    """Registry and root of a project, with helpers that commit and register folders."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.registry = settings, Registry(settings)
        self._script = folder / "script.py"
        self._script.write_text(SCRIPT)

    def folder(self, kind: str = "database", *, rows: int = 3, base: str | None = None) -> tuple[str, Manifest]:
        """Commit a folder and return its URI and manifest."""
        stage = artifacts.ArtifactBuilder(
            base or f"{self.settings.root}/twemoji", kind, inputs={}, config={"rows": rows}
        )
        return stage.uri, fill(stage, rows)

    def register(self, name: str, folder_uri: str, **changes: Any) -> RegisteredVersion:
        arguments: dict[str, Any] = {"tags": {}, "model_config": {"greeting": "hello"}, **changes}
        return self.registry.register(name, folder_uri, script=self._script, signature=SIGNATURE, **arguments)

    def refusal(self, reference: str, *, kind: str) -> str:
        with pytest.raises(NotFoundError) as caught:
            self.registry.pull(reference, kind=kind)
        assert "\n" not in str(caught.value)
        return str(caught.value)


def fill(stage: artifacts.ArtifactBuilder, rows: int) -> Manifest:
    with storage.scratch() as scratch:
        (scratch / "00000.faiss").write_bytes(b"index" * rows)
        shard = artifacts.commit_shard(stage.uri, "00000", scratch, rows=rows, info={})
    return stage.commit([shard], info={})


def answer(uri: str, prompt: str) -> str:
    return str(mlflow.pyfunc.load_model(uri).predict(pd.DataFrame({"prompt": [prompt]}))[0])


@pytest.fixture
def project(mlflow_settings: Settings, tmp_path: Path) -> Project:
    return Project(mlflow_settings, tmp_path)


def names_and_aliases(versions: list[dict[str, Any]]) -> list[tuple[str, int, list[str]]]:
    return [(entry["name"], entry["version"], entry["aliases"]) for entry in versions]


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


@pytest.mark.parametrize("call", ["search_model_versions", "set_model_version_tag", "set_registered_model_alias"])
def test_register_again_after_a_transient_error_registers_once(
    call: str, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, _ = project.folder()
    project.register(DATABASE, uri)

    def fail(*_: Any, **__: Any) -> None:
        raise MlflowException("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, call, fail)
        with pytest.raises(TransientError, match=r"^MLflow at .* does not answer: database is locked$"):
            project.register(DATABASE, uri, tags={"rows": "3"})
    assert project.register(DATABASE, uri).existed
    assert len(project.registry.versions("database")) == 1


def test_register_of_the_same_folder_reuses_the_version(project: Project) -> None:
    uri, manifest = project.folder()
    first = project.register(DATABASE, uri, tags={"recall": "0.90", "encoder": "tiny"})
    again = project.register(DATABASE, uri, tags={"recall": "0.95"})
    assert (first.existed, again.existed) == (False, True)
    assert (again.version, again.uri) == (1, first.uri)
    (version,) = project.registry.versions("database")
    assert (version["recall"], version["encoder"], version["digest"]) == ("0.95", "tiny", manifest.digest)
    other = project.register(f"{DATABASE_PREFIX}copy", uri)  # another name is another model
    assert (other.existed, other.version) == (False, 1)


def test_register_of_equal_content_in_another_folder_creates_a_version(project: Project, tmp_path: Path) -> None:
    uri, manifest = project.folder()
    stage = artifacts.ArtifactBuilder(
        f"{project.settings.root}/twemoji", "database", inputs={}, config={"rows": 3, "nprobe": 9}
    )
    assert fill(stage, rows=3).digest == manifest.digest
    assert project.register(DATABASE, uri, tags={"recall": "0.90"}).version == 1
    assert project.register(DATABASE, stage.uri, tags={"recall": "0.99"}).version == 2
    assert [(one["uri"], one["recall"]) for one in project.registry.versions("database")] == [
        (uri, "0.90"), (stage.uri, "0.99")
    ]  # fmt: skip
    assert project.registry.pull(f"models:/{DATABASE}/1", kind="database").folder_uri == uri
    assert project.registry.pull("twemoji", kind="database").folder_uri == stage.uri
    (tmp_path / "link").symlink_to(uri)
    assert project.register(DATABASE, str(tmp_path / "link")).version == 1  # a link to a folder is the same folder
    assert project.registry.pull(f"models:/{DATABASE}/1", kind="database").folder_uri == uri


def test_register_moves_the_alias_to_the_last_registered_version(project: Project) -> None:
    first_uri, first = project.folder(rows=3)
    second_uri, second = project.folder(rows=4)
    project.register(DATABASE, first_uri)
    assert project.register(DATABASE, second_uri).version == 2
    assert project.registry.pull("twemoji", kind="database").manifest == second
    assert project.registry.pull(f"models:/{DATABASE}/1", kind="database").manifest == first
    assert names_and_aliases(project.registry.versions("database")) == [(DATABASE, 1, []), (DATABASE, 2, ["champion"])]

    assert project.register(DATABASE, first_uri).existed  # moves the alias back
    assert project.registry.pull("twemoji", kind="database").version == 1
    assert names_and_aliases(project.registry.versions("database")) == [(DATABASE, 1, ["champion"]), (DATABASE, 2, [])]


def test_register_of_an_older_version_logs_that_the_alias_moves_back(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    uris = [project.folder(rows=rows)[0] for rows in (3, 4)]
    with caplog.at_level("WARNING", logger="knn_diffusion"):
        for uri, rows in ((uris[0], "3"), (uris[1], "4"), (uris[1], "4")):
            project.register(DATABASE, uri, tags={"rows": rows})
        project.register(DATABASE, uris[0], tags={"rows": "3"}, alias="other")
        assert not caplog.messages
        project.register(DATABASE, uris[0], tags={"rows": "3"})
    (message,) = caplog.messages
    assert message.endswith(f"{DATABASE}@champion moves back from version 2 (4 rows) to version 1 (3 rows)")
    assert project.registry.pull("twemoji", kind="database").version == 1


def test_register_with_another_alias_or_none_keeps_the_champion(project: Project) -> None:
    uris = [project.folder(rows=rows)[0] for rows in (3, 4, 5)]
    project.register(DATABASE, uris[0])
    assert project.register(DATABASE, uris[1], alias="challenger").alias_uri == f"models:/{DATABASE}@challenger"
    project.register(DATABASE, uris[2], alias=None)
    aliases = [(DATABASE, 1, ["champion"]), (DATABASE, 2, ["challenger"]), (DATABASE, 3, [])]
    assert names_and_aliases(project.registry.versions("database")) == aliases
    assert project.registry.pull("twemoji", kind="database").manifest.rows == 3
    assert project.registry.pull(f"models:/{DATABASE}@challenger", kind="database").manifest.rows == 4


def test_register_with_files_and_settings_creates_a_loadable_version(project: Project, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/words.txt").write_text("three words here")
    uri, manifest = project.folder("generator", rows=5)
    registered = project.register(GENERATOR_NAME, uri, files={"words": tmp_path / "files"})
    shutil.rmtree(tmp_path / "files")
    shutil.rmtree(uri)  # a registered generator contains all it needs
    assert answer(registered.uri, "cat") == "hello cat: 5 rows, three words here"
    assert answer(registered.alias_uri, "dog") == "hello dog: 5 rows, three words here"

    pulled = project.registry.pull(GENERATOR_NAME, kind="generator")
    assert (pulled.folder_uri, pulled.manifest, pulled.version) == (uri, manifest, 1)
    assert pulled.local is not None
    (words,) = pulled.local.rglob("words.txt")
    assert words.read_text() == "three words here"


def test_register_with_a_run_id_links_the_run(project: Project) -> None:
    uri, _ = project.folder()
    with tracking.start_run(project.settings, experiment="twemoji", name="index") as run:
        registered = project.register(DATABASE, uri, run_id=run.run_id)
        run.log(step=1, values={"recall": 0.5})  # registering does not end the run
    version = mlflow.MlflowClient().get_model_version(DATABASE, str(registered.version))
    assert version.run_id == run.run_id
    assert answer(registered.uri, "cat") == "hello cat: 3 rows, none"
    finished = mlflow.MlflowClient().get_run(run.run_id)
    assert (finished.info.status, finished.data.metrics) == ("FINISHED", {"recall": 0.5})


def test_versions_lists_one_kind_in_order(project: Project) -> None:
    database, _ = project.folder()
    generator, _ = project.folder("generator")
    assert project.registry.versions("database") == project.registry.versions("generator") == []
    for name in ("zebras", "ants"):
        project.register(DATABASE_PREFIX + name, database)
    project.register(GENERATOR_NAME, generator)
    assert names_and_aliases(project.registry.versions("database")) == [
        ("knn-database.ants", 1, ["champion"]),
        ("knn-database.zebras", 1, ["champion"]),
    ]
    assert names_and_aliases(project.registry.versions("generator")) == [("knn-diffusion", 1, ["champion"])]


def test_versions_and_register_read_all_pages_of_a_search(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [project.folder(rows=rows)[0] for rows in (3, 4)]
    for name in ("ants", "bees", "cats"):
        project.register(DATABASE_PREFIX + name, uris[0])
    project.register(f"{DATABASE_PREFIX}cats", uris[1])
    for search in ("search_registered_models", "search_model_versions"):
        search_all = getattr(mlflow.MlflowClient, search)

        def one_per_page(*args: Any, search_all: Any = search_all, **kwargs: Any) -> Any:
            return search_all(*args, **{**kwargs, "max_results": 1})

        monkeypatch.setattr(mlflow.MlflowClient, search, one_per_page)
    assert names_and_aliases(project.registry.versions("database")) == [
        ("knn-database.ants", 1, ["champion"]),
        ("knn-database.bees", 1, ["champion"]),
        ("knn-database.cats", 1, []),
        ("knn-database.cats", 2, ["champion"]),
    ]
    assert [project.register(f"{DATABASE_PREFIX}cats", uri).version for uri in uris] == [1, 2]


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


def test_register_of_an_uncommitted_folder_raises_not_found_error(project: Project, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none has no manifest\.json: it is not a committed artifact"):
        project.register(DATABASE, str(tmp_path / "none"))
    assert project.registry.versions("database") == []


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


def test_register_and_pull_accept_dots_and_dashes_in_a_domain(project: Project) -> None:
    uri, manifest = project.folder()
    registered = project.register(f"{DATABASE_PREFIX}my-site.2026_v1", uri)
    assert project.registry.pull("my-site.2026_v1", kind="database").manifest == manifest
    assert answer(registered.alias_uri, "cat") == "hello cat: 3 rows, none"


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("rows", "many"),
        ("rows", "-1"),
        ("rows", "9" * 5000),
        ("bytes", "1e3"),
        ("recall_at_10_image", "high"),
        ("digest", "../../Documents"),
        ("uri", "s3://b/a\nb"),
    ],
)
def test_versions_with_an_invalid_tag_raises_error_of_one_line(tag: str, value: str, project: Project) -> None:
    project.register(DATABASE, project.folder()[0])
    project.registry.tag(DATABASE, 1, tag, value)
    with pytest.raises(IntegrityError) as caught:
        project.registry.versions("database")
    message = str(caught.value)
    assert message.startswith(f"models:/{DATABASE}/1 has an unusable tag {tag}: ")
    assert message.endswith("; register it again")
    assert message.isprintable()
    assert len(message) < 400


def test_versions_with_tags_named_like_fields_keeps_the_fields(project: Project) -> None:
    project.register(DATABASE, project.folder()[0])
    for tag in ("name", "version", "aliases", "created_ms"):
        project.registry.tag(DATABASE, 1, tag, "../x")
    (version,) = project.registry.versions("database")
    assert (version["name"], version["version"], version["aliases"]) == (DATABASE, 1, ["champion"])


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
