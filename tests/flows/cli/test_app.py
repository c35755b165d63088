"""The ``knn-diffusion`` command: its output on each stream, its exit codes and its errors."""

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from support.changing_domain import NAMES, Living
from support.command import refused, run
from support.fakes import LoopbackServer, Reply, WithoutRay
from support.tiny_domain import drawn, write_urls

from flows.cli.app import app
from infra import artifacts
from infra.errors import InputError
from infra.storage.lease import lease
from model.retrieval.faiss_index import MEMORY_BYTES


def test_help_lists_every_command_in_order() -> None:
    result = run("--help")
    assert result.exit_code == 0
    databases = ("new-domain", "rebuild-index", "search", "databases")
    commands = ("demo", *databases, "generate", "edit", "evaluate", "merge", "subset", "gc")
    places = [result.stdout.index(f" {command} ") for command in commands]
    assert places == sorted(places)
    for command in commands:
        assert run(command, "--help").exit_code == 0


def test_usage_names_arguments_as_help_does() -> None:
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                expected = "FILE" if name == "inspect" else parameter.name.upper()
                assert parameter.metavar == expected, f"{name}: {parameter.name}"


def test_version_prints_name_and_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"knn-diffusion {importlib.metadata.version('knn-diffusion')}\n"


def test_every_command_has_an_example_in_its_help() -> None:
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        (example,) = re.findall(r"^ *Example: (.+)$", command.help or "", re.MULTILINE)
        program, *arguments = shlex.split(example)
        assert (program, arguments[0]) == ("knn-diffusion", name)
        with command.make_context(name, arguments[1:]):
            pass


@pytest.mark.slow
def test_interrupt_ends_with_one_line_and_exit_code_130(
    prefect_server: None, shared_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "prefect").mkdir()
    shutil.copy(shared_folder / "prefect.db", tmp_path / "prefect")  # its migrations take seconds
    requested, ended = threading.Event(), threading.Event()

    def hang() -> Iterator[bytes]:
        requested.set()
        ended.wait(60)
        yield b""

    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "KNN_DIFFUSION_CPUS": "1"}
    environment.pop("PREFECT_API_URL", None)
    with LoopbackServer({"/a.png": Reply(body=hang)}) as server:
        urls = write_urls(tmp_path / "urls.jsonl", [server.url("/a.png")])
        command = [sys.executable, "-m", "flows.cli.app", "new-domain", "shapes", "--urls", str(urls)]
        process = subprocess.Popen(
            [*command, "--root", str(tmp_path / "data"), "--allow-host", server.host],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores SIGINT
            text=True,
        )
        try:
            assert requested.wait(300)
            os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C in a terminal does
            output, errors = process.communicate(timeout=120)
        finally:
            ended.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    lines = [line for line in errors.splitlines() if line.strip() and "%|" not in line]
    assert (process.returncode, output) == (130, ""), errors
    assert lines[-1].startswith("knn-diffusion: interrupted; ")
    assert sum("Traceback" in line or "interrupted" in line for line in lines) == 1, errors


def test_imports_load_no_heavy_module_before_it_is_needed() -> None:
    """The command imports nothing heavy, and the flows of a database neither torch nor diffusers."""
    loaded = "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    flows = "import flows.new_domain, flows.rebuild_index, flows.combine_databases, flows.collect_garbage"
    code = f"import sys, flows.cli.app; {loaded}; {flows}; {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    command, database = (set(line.split()) for line in done.stdout.splitlines())
    assert {"typer", "flows"} <= command
    assert command.isdisjoint({"torch", "numpy", "PIL", "mlflow", "ray", "pyarrow", "prefect", "pydantic", "fsspec"})
    assert {"prefect", "mlflow", "ray"} <= database
    assert database.isdisjoint({"torch", "diffusers", "open_clip", "cv2", "matplotlib"})


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("search",),
        ("search", "shapes"),
        ("search", "shapes", "a", "--text", "b"),
        ("search", "shapes", "a", "--image", "b.png"),
        ("search", "shapes", "--text", "a", "--image", "b.png"),
        ("new-domain", "shapes"),
        ("generate", "a"),
        ("generate", "a", "--database", "shapes"),
        ("generate", "a", "--database", "shapes", "--out", "a.png", "--out-dir", "images"),
        ("search", "a", "b", "--k", "0"),
        ("rebuild-index",),
        ("subset", "reds", "shapes"),
        ("gc", "shapes", "--keep", "0"),
    ],
)
def test_command_with_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("command", ["search", "generate", "edit", "evaluate", "merge", "subset"])
def test_command_on_foreign_folder_without_trust_fails(
    prefect_server: None, ray: WithoutRay, command: str, tmp_path: Path
) -> None:
    (tmp_path / "own").mkdir()
    with LoopbackServer({}) as internal:
        source = {"embeddings": {"uri": internal.url("/shapes/embeddings/0"), "digest": "0" * 64}}
        stage = artifacts.ArtifactBuilder(f"{tmp_path}/foreign/shapes", "database", inputs=source, config={})
        identity = {"name": "hf-hub:evil/clip", "weights_digest": "", "preprocess_digest": "", "dimension": 4}
        stage.commit([], identity={"encoder": identity}, info={})
        drawn("red", "bar").save(tmp_path / "in.png")
        drawing = ["--database", stage.uri, "--out", f"{tmp_path}/out.png", "--model", "sticker-generator"]
        arguments = {
            "search": [stage.uri, "cat"],
            "generate": ["cat", *drawing],
            "edit": [f"{tmp_path}/in.png", "cat", *drawing],
            "evaluate": [stage.uri, "--model", "sticker-generator"],
            "merge": ["both", stage.uri, stage.uri],
            "subset": ["part", stage.uri, "--where", "width > 1"],
        }[command]
        refused(run(command, *arguments, "--root", f"{tmp_path}/own"), "hf-hub:evil/clip", "add --trust")
        assert internal.requests == []
        trusted = run(command, *arguments, "--root", f"{tmp_path}/own", "--trust")
        assert trusted.exit_code == 1 and "--trust" not in trusted.stderr


