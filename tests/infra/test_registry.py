"""Tests of the model registry: register versions, move aliases, and list versions with their tags."""

import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from support.registry_project import DATABASE, Project, answer, fill, names_and_aliases

from infra import artifacts, tracking
from infra.errors import IntegrityError, NotFoundError, TransientError
from infra.registry_tags import DATABASE_PREFIX, GENERATOR_NAME

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # MLflow's advice on type hints and examples


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


def test_register_of_an_uncommitted_folder_raises_not_found_error(project: Project, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none has no manifest\.json: it is not a committed artifact"):
        project.register(DATABASE, str(tmp_path / "none"))
    assert project.registry.versions("database") == []


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
