"""Compatibility: what users, stored artifacts and registered models depend on.

``compatibility/pins.json`` holds the facts: stage keys, commands and options, field names. Change it by hand, and only
together with a note to users. ``compatibility/root-0.1`` is a root that release 0.1.0 wrote; see
``compatibility/make_root.py``. Today's code must search it, generate from it, rebuild it and collect its garbage.
"""

import hashlib
import importlib
import inspect
import json
import logging
import os
import pkgutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from compatibility.make_root import FIXTURE, domain, evaluation, png, training
from mlflow.tracking import MlflowClient
from PIL import Image
from typer.testing import CliRunner

from tasks.references.domain_folder import DomainFolder

# Internal interfaces, all of them here: modules may move and functions may be renamed, what they yield may not.
from support.fakes import LoopbackServer, Reply, WithoutRay  # isort: skip
from support.stored_root import FOLDERS, PINS, unpack_root  # isort: skip
from flows.cli import app
from flows.demo.run import report_of
from infra import artifacts, errors
from infra.download.outcomes import ERROR_CLASSES
from infra.formats.webdataset import DUPLICATE, TAKEN_DOWN
from infra.settings import Settings
from model.errors import ModelError
from model.pipeline import KNNDiffusionPipeline
from tasks.download.task import download
from tasks.embed.task import embed
from tasks.evaluate.task import evaluate
from tasks.index.task import index
from tasks.neighbours import find_neighbours
from tasks.references.types import DatabaseVersion, EmbeddingShards, Generator, ImageShards, Neighbours, Takedown
from tasks.train.adopt import adopt
from tasks.train.inputs import TrainingInputs
from tasks.train.task import train

STAGE = artifacts.ArtifactBuilder  # knows the ``kind`` and ``key`` of an output
COMMITTED = "committed_manifest"  # its method that looks an output up
# End of the internal interfaces.

CHECKOUT = Path(__file__).parent.parent
PRETRAINED = CHECKOUT / "model" / "pretrained"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local cache of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KNN_DIFFUSION_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored root, for tests that only read it."""
    return unpack_root(tmp_path_factory.mktemp("stored") / "root")


@pytest.fixture
def root(tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stored root, for flows that write into it; workers run in this process."""
    WithoutRay().install(monkeypatch)
    return unpack_root(tmp_path / "root")


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    with LoopbackServer({"/pink-circle.png": Reply(body=png("/pink-circle.png"))}) as running:
        yield running


def command(root: Path, *arguments: str) -> str:
    """Run a command of the CLI, and return what it prints on standard output."""
    result = CliRunner().invoke(app, [*arguments, "--root", str(root)])
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def search(root: Path, database: str, *options: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(command(root, "search", database, "a green circle", "--json", *options))
    return rows


def file_names(rows: list[dict[str, Any]]) -> set[str]:
    return {row["url"].rpartition("/")[2] for row in rows}


def list_file(path: Path, *urls: str) -> str:
    path.write_text("".join(json.dumps({"url": url}) + "\n" for url in urls))
    return str(path)


def stored_urls(root: Path, name: str) -> list[str]:
    return [json.loads(line)["url"] for line in (root / "lists" / name).read_text().splitlines()]


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# What is written down: the command line, deployments, errors, settings.


def command_line() -> dict[str, Any]:
    """Describe every command: the names of its arguments, and its options with their defaults."""
    commands: dict[str, Any] = {}
    for name, one in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        arguments, options = [], {}
        for parameter in one.params:
            default = None if parameter.default is None else parameter.default
            if parameter.param_type_name == "argument":
                shown = f"{parameter.name}..." if parameter.nargs == -1 else parameter.name
                arguments.append(shown if parameter.required else f"[{shown}]")
            else:
                names = "/".join([*parameter.opts, *parameter.secondary_opts])
                default = str(default) if isinstance(default, Path) else default
                options[names] = "required" if parameter.required else ["repeatable"] if parameter.multiple else default
        commands[name] = {"arguments": arguments, "options": options}
    return commands


def test_command_line_has_the_pinned_commands_and_options() -> None:
    commands = command_line()
    for name, pinned in PINS["command_line"].items():
        assert commands[name]["arguments"] == pinned["arguments"]
        assert pinned["options"].items() <= commands[name]["options"].items(), f"an option of {name} is gone or changed"


def test_entry_points_have_the_pinned_names() -> None:
    scripts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == PINS["scripts"]
    assert all(callable(pkgutil.resolve_name(entry_point)) for entry_point in scripts.values())


def test_deployments_have_the_pinned_names_and_entry_points() -> None:
    listed = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())["deployments"]
    assert {one["name"]: one["entrypoint"] for one in listed}.items() >= PINS["deployments"].items()
    for name, entry_point in PINS["deployments"].items():
        module, _, function = entry_point.replace(".py:", ":").replace("/", ".").partition(":")
        assert getattr(importlib.import_module(module), function).name == name