def test_new_domain_without_memory_fails_with_option_name(prefect_server: None, urls: Path) -> None:
    refused(run("new-domain", "x", "--urls", str(urls), "--memory", "0"), "--memory is too small: 0")


@pytest.fixture
def urls(tmp_path: Path) -> Path:
    """A list of one URL that no test requests."""
    path = tmp_path / "list.txt"
    path.write_text("https://example.com/a.png\n")
    return path


def test_new_domain_passes_index_options_to_the_flow(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch, urls: Path
) -> None:
    configs: list[Any] = []

    def record(config: Any) -> None:
        configs.append(config)
        raise InputError("recorded")

    monkeypatch.setattr("flows.new_domain.new_domain", record)
    options = ("--index", "IVF64,SQ8", "--memory", "0.5", "--target-recall", "0.9", "--dedup")
    refused(run("new-domain", "x", "--urls", str(urls), *options), "recorded")
    refused(run("new-domain", "x", "--urls", str(urls)), "recorded")
    given, default = (config.index for config in configs)
    assert (given.index, given.memory_bytes, given.target_recall, given.dedup) == ("IVF64,SQ8", 1 << 29, 0.9, True)
    assert (default.index, default.memory_bytes, default.dedup) == ("auto", MEMORY_BYTES, False)
    refused(run("new-domain", "x", "--urls", str(urls), "--target-recall", "2"), "--target-recall is ")


def test_reading_commands_without_registry_create_no_files(prefect_server: None, tmp_path: Path) -> None:
    root = tmp_path / "new"
    root.mkdir()
    listed = run("databases", "--root", str(root))
    assert (listed.exit_code, listed.stdout) == (0, "")
    assert listed.stderr == f"no databases are registered at sqlite:///{root}/mlflow.db\n"
    assert run("databases", "--json", "--root", str(root)).stdout == "[]\n"
    out = str(tmp_path / "a.png")
    source = str(tmp_path / "source.png")
    Image.new("RGB", (64, 64)).save(source)
    drawing = ("--model", "sticker-generator", "--database", "shapes", "--out", out)
    for arguments in (
        ("search", "shapes", "a circle"),
        ("generate", "a circle", *drawing),
        ("edit", source, "a circle", *drawing),
        ("evaluate", "shapes", "--model", "sticker-generator"),
    ):
        refused(run(*arguments, "--root", str(root)), "no database is registered as", "registered: none")
    assert not any(root.iterdir())


