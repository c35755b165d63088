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
from infra.registry import DATABASE_PREFIX, GENERATOR_NAME, RegisteredVersion, Registry
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


class Line:
    """A registry, and a production line before it."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.registry = settings, Registry(settings)
        self._script = folder / "script.py"
        self._script.write_text(SCRIPT)

    def folder(self, kind: str = "database", *, rows: int = 3, base: str | None = None) -> tuple[str, Manifest]:
        """A committed folder."""
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
def line(mlflow_settings: Settings, tmp_path: Path) -> Line:
    return Line(mlflow_settings, tmp_path)


def named(versions: list[dict[str, Any]]) -> list[tuple[str, int, list[str]]]:
    return [(entry["name"], entry["version"], entry["aliases"]) for entry in versions]


def test_a_registered_database_is_found_by_every_name(line: Line) -> None:
    uri, manifest = line.folder()
    registered = line.register(DATABASE, uri, tags={"encoder": "tiny", "rows": "3"})
    assert registered == RegisteredVersion(
        name=DATABASE,
        version=1,
        uri=f"models:/{DATABASE}/1",
        alias_uri=f"models:/{DATABASE}@champion",
        existed=False,
    )
    for reference in ("twemoji", DATABASE, registered.uri, registered.alias_uri):
        pulled = line.registry.pull(reference, kind="database")
        assert (pulled.folder_uri, pulled.manifest) == (uri, manifest)
        assert (pulled.name, pulled.version) == (DATABASE, 1)
    (version,) = line.registry.versions("database")
    assert version["created_ms"] > 1_700_000_000_000
    expected = {"encoder": "tiny", "rows": 3, "digest": manifest.digest, "uri": uri, "aliases": ["champion"]}
    assert version.items() >= {"name": DATABASE, "version": 1, **expected}.items()


def test_a_folder_is_pulled_registered_or_not(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, manifest = line.folder()
    monkeypatch.chdir(tmp_path)
    for reference in (uri, f"{uri}/", f"file://{uri}", str(Path(uri).relative_to(tmp_path))):
        pulled = line.registry.pull(reference, kind="database")
        assert (pulled.folder_uri, pulled.manifest) == (uri, manifest)
        assert (pulled.local, pulled.name, pulled.version) == (None, None, None)


def test_pulling_writes_nothing_where_mlflow_keeps_the_files_on_this_machine(line: Line) -> None:
    """They may lie where this process only reads."""
    line.register(DATABASE, line.folder()[0])
    line.register(GENERATOR_NAME, line.folder("generator")[0])
    kept = Path(line.settings.artifacts_uri)
    before = sorted(kept.rglob("*"))
    assert any(path.name == artifacts.MANIFEST for path in before)
    for name, kind in (("twemoji", "database"), (GENERATOR_NAME, "generator")):
        pulled = line.registry.pull(name, kind=kind)
        assert pulled.local is not None
        assert (pulled.local / "artifacts" / artifacts.MANIFEST) in before
    assert sorted(kept.rglob("*")) == before
    for path in kept.rglob(artifacts.MANIFEST):
        path.unlink()
    with pytest.raises(IntegrityError, match=r"^the files of models:/.*/1 are missing from /.*; register it again$"):
        line.registry.pull(GENERATOR_NAME, kind="generator")


def test_a_remote_folder_is_registered_and_pulled(line: Line, bucket: Bucket) -> None:
    uri, manifest = line.folder(base=f"{bucket.uri}/twemoji")
    assert line.registry.pull(uri, kind="database").manifest == manifest
    line.register(DATABASE, uri)
    pulled = line.registry.pull("twemoji", kind="database")
    assert (pulled.folder_uri, pulled.manifest) == (uri, manifest)
    assert line.refusal(f"{bucket.uri}/nothing", kind="database") == (
        f"{bucket.uri}/nothing holds no committed database: there is no manifest.json in it"
    )


def test_registered_files_live_in_an_object_store_and_its_refusal_is_told(
    mlflow_settings: Settings, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = mlflow_settings.model_copy(update={"artifacts": f"{bucket.uri}/mlflow", "cache": tmp_path / "cache"})
    line = Line(settings, tmp_path)
    (tmp_path / "words.txt").write_text("three words here")
    uri, manifest = line.folder("generator", base=f"{bucket.uri}/twemoji")
    line.register(GENERATOR_NAME, uri, files={"words": tmp_path / "words.txt"})
    assert any(key.startswith("mlflow/") and key.endswith("/words.txt") for key in list(bucket.keys()))
    pulled = line.registry.pull(GENERATOR_NAME, kind="generator")
    assert pulled.manifest == manifest
    assert pulled.local is not None
    assert (pulled.local / "artifacts/words.txt").read_text() == "three words here"
    other, _ = line.folder("generator", rows=4)
    with bucket.store.locked():
        for touch in (
            lambda: line.registry.pull(GENERATOR_NAME, kind="generator"),
            lambda: line.register(GENERATOR_NAME, other),
        ):
            with pytest.raises(KNNDiffusionError) as caught:
                touch()
            assert "\n" not in str(caught.value)
            assert f"{bucket.uri}/mlflow" in str(caught.value) or "cannot be fetched" in str(caught.value)


def test_pulling_from_an_object_store_leaves_what_the_cache_keeps_alone(
    mlflow_settings: Settings, moto_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, cache = tmp_path / "temporary", tmp_path / "cache"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    line = Line(mlflow_settings.model_copy(update={"artifacts": f"{moto_bucket.uri}/mlflow", "cache": cache}), tmp_path)
    line.register(DATABASE, line.folder()[0])
    pulled = line.registry.pull("twemoji", kind="database")
    assert (pulled.manifest.rows, pulled.local) == (3, None)

    uri, manifest = line.folder("generator")
    line.register(GENERATOR_NAME, uri, files={"00000.faiss": Path(uri, "00000.faiss")})
    local = line.registry.pull(GENERATOR_NAME, kind="generator").local
    assert local == cache / "registered" / manifest.digest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow.artifacts, "download_artifacts", lambda **_: pytest.fail("it is there already"))
        assert line.registry.pull(GENERATOR_NAME, kind="generator").local == local
    for name, damage in itertools.product(("00000.faiss", "manifest.json"), (b"damaged", None)):
        (local / "artifacts" / name).unlink()
        if damage is not None:
            (local / "artifacts" / name).write_bytes(damage)
        assert line.registry.pull(GENERATOR_NAME, kind="generator").local == local
        assert (local / "artifacts/00000.faiss").read_bytes() == b"index" * 3
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("kind", ["database", "generator"])
def test_files_that_cannot_be_fetched_now_are_not_said_to_be_lost(
    kind: str, mlflow_settings: Settings, moto_bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"artifacts": f"{moto_bucket.uri}/mlflow", "cache": tmp_path / "cache"}
    line = Line(mlflow_settings.model_copy(update=changes), tmp_path)
    name = DATABASE if kind == "database" else GENERATOR_NAME
    line.register(name, line.folder(kind)[0])

    def away(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("reset by peer")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(S3ArtifactRepository, "_download_file", away)
        with pytest.raises(TransientError, match=r"^the files of models:/.*/1 cannot be fetched .*; check that .*$"):
            line.registry.pull(f"models:/{name}/1", kind=kind)
    with monkeypatch.context() as patch:
        patch.setattr(S3ArtifactRepository, "_download_file", full)
        with pytest.raises(StageError, match=r"^no space left for "):
            line.registry.pull(f"models:/{name}/1", kind=kind)
    for key in list(moto_bucket.keys()):
        moto_bucket.delete(key)
    with pytest.raises(IntegrityError, match=r"^the files of models:/.*/1 cannot be fetched .*; register it again$"):
        line.registry.pull(f"models:/{name}/1", kind=kind)


@pytest.mark.parametrize("call", ["search_model_versions", "set_model_version_tag", "set_registered_model_alias"])
def test_a_registry_that_is_away_for_a_moment_is_asked_again_and_registers_once(
    call: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, _ = line.folder()
    line.register(DATABASE, uri)

    def away(*_: Any, **__: Any) -> None:
        raise MlflowException("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, call, away)
        with pytest.raises(TransientError, match=r"^MLflow at .* does not answer: database is locked$"):
            line.register(DATABASE, uri, tags={"rows": "3"})
    assert line.register(DATABASE, uri).existed
    assert len(line.registry.versions("database")) == 1


def test_the_same_content_is_found_again_not_registered_twice(line: Line) -> None:
    uri, manifest = line.folder()
    first = line.register(DATABASE, uri, tags={"recall": "0.90", "encoder": "tiny"})
    again = line.register(DATABASE, uri, tags={"recall": "0.95"})
    assert (first.existed, again.existed) == (False, True)
    assert (again.version, again.uri) == (1, first.uri)
    (version,) = line.registry.versions("database")
    assert (version["recall"], version["encoder"], version["digest"]) == ("0.95", "tiny", manifest.digest)
    other = line.register(f"{DATABASE_PREFIX}copy", uri)  # under another name it is another model
    assert (other.existed, other.version) == (False, 1)


def test_the_same_content_in_another_folder_is_another_version(line: Line, tmp_path: Path) -> None:
    uri, manifest = line.folder()
    stage = artifacts.ArtifactBuilder(
        f"{line.settings.root}/twemoji", "database", inputs={}, config={"rows": 3, "nprobe": 9}
    )
    assert fill(stage, rows=3).digest == manifest.digest
    assert line.register(DATABASE, uri, tags={"recall": "0.90"}).version == 1
    assert line.register(DATABASE, stage.uri, tags={"recall": "0.99"}).version == 2
    assert [(one["uri"], one["recall"]) for one in line.registry.versions("database")] == [
        (uri, "0.90"), (stage.uri, "0.99")
    ]  # fmt: skip
    assert line.registry.pull(f"models:/{DATABASE}/1", kind="database").folder_uri == uri
    assert line.registry.pull("twemoji", kind="database").folder_uri == stage.uri
    (tmp_path / "link").symlink_to(uri)
    assert line.register(DATABASE, str(tmp_path / "link")).version == 1  # another spelling is no other folder
    assert line.registry.pull(f"models:/{DATABASE}/1", kind="database").folder_uri == uri


def test_the_alias_moves_to_what_is_registered_last(line: Line) -> None:
    first_uri, first = line.folder(rows=3)
    second_uri, second = line.folder(rows=4)
    line.register(DATABASE, first_uri)
    assert line.register(DATABASE, second_uri).version == 2
    assert line.registry.pull("twemoji", kind="database").manifest == second
    assert line.registry.pull(f"models:/{DATABASE}/1", kind="database").manifest == first
    assert named(line.registry.versions("database")) == [(DATABASE, 1, []), (DATABASE, 2, ["champion"])]

    assert line.register(DATABASE, first_uri).existed  # registering the old one again brings it back
    assert line.registry.pull("twemoji", kind="database").version == 1
    assert named(line.registry.versions("database")) == [(DATABASE, 1, ["champion"]), (DATABASE, 2, [])]


def test_an_alias_that_goes_back_to_an_older_version_is_told(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    uris = [line.folder(rows=rows)[0] for rows in (3, 4)]
    with caplog.at_level("WARNING", logger="knn_diffusion"):
        for uri, rows in ((uris[0], "3"), (uris[1], "4"), (uris[1], "4")):
            line.register(DATABASE, uri, tags={"rows": rows})
        line.register(DATABASE, uris[0], tags={"rows": "3"}, alias="other")
        assert not caplog.messages
        line.register(DATABASE, uris[0], tags={"rows": "3"})
    (told,) = caplog.messages
    assert told.endswith(f"{DATABASE}@champion moves back from version 2 (4 rows) to version 1 (3 rows)")
    assert line.registry.pull("twemoji", kind="database").version == 1


def test_other_aliases_and_none_leave_the_champion(line: Line) -> None:
    uris = [line.folder(rows=rows)[0] for rows in (3, 4, 5)]
    line.register(DATABASE, uris[0])
    assert line.register(DATABASE, uris[1], alias="challenger").alias_uri == f"models:/{DATABASE}@challenger"
    line.register(DATABASE, uris[2], alias=None)
    aliases = [(DATABASE, 1, ["champion"]), (DATABASE, 2, ["challenger"]), (DATABASE, 3, [])]
    assert named(line.registry.versions("database")) == aliases
    assert line.registry.pull("twemoji", kind="database").manifest.rows == 3
    assert line.registry.pull(f"models:/{DATABASE}@challenger", kind="database").manifest.rows == 4


def test_a_version_loads_with_its_settings_and_files(line: Line, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/words.txt").write_text("three words here")
    uri, manifest = line.folder("generator", rows=5)
    registered = line.register(GENERATOR_NAME, uri, files={"words": tmp_path / "kept"})
    shutil.rmtree(tmp_path / "kept")
    shutil.rmtree(uri)  # a generator carries what it needs
    assert answer(registered.uri, "cat") == "hello cat: 5 rows, three words here"
    assert answer(registered.alias_uri, "dog") == "hello dog: 5 rows, three words here"

    pulled = line.registry.pull(GENERATOR_NAME, kind="generator")
    assert (pulled.folder_uri, pulled.manifest, pulled.version) == (uri, manifest, 1)
    assert pulled.local is not None
    (words,) = pulled.local.rglob("words.txt")
    assert words.read_text() == "three words here"


def test_a_version_belongs_to_the_run_that_made_it(line: Line) -> None:
    uri, _ = line.folder()
    with tracking.start_run(line.settings, experiment="twemoji", name="index") as run:
        registered = line.register(DATABASE, uri, run_id=run.run_id)
        run.log(step=1, values={"recall": 0.5})  # which goes on
    version = mlflow.MlflowClient().get_model_version(DATABASE, str(registered.version))
    assert version.run_id == run.run_id
    assert answer(registered.uri, "cat") == "hello cat: 3 rows, none"
    finished = mlflow.MlflowClient().get_run(run.run_id)
    assert (finished.info.status, finished.data.metrics) == ("FINISHED", {"recall": 0.5})


def test_kinds_are_listed_apart_and_in_order(line: Line) -> None:
    database, _ = line.folder()
    generator, _ = line.folder("generator")
    assert line.registry.versions("database") == line.registry.versions("generator") == []
    for name in ("zebras", "ants"):
        line.register(DATABASE_PREFIX + name, database)
    line.register(GENERATOR_NAME, generator)
    assert named(line.registry.versions("database")) == [
        ("knn-database.ants", 1, ["champion"]),
        ("knn-database.zebras", 1, ["champion"]),
    ]
    assert named(line.registry.versions("generator")) == [("knn-diffusion", 1, ["champion"])]


def test_what_a_search_finds_on_further_pages_is_listed_and_found_again(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [line.folder(rows=rows)[0] for rows in (3, 4)]
    for name in ("ants", "bees", "cats"):
        line.register(DATABASE_PREFIX + name, uris[0])
    line.register(f"{DATABASE_PREFIX}cats", uris[1])
    for search in ("search_registered_models", "search_model_versions"):
        whole = getattr(mlflow.MlflowClient, search)

        def one_a_page(*given: Any, whole: Any = whole, **asked: Any) -> Any:
            return whole(*given, **{**asked, "max_results": 1})

        monkeypatch.setattr(mlflow.MlflowClient, search, one_a_page)
    assert named(line.registry.versions("database")) == [
        ("knn-database.ants", 1, ["champion"]),
        ("knn-database.bees", 1, ["champion"]),
        ("knn-database.cats", 1, []),
        ("knn-database.cats", 2, ["champion"]),
    ]
    assert [line.register(f"{DATABASE_PREFIX}cats", uri).version for uri in uris] == [1, 2]


def test_a_wrong_name_lists_what_there_is(line: Line) -> None:
    store = line.settings.tracking_uri
    assert line.refusal("twemoij", kind="database") == (
        f"no database is registered as models:/knn-database.twemoij@champion at {store}; registered: none"
    )
    database, _ = line.folder()
    line.register(DATABASE, database)
    line.register(f"{DATABASE_PREFIX}openmoji", database, alias="trial")
    line.register(GENERATOR_NAME, line.folder("generator")[0])
    there = "registered: knn-database.openmoji@trial, knn-database.twemoji@champion"
    for reference, looked_up in (
        ("twemoij", "models:/knn-database.twemoij@champion"),
        ("openmoji", "models:/knn-database.openmoji@champion"),
        (f"models:/{DATABASE}@challenger", f"models:/{DATABASE}@challenger"),
        (f"models:/{DATABASE}/2", f"models:/{DATABASE}/2"),
    ):
        message = line.refusal(reference, kind="database")
        assert message == f"no database is registered as {looked_up} at {store}; {there}"
    assert line.refusal("knn-difusion", kind="generator").endswith("registered: knn-diffusion@champion")


@pytest.mark.parametrize("reference", ["models:/twemoji", "models:/a@b@c", "models:/a/b/c", "models:/", "models:/a/v1"])
def test_a_uri_of_another_form_is_told_the_right_one(reference: str, line: Line) -> None:
    assert line.refusal(reference, kind="database") == (
        f"not an MLflow model URI: {reference}; use models:/NAME@ALIAS or models:/NAME/VERSION"
    )


def test_a_folder_that_is_not_committed_or_of_another_kind_is_refused(line: Line, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    for folder in (tmp_path / "half", tmp_path / "none"):
        message = f"{folder} holds no committed database: there is no manifest.json in it"
        assert line.refusal(str(folder), kind="database") == message
    uri, _ = line.folder("generator")
    assert line.refusal(uri, kind="database") == f"{uri} holds generator, not a database"
    line.register(GENERATOR_NAME, uri)
    assert line.refusal(f"models:/{GENERATOR_NAME}/1", kind="database") == f"{uri} holds generator, not a database"


def test_only_committed_folders_are_registered(line: Line, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none has no manifest\.json: it is not a committed artifact"):
        line.register(DATABASE, str(tmp_path / "none"))
    assert line.registry.versions("database") == []


def test_a_database_that_changed_since_it_was_registered_is_refused(line: Line) -> None:
    uri, _ = line.folder(rows=3)
    line.register(DATABASE, uri)
    manifest = Path(uri, "manifest.json")
    whole = manifest.read_bytes()

    stage = artifacts.ArtifactBuilder(f"{line.settings.root}/twemoji", "database", inputs={}, config={"rows": 3})
    assert stage.uri == uri
    fill(stage, rows=7)  # well formed, but other content
    for reference in ("twemoji", f"models:/{DATABASE}/1"):
        with pytest.raises(IntegrityError) as caught:
            line.registry.pull(reference, kind="database")
        full = reference if "/" in reference else f"models:/{DATABASE}@champion"
        assert str(caught.value) == (f"{uri} changed after {full} was registered; restore it or register it again")

    manifest.write_text(json.dumps({**json.loads(whole), "rows": 4}))
    with pytest.raises(IntegrityError, match=r"manifest\.json was changed after it was committed"):
        line.registry.pull("twemoji", kind="database")

    manifest.write_bytes(whole)
    assert line.registry.pull("twemoji", kind="database").manifest.rows == 3
    shutil.rmtree(uri)
    assert line.refusal("twemoji", kind="database").startswith(f"{uri} has no manifest.json")


def test_a_domain_may_have_dots_and_dashes(line: Line) -> None:
    uri, manifest = line.folder()
    registered = line.register(f"{DATABASE_PREFIX}my-site.2026_v1", uri)
    assert line.registry.pull("my-site.2026_v1", kind="database").manifest == manifest
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
def test_version_with_a_tag_of_another_type_is_refused_in_one_line(tag: str, value: str, line: Line) -> None:
    line.register(DATABASE, line.folder()[0])
    line.registry.tag(DATABASE, 1, tag, value)
    with pytest.raises(IntegrityError) as caught:
        line.registry.versions("database")
    message = str(caught.value)
    assert message.startswith(f"models:/{DATABASE}/1 has an unusable tag {tag}: ")
    assert message.endswith("; register it again")
    assert message.isprintable()
    assert len(message) < 400


def test_tags_do_not_stand_in_for_the_fields_of_a_version(line: Line) -> None:
    line.register(DATABASE, line.folder()[0])
    for tag in ("name", "version", "aliases", "created_ms"):
        line.registry.tag(DATABASE, 1, tag, "../x")
    (version,) = line.registry.versions("database")
    assert (version["name"], version["version"], version["aliases"]) == (DATABASE, 1, ["champion"])


def test_pull_of_a_generator_whose_digest_is_a_path_deletes_nothing(
    mlflow_settings: Settings, moto_bucket: Bucket, tmp_path: Path
) -> None:
    documents, cache = victim(tmp_path / "Documents"), tmp_path / "cache"
    line = Line(mlflow_settings.model_copy(update={"artifacts": f"{moto_bucket.uri}/mlflow", "cache": cache}), tmp_path)
    line.register(GENERATOR_NAME, line.folder("generator")[0])
    line.registry.tag(GENERATOR_NAME, 1, "digest", "../../Documents")  # from <cache>/fetching
    with pytest.raises(IntegrityError, match=r"unusable tag digest: .*; register it again$"):
        line.registry.pull(GENERATOR_NAME, kind="generator")
    assert is_untouched(documents)