def test_errors_have_the_pinned_names_and_bases() -> None:
    own = [one for _, one in inspect.getmembers(errors, inspect.isclass) if one.__module__ == errors.__name__]
    assert {one.__name__: one.__base__.__name__ for one in [*own, ModelError]}.items() >= PINS["errors"].items()


def test_error_classes_of_downloads_are_pinned() -> None:
    assert {*ERROR_CLASSES, DUPLICATE, TAKEN_DOWN} >= set(PINS["error_classes"])


def test_settings_read_the_pinned_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PINS["environment"]:
        monkeypatch.delenv(name, raising=False)
    for variable, (attribute, default, text) in PINS["environment"].items():
        assert str(getattr(Settings(), attribute)) == default
        monkeypatch.setenv(variable, text)
        assert str(getattr(Settings(), attribute)) == text
        monkeypatch.delenv(variable)


@pytest.mark.parametrize("name", PINS["generators"])
def test_bundled_generator_opens_with_the_pinned_modules_and_weights(name: str) -> None:
    folder, pinned = PRETRAINED / name / "pipeline", PINS["generators"][name]
    assert json.loads((folder / "model_index.json").read_text()) == pinned["model_index.json"]
    weights = {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*.safetensors")}
    assert weights == pinned["weights"]
    pipeline = KNNDiffusionPipeline.from_pretrained(folder)
    parts = {part: type(getattr(pipeline, part)) for part in ("transformer", "scheduler", "vae")}
    assert {part: f"{one.__module__}.{one.__name__}" for part, one in parts.items()} == pinned["classes"]


# The keys of stages: the same inputs and config must find the folder that an earlier version filled.


class KeyFound(BaseException):
    """Ends a stage as soon as its key is known."""


def _parse(stage: str, config: Any) -> Any:
    """Parse the config of a stage the way Prefect does for a deployment."""
    from flows.new_domain import new_domain

    given = {"domain": "shapes", "urls": "urls.jsonl", stage: config}
    return getattr(new_domain.validate_parameters({"config": given})["config"], stage)


def _stages(root: Path, cache: Path) -> dict[str, Callable[[Any], Any]]:
    """Every stage on the stored artifacts, by the name it has in the pins."""
    base, folders = str(root / "new"), {name: str(root / folder) for name, folder in FOLDERS.items()}
    images, embeddings = ImageShards.open(folders["images"]), EmbeddingShards.open(folders["embeddings"])
    database, neighbours = DatabaseVersion.open(folders["database"]), Neighbours.open(folders["neighbours"])
    generator, takedown = Generator.open(folders["generator"]), Takedown.open(folders["takedown"])
    grown = EmbeddingShards.open(folders["grown embeddings"])
    inputs = TrainingInputs(images=images, embeddings=embeddings, database=database, neighbours=neighbours)

    def run_download(config: Any, urls: str = "plain.jsonl", **options: Any) -> Any:
        return download(
            str(root / "lists" / urls), DomainFolder(uri=base, cache=cache), _parse("download", config), **options
        )

    def run_index(config: Any, rows: EmbeddingShards = embeddings, **options: Any) -> Any:
        return index(rows, DomainFolder(uri=base, cache=cache), _parse("index", config), **options)

    return {
        "download": run_download,
        "download, more": lambda config: run_download(config, "shapes-grown.jsonl", previous=images),
        "download, takedown": lambda config: run_download(config, takedown=takedown),
        "embed": lambda config: embed(images, DomainFolder(uri=base, cache=cache), _parse("embed", config)),
        "index": run_index,
        "index, more": lambda config: run_index(config, grown, previous=database),
        "index, takedown": lambda config: run_index(config, takedown=takedown),
        "neighbours": lambda config: find_neighbours(
            embeddings, database, DomainFolder(uri=base, cache=cache), config["k"]
        ),
        "train": lambda config: train(inputs, DomainFolder(uri=base, cache=cache), _parse("train", config)),
        "adopt": lambda config: adopt(config["generator"], DomainFolder(uri=base)),
        "evaluate": lambda config: evaluate(
            generator, database, DomainFolder(uri=base, cache=cache), _parse("evaluate", config)
        ),
        "evaluate, swap": lambda config: evaluate(
            generator,
            database,
            DomainFolder(uri=base, cache=cache),
            _parse("evaluate", config),
            others={"other": database},
        ),
    }


@pytest.mark.parametrize("pin", PINS["stage_keys"], ids=lambda pin: f"{pin['stage']}-{pin['key'][:6]}")
def test_stage_with_the_pinned_config_has_the_pinned_key(
    pin: dict[str, Any], stored: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_key(stage: Any) -> None:
        raise KeyFound(f"{stage.kind}/{stage.key}")

    stage = _stages(stored, cache)[pin["stage"]]
    monkeypatch.setattr(STAGE, COMMITTED, find_key)
    with pytest.raises(KeyFound) as found:
        stage(pin["config"])
    assert str(found.value) == pin["key"]


# Stored artifacts.


def test_stored_root_is_as_release_0_1_wrote_it() -> None:
    files = {path.relative_to(FIXTURE).as_posix(): path for path in FIXTURE.rglob("*") if path.is_file()}
    listed = "".join(f"{name} {sha256(path)}\n" for name, path in sorted(files.items()))
    assert hashlib.sha256(listed.encode()).hexdigest() == PINS["root"]["sha256"], (
        "a file of tests/compatibility/root-0.1 has changed; restore it, because only release 0.1.0 may write it"
    )


@pytest.mark.parametrize("folder", PINS["manifests"])
def test_stored_manifest_is_read_and_verified(folder: str, stored: Path, tmp_path: Path) -> None:
    manifest, pinned = artifacts.read_manifest(str(stored / folder)), PINS["manifests"][folder]
    assert {name: getattr(manifest, name) for name in ("kind", "key", "rows", "digest", "checksum")} == pinned
    assert folder.split("/")[1:] == [manifest.kind, manifest.key]
    assert STAGE(str(tmp_path), manifest.kind, inputs=manifest.inputs, config=manifest.config).key == manifest.key
    if manifest.kind != "report":  # the fixture has only its manifest
        for shard in manifest.shards:
            for file in shard.files:
                assert sha256(Path(shard.folder or stored / folder) / file.name) == file.sha256

    text = (stored / folder / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace(f'"rows": {manifest.rows}', f'"rows": {manifest.rows + 1}'))
    with pytest.raises(errors.IntegrityError):
        artifacts.read_manifest(str(tmp_path))


def test_stored_registry_has_the_pinned_names_tags_and_aliases(stored: Path) -> None:
    client = MlflowClient(f"sqlite:///{stored}/mlflow.db", f"sqlite:///{stored}/mlflow.db")
    found = {}
    for model in client.search_registered_models():
        versions = client.search_model_versions(f"name='{model.name}'")
        aliases = {alias: int(number) for alias, number in client.get_registered_model(model.name).aliases.items()}
        tags = sorted(versions[0].tags)
        assert all(sorted(version.tags) == tags for version in versions)
        found[model.name] = {"versions": len(versions), "aliases": aliases, "tags": tags}
    assert found == PINS["registry"]


# The stored root, used by today's code.


def test_stored_databases_are_searched(stored: Path) -> None:
    first = search(stored, "models:/knn-database.shapes/2", "--k", "12")
    assert first[0]["url"].endswith("/green-circle.png")
    assert set(first[0]) == set(PINS["search_fields"])
    assert len(first) == 12
    champion = search(stored, "shapes", "--k", "12")
    assert file_names(first) - file_names(champion) == {"green-circle.png"}
    assert search(stored, str(stored / FOLDERS["grown database"]), "--k", "12") == first


@pytest.mark.parametrize(("model", "side"), [("sticker-generator", 64), ("knn-diffusion", 16)])
def test_stored_database_is_generated_from(model: str, side: int, stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "image.png"
    options = ("--steps", "2", "--candidates", "1", "--seed", "1")
    assert command(
        stored, "generate", "a red circle", "--database", "shapes", "--model", model, "--out", str(out), *options
    ) == str(out)
    with Image.open(out) as image:
        assert image.size == (side, side)
        assert len(image.getcolors(side * side) or ()) > 1


def test_registered_models_are_loaded_by_the_scripts_stored_with_them(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KNN_DIFFUSION_ROOT", str(stored))
    mlflow.set_tracking_uri(f"sqlite:///{stored}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{stored}/mlflow.db")
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # set by MLflow; it would affect other tests
    prompts = pd.DataFrame({"prompt": ["a red circle", "a blue square"]})

    database = mlflow.pyfunc.load_model("models:/knn-database.shapes@champion")
    answer = database.predict(prompts, params={"k": 3})
    assert list(answer) == ["prompt", "neighbours"]
    first, second = (json.loads(rows) for rows in answer["neighbours"])
    assert (len(first), len(second)) == (3, 3)
    assert {"score", "key", "url", "sha256", "width", "height"} <= set(first[0])
    assert first[0]["url"].endswith("/red-circle.png")

    generator = mlflow.pyfunc.load_model("models:/knn-diffusion@champion")
    answer = generator.predict(prompts, params={"steps": 1})
    assert list(answer) == ["prompt", "png"]
    assert all(data.startswith(b"\x89PNG") for data in answer["png"])


def test_new_domain_on_the_stored_root_skips_every_stage(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flows.new_domain import new_domain

    look_up = getattr(STAGE, COMMITTED)

    def require(stage: Any) -> Any:
        manifest = look_up(stage)
        if manifest is None:
            pytest.fail(f"{stage.kind}/{stage.key} is not in the stored root: its key has changed")
        return manifest

    monkeypatch.setattr(STAGE, COMMITTED, require)
    monkeypatch.setattr(
        logging.getLogger("knn_diffusion"), "handlers", [caplog.handler]
    )  # Prefect removes those of the root logger
    urls = root / "lists" / "plain.jsonl"
    host = stored_urls(root, "plain.jsonl")[0].split("/")[2]
    with caplog.at_level("INFO", logger="knn_diffusion"):
        built = new_domain(
            config={**domain("plain", urls, root, host), "train": training(), "evaluate": evaluation()}  # type: ignore[arg-type]
        )
    assert built.skipped == dict.fromkeys(PINS["report.json"]["skipped"], True)
    assert {record.name for record in caplog.records if record.name.startswith("knn")} == set(PINS["loggers"])

    report = report_of({"twemoji": built}, 0.0, {"draw_openmoji": 0.0, "draw_samples": 0.0, "total": 0.0})
    assert sorted(report) == PINS["report.json"]["fields"]
    assert list(report["seconds"]["twemoji"]) == PINS["report.json"]["skipped"]
    assert list(report["skipped"]["twemoji"]) == PINS["report.json"]["skipped"]


def test_evaluation_of_the_stored_generator_has_the_pinned_fields(root: Path) -> None:
    from flows.evaluate_generator import evaluate_generator as evaluate

    settings = {**evaluation(), "seed": 1, "bootstrap": 2, "ablations": True}
    evaluated = evaluate(config={"databases": ["plain", "shapes"], "root": str(root), "evaluate": settings})  # type: ignore[arg-type]
    info = evaluated.evaluations["plain"].reference.manifest().info
    pinned = PINS["evaluation"]
    assert sorted(info) == pinned["info"]
    assert set(pinned["scores"]) <= set(info["scores"]), "scores may be added, not removed or renamed"
    assert sorted(info["ablations"]) == pinned["ablations"]
    assert sorted(info["swap"]) == ["plain", "shapes"]
    assert sorted(file.name for file in evaluated.report.reference.manifest().files) == pinned["report"]
    table = Path(evaluated.report.reference.uri, "evaluation.csv").read_text().splitlines()
    assert table[0].split(",") == pinned["columns"]


def test_rebuild_of_the_stored_root_downloads_new_images_only(root: Path, server: LoopbackServer) -> None:
    from flows.rebuild_index import rebuild_index

    urls = [*stored_urls(root, "shapes-grown.jsonl"), server.url("/pink-circle.png"), server.url("/absent.png")]
    config = {
        "domain": "shapes",
        "root": str(root),
        "urls": list_file(root / "lists" / "more.jsonl", *urls),
        "download": domain("shapes", root, root, server.host)["download"],
    }
    rebuilt = rebuild_index(config=config)  # type: ignore[arg-type]
    assert sorted(server.requests) == ["/absent.png", "/pink-circle.png"]
    assert rebuilt.registered.uri == "models:/knn-database.shapes/4"
    (shard,) = (shard for shard in rebuilt.after.images.manifest().shards if shard.folder is None)
    outcomes = pq.read_table(Path(rebuilt.after.images.uri, f"{shard.name}.parquet"))["error_class"].to_pylist()
    assert sorted(outcomes) == ["http_404", "success"], "old URLs were requested again"

    found = file_names(search(root, "shapes", "--k", "13"))
    assert "pink-circle.png" in found
    assert "green-circle.png" not in found
    assert len(found) == 12
    client = MlflowClient(f"sqlite:///{root}/mlflow.db", f"sqlite:///{root}/mlflow.db")
    version = client.get_model_version_by_alias("knn-database.shapes", "champion")
    assert int(version.version) == 4
    assert set(version.tags) >= set(PINS["registry"]["knn-database.shapes"]["tags"])


def test_takedown_and_list_of_the_stored_champion_leave_it_unchanged(root: Path) -> None:
    from flows.rebuild_index import rebuild_index

    lists = root / "lists"
    config = {"urls": str(lists / "shapes-grown.jsonl"), "takedown": str(lists / "shapes-takedown.jsonl")}
    rebuilt = rebuild_index(config={"domain": "shapes", "root": str(root), **config})  # type: ignore[arg-type]
    assert rebuilt.unchanged
    assert rebuilt.after.takedown.uri == str(root / FOLDERS["takedown"])


def test_garbage_of_the_stored_root_is_collected(root: Path) -> None:
    before = search(root, "shapes", "--k", "11")
    listed = command(root, "gc", "shapes", "--keep", "1", "--grace-h", "0", "--delete")
    gone = {Path(line.split()[1]).relative_to(root).as_posix() for line in listed.splitlines()}
    assert f"{FOLDERS['grown database']}/manifest.json" in gone
    assert not any(name.endswith((".tar", ".npy", "takedown.parquet")) and "/database/" not in name for name in gone)
    assert not any((root / name).exists() for name in gone)
    assert search(root, "shapes", "--k", "11") == before
    assert command(root, "gc", "shapes", "--keep", "1", "--grace-h", "0") == ""