def test_commands_with_invalid_arguments_fail_on_one_line(domain: Any, tmp_path: Path) -> None:
    root = str(domain.root)
    refused(run("search", f"{tmp_path}/none", "a", "--root", root), f"{tmp_path}/none holds no committed database")
    refused(run("search", "shapes", "  ", "--root", root), "the query is empty")
    options = ["--database", "shapes", "--root", root, "--out"]
    refused(run("generate", "a", *options, "image"), "image has an unknown suffix: image; use .png")
    refused(run("generate", "a", *options, f"{tmp_path}/no/a.png"), f"folder does not exist: {tmp_path}/no;")
    refused(run("generate", " ", *options, f"{tmp_path}/a.png"), "a prompt is empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "lists no URL"), ('{"link": "http://a/b.png"}\n', "has no column 'url', only link")],
)
def test_new_domain_with_unusable_list_fails(prefect_server: None, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / ("list.jsonl" if content else "list.txt")
    path.write_text(content)
    refused(run("new-domain", "x", "--urls", str(path), "--root", str(tmp_path / "data")), str(path), message)


def test_new_domain_with_missing_list_or_invalid_name_fails(prefect_server: None, tmp_path: Path) -> None:
    root = str(tmp_path)
    refused(run("new-domain", "x", "--urls", f"{tmp_path}/no.csv", "--root", root), "no.csv does not exist")
    refused(run("new-domain", "My Domain", "--urls", "a.csv", "--root", root), "'My Domain' must be lower-case")


def test_new_domain_builds_a_database_from_a_list(
    domain: Any, ray: WithoutRay, migrated_database: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(migrated_database, tmp_path / "data" / "mlflow.db")
    urls = write_urls(tmp_path / "urls.jsonl", [domain.server.url(f"/{c}-ring.png") for c in ("red", "blue", "green")])
    options = ["--root", str(tmp_path / "data"), "--allow-host", domain.server.host, "--no-train"]
    result = run("new-domain", "rings", "--urls", str(urls), *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == "models:/knn-database.rings@champion"
    found = json.loads(run("search", "rings", "a red ring", "--json", "--root", str(tmp_path / "data")).stdout)
    assert len(found) == 3
    assert found[0]["url"].endswith("/red-ring.png")


def test_new_domain_without_allow_host_requests_nothing_from_loopback(
    domain: Any, ray: WithoutRay, tmp_path: Path
) -> None:
    urls = write_urls(tmp_path / "urls.jsonl", [domain.server.url("/red-ring.png")])
    requests = len(domain.server.requests)
    result = run("new-domain", "rings", "--urls", str(urls), "--root", str(tmp_path / "data"))
    refused(result, "not public", f"if this is intended, add --allow-host {domain.server.host}")
    assert len(domain.server.requests) == requests


def test_rebuild_index_without_changes_reports_unchanged_champion(domain: Any, ray: WithoutRay) -> None:
    result = run("rebuild-index", "shapes", "--urls", str(domain.urls), "--root", str(domain.root))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["models:/knn-database.shapes@champion is unchanged"]


def test_gc_without_delete_only_lists(prefect_server: None, living: Living, ray: WithoutRay) -> None:
    living.start(NAMES[:4])
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), compact=True)
    before = living.files()
    command = ("gc", "shapes", "--keep", "1", "--grace-h", "0", "--root", str(living.root))
    listed = run(*command)
    assert living.files() == before
    deleted = run(*command, "--delete")
    assert listed.exit_code == deleted.exit_code == 0, listed.output + deleted.output
    assert "to delete (run again with --delete)" in listed.stderr
    assert listed.stdout == deleted.stdout
    going = [line.split()[1] for line in listed.stdout.splitlines()]
    assert any(uri.endswith(".tar") for uri in going)
    assert living.files().keys() == {name for name in before if f"{living.root}/shapes/{name}" not in going}


def test_gc_with_wait_waits_for_another_writer(domain: Any) -> None:
    command = ("gc", "shapes", "--root", str(domain.root))
    with contextlib.ExitStack() as held:
        held.enter_context(lease(f"{domain.root}/shapes", holder="another"))
        refused(run(*command), "is being written by another")
        end = threading.Timer(0.5, held.close)
        end.start()
        result = run(*command, "--wait", "60")
        end.join()
    assert result.exit_code == 0, result.output
    assert "to delete (run again with --delete)" in result.stderr


def test_gc_with_one_failing_domain_lists_the_others(prefect_server: None, living: Living, ray: WithoutRay) -> None:
    living.garbage_beside_what_is_refused()
    before = living.files()
    result = run("gc", "--keep", "1", "--grace-h", "0", "--delete", "--root", str(living.root))
    assert result.exit_code == 1
    listed = {line.split()[1] for line in result.stdout.splitlines()}
    assert listed == {f"{living.root}/shapes/{name}" for name in before.keys() - living.files().keys()} != set()
    assert f"shapes: {len(listed)} files" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("knn-diffusion: 1 of 2 domains were not collected; aa: no version of aa is registered")


def test_upkeep_commands_with_invalid_arguments_fail_on_one_line(domain: Any, tmp_path: Path) -> None:
    root = ("--root", str(domain.root))
    refused(run("rebuild-index", "birds", *root), "no database is registered as models:/knn-database.birds@champion")
    refused(run("merge", "all", "shapes", *root), "DATABASES has too few entries: 1")
    refused(run("subset", "reds", "shapes", "--where", "colour == 1", *root), "colour")
    empty = tmp_path / "takedown.txt"
    empty.write_text("http://nowhere/at-all.png\n")
    refused(run("rebuild-index", "shapes", "--takedown", str(empty), *root), "matches no image", "at-all.png")
