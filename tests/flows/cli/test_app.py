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
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from support.changing_domain import NAMES, Living
from support.fakes import LoopbackServer, Reply, WithoutRay
from support.tiny_domain import drawn, write_urls
from typer.testing import CliRunner, Result

from flows.cli.app import app
from flows.cli.console import age
from infra import artifacts
from infra.errors import InputError
from infra.storage.lease import lease
from model.retrieval.faiss_index import MEMORY_BYTES


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refused(result: Result, *parts: str) -> None:
    """Check for exit code 1, no output, and one line on standard error that contains every part."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, result.stderr
    line = lines[0]
    assert line.startswith("knn-diffusion: ")
    for part in parts:
        assert part in line


def test_help_lists_every_command_in_order() -> None:
    result = run("--help")
    assert result.exit_code == 0
    databases = ("new-domain", "rebuild-index", "search", "databases")
    commands = ("demo", *databases, "generate", "edit", "evaluate", "merge", "subset", "gc")
    places = [result.stdout.index(f" {command} ") for command in commands]
    assert places == sorted(places)
    for command in commands:
        assert run(command, "--help").exit_code == 0


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
def test_interrupt_ends_with_one_line_and_exit_code_130(tmp_path: Path) -> None:
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


def test_import_of_the_command_loads_no_heavy_module() -> None:
    code = "import sys, flows.cli.app; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert {"typer", "flows"} <= set(done.stdout.split())
    assert set(done.stdout.split()).isdisjoint(
        {"torch", "numpy", "PIL", "mlflow", "ray", "pyarrow", "prefect", "pydantic", "fsspec"}
    )


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


def test_search_with_json_prints_only_json(domain: Any) -> None:
    result = run("search", "shapes", "a red circle", "--k", "3", "--json", "--root", str(domain.root))
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["rank"] for row in found] == [1, 2, 3]
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    assert {"rank", "score", "id", "key", "url"} <= set(found[0])
    assert "red" in found[0]["url"]


def test_search_by_any_name_of_a_database_returns_the_same(domain: Any) -> None:
    names = ("shapes", "models:/knn-database.shapes@champion", "models:/knn-database.shapes/1")
    names += (domain.result.database.reference.uri,)
    outputs = {run("search", name, "blue ring", "--json", "--root", str(domain.root)).stdout for name in names}
    assert len(outputs) == 1
    assert "blue" in outputs.pop()


def test_search_without_query_names_the_options() -> None:
    message = " ".join(run("search", "shapes").stderr.replace("│", " ").split())
    assert "give exactly one query: QUERY, --text TEXT or --image FILE" in message


def test_search_with_text_option_equals_query_argument(domain: Any) -> None:
    options = ["--json", "--root", str(domain.root)]
    result = run("search", "shapes", "--text", "a red circle", *options)
    assert result.stdout == run("search", "shapes", "a red circle", *options).stdout
    assert len(json.loads(result.stdout)) == 10


def test_search_by_image_of_any_mode_finds_that_image(domain: Any, tmp_path: Path) -> None:
    circle = drawn("blue", "circle")
    circle.save(tmp_path / "plain.png")
    circle.convert("RGBA").save(tmp_path / "alpha.webp", lossless=True)
    turned = circle.getexif()
    turned[0x0112] = 6
    drawn("purple", "triangle").rotate(90).save(tmp_path / "turned.png", exif=turned)
    for name, found in (("plain.png", "blue-circle"), ("alpha.webp", "blue-circle"), ("turned.png", "purple-triangle")):
        options = ["--image", str(tmp_path / name), "--json", "--k", "2", "--root", str(domain.root)]
        result = run("search", "shapes", *options)
        assert result.exit_code == 0, result.stderr
        first, second = json.loads(result.stdout)
        assert first["url"].endswith(f"/{found}.png")
        assert first["score"] > 0.99
        assert first["score"] > second["score"]


def test_search_with_html_writes_a_page_of_the_images(domain: Any, tmp_path: Path) -> None:
    page, root = tmp_path / "page.html", ["--root", str(domain.root)]
    result = run("search", "shapes", "a red circle", "--k", "3", "--html", str(page), *root)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(page)
    written = page.read_text(encoding="utf-8")
    assert written.count("data:image/webp;base64,") == 3
    result = run("search", "shapes", "a red circle", "--k", "3", "--html", str(page), "--json", *root)
    assert page.read_text(encoding="utf-8") == written
    for row in json.loads(result.stdout):
        assert f'href="{row["url"]}"' in written
        assert f"{row['score']:.3f}" in written
        assert row["key"] in written
    drawn("red", "circle").save(tmp_path / "mine.png")
    run("search", "shapes", "--image", str(tmp_path / "mine.png"), "--k", "3", "--html", str(page), *root)
    assert page.read_text(encoding="utf-8").count("data:image/webp;base64,") == 4
    assert "mine.png" in page.read_text(encoding="utf-8")


def test_search_with_invalid_query_or_output_fails_on_one_line(domain: Any, tmp_path: Path) -> None:
    root = ["--root", str(domain.root)]
    refused(run("search", "shapes", "--text", " ", *root), "the query is empty")
    refused(run("search", "shapes", "--image", f"{tmp_path}/no.png", *root), "image does not exist", "no.png")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused(run("search", "shapes", "--image", f"{tmp_path}/torn.png", *root), "image cannot be read", "torn.png")
    refused(
        run("search", "shapes", "a", "--html", f"{tmp_path}/page.png", *root), "page has an unknown suffix", "use .html"
    )
    refused(
        run("search", "shapes", "a", "--html", f"{tmp_path}/no/page.html", *root),
        f"folder does not exist: {tmp_path}/no;",
    )
    page = ["--html", f"{tmp_path}/page.html"]
    refused(run("search", "shapes", "a", "--k", "501", *page, *root), "500", "501")
    assert not (tmp_path / "page.html").exists()


def test_databases_lists_registered_versions(domain: Any) -> None:
    (entry,) = json.loads(run("databases", "--json", "--root", str(domain.root)).stdout)
    assert (entry["name"], entry["version"], entry["aliases"]) == ("knn-database.shapes", 1, ["champion"])
    version = domain.result.database.reference.manifest()
    embeddings = Path(version.inputs["embeddings"]["uri"])
    stored = [Path(domain.result.database.reference.uri) / file.name for file in version.files]
    stored += [*embeddings.glob("img_emb/*"), *embeddings.glob("metadata/*")]
    assert entry["bytes"] == sum(path.stat().st_size for path in stored)
    heads, row = run("databases", "--root", str(domain.root)).stdout.splitlines()
    for head in ("name", "rows", "recall@10 image", "recall@10 text", "encoder", "aliases", "size", "age"):
        assert head in heads
    for part in ("knn-database.shapes", str(entry["rows"]), "1.000", "sticker-clip", "champion", "kB"):
        assert part in row
    assert row.split()[-1] in {"s", "min"}


def test_databases_of_version_without_size_shows_a_dash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from infra.registry import Registry

    entry = {"name": "knn-database.old", "version": 1, "rows": 9, "aliases": [], "encoder": "[red]x", "created_ms": 0}
    monkeypatch.setattr(Registry, "versions", lambda self, kind: [entry])
    _, row = run("databases", "--root", str(tmp_path)).stdout.splitlines()
    assert row.split()[:6] == ["knn-database.old", "1", "9", "–", "–", "[red]x"]
    assert row.split()[6] == "–"
    assert row.split()[-1] == "d"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (59, "59 s"), (3 * 60 + 1, "3 min"), (2.5 * 3600, "2 h"), (86_400, "1 d"), (400 * 86_400, "400 d")],
)
def test_age_of_timestamp_returns_rounded_number_with_unit(seconds: float, text: str) -> None:
    assert age(int((time.time() - seconds) * 1000)) == text


def test_generate_with_same_seed_writes_the_same_images(domain: Any, tmp_path: Path) -> None:
    images = []
    for name, seed, candidates in (("a.png", "5", "1"), ("b.png", "5", "1"), ("c.png", "6", "1"), ("d.png", "5", "9")):
        options = ["--seed", seed, "--steps", "2", "--candidates", candidates, "--root", str(domain.root)]
        arguments = ("red circle", "blue bar", "--database", "shapes", "--out", str(tmp_path / name))
        result = run("generate", *arguments, *options)
        assert result.exit_code == 0, result.stderr
        images.append(np.asarray(Image.open(tmp_path / name)))
    assert images[0].shape == (16, 32, 3)
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()
    assert (images[0] != images[3]).any()


def test_generate_between_image_and_text_writes_interpolation(domain: Any, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "blue.png")
    options = ["--database", "shapes", "--steps", "2", "--root", str(domain.root), "--out"]
    result = run("generate", str(tmp_path / "blue.png"), "red bar", *options, str(tmp_path / "a.png"), "--between", "3")
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "a.png").size == (48, 16)
    result = run("generate", "a", "b", "c", *options, str(tmp_path / "a.png"), "--between", "3")
    refused(result, "--between needs two prompts: 3 were given")


class FakePipeline:
    """A pipeline that generates black images of 4 px, and records its arguments."""

    def __init__(self) -> None:
        self.prompts: list[Any] = []
        self.options: dict[str, Any] = {}
        self.model = ""

    def __call__(self, prompts: list[Any], **options: Any) -> Any:
        self.prompts, self.options = prompts, options
        options["on_progress"](1, 1)
        count = len(prompts) * options.get("num_images_per_prompt", 1)
        return SimpleNamespace(images=[Image.new("RGB", (4, 4))] * count)

    def interpolate(self, first: Any, second: Any, count: int, **options: Any) -> Any:
        return self([first] * count, **options)

    def edit(self, source: Image.Image, prompt: str, **options: Any) -> list[Image.Image]:
        self.prompts, self.options = [prompt], options
        return [source]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()

    def load(model: str, *_: Any, **__: Any) -> FakePipeline:
        fake.model = model
        return fake

    monkeypatch.setattr("tasks.serve.load.load_pipeline", load)
    return fake


def test_generate_treats_image_paths_as_images(pipeline: FakePipeline, tmp_path: Path) -> None:
    options = ["--database", "shapes", "--out", str(tmp_path / "a.png")]
    for name in ("photo.PNG", f"{tmp_path}/my photo.webp"):
        refused(run("generate", "red bar", name, *options), f"image does not exist: {name};")
    (tmp_path / "torn.png").write_bytes(b"not an image")
    refused(run("generate", f"{tmp_path}/torn.png", *options), f"image cannot be read: {tmp_path}/torn.png")
    assert not (tmp_path / "a.png").exists()
    for name in ("my photo.png", "my photo.bmp"):
        Image.new("RGB", (5, 5)).save(tmp_path / name)
    texts = ("a drawing of what is called red.png", "photo.txt", "is this. a text " * 20)
    result = run("generate", *texts, f"{tmp_path}/my photo.png", f"{tmp_path}/my photo.bmp", *options)
    assert result.exit_code == 0, result.stderr
    assert pipeline.prompts[:3] == [*texts]
    assert [image.size for image in pipeline.prompts[3:]] == [(5, 5), (5, 5)]


@pytest.fixture
def red_image(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return str(path)


@pytest.mark.parametrize("command", ["generate", "edit"])
def test_default_generator_not_registered_uses_the_bundled_one(
    pipeline: FakePipeline, tmp_path: Path, red_image: str, command: str
) -> None:
    (tmp_path / "root").mkdir()
    options = ("--database", "shapes", "--out", f"{tmp_path}/out.png", "--root", f"{tmp_path}/root")
    result = run(command, red_image, *(["a"] if command == "edit" else []), *options)
    assert result.exit_code == 0, result.output
    assert pipeline.model == "sticker-generator"
    assert result.stdout == f"{tmp_path}/out.png\n"
    assert result.stderr == (
        "knn-diffusion: no generator is registered as knn-diffusion; using the bundled sticker-generator\n"
    )


@pytest.mark.parametrize("command", ["generate", "edit"])
def test_given_generator_not_registered_is_not_replaced(
    pipeline: FakePipeline, tmp_path: Path, red_image: str, command: str
) -> None:
    (tmp_path / "root").mkdir()
    options = ("--database", "shapes", "--out", f"{tmp_path}/out.png", "--root", f"{tmp_path}/root")
    result = run(command, red_image, *(["a"] if command == "edit" else []), *options, "--model", "knn-diffusion")
    assert (result.exit_code, result.stderr, pipeline.model) == (0, "", "knn-diffusion")


@pytest.mark.parametrize(
    ("alias", "model", "message"),
    [
        ("champion", "knn-diffusion", ""),
        ("candidate", "sticker-generator", "no version of knn-diffusion is the champion"),
    ],
)
def test_default_generator_registered_is_used_if_it_is_the_champion(
    pipeline: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alias: str, model: str, message: str
) -> None:
    from infra.registry import Registry

    entry = {"name": "knn-diffusion", "version": 1, "aliases": [alias]}
    monkeypatch.setattr(Registry, "versions", lambda self, kind: [entry])
    result = run("generate", "a", "--database", "shapes", "--out", f"{tmp_path}/out.png", "--root", str(tmp_path))
    assert (result.exit_code, pipeline.model) == (0, model)
    assert message in result.stderr


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


@pytest.mark.parametrize(("count", "columns", "rows"), [(2, 2, 1), (12, 12, 1), (13, 4, 4), (255, 16, 16)])
def test_generate_arranges_few_images_in_a_row_and_many_in_a_grid(
    pipeline: FakePipeline, tmp_path: Path, count: int, columns: int, rows: int
) -> None:
    options = ["--database", "shapes", "--between", str(count), "--out", str(tmp_path / "a.webp")]
    result = run("generate", "a", "b", *options)
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "a.webp").size == (4 * columns, 4 * rows)


def test_edit_passes_the_method_to_the_pipeline(pipeline: FakePipeline, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command = ["edit", str(tmp_path / "a.png"), "red", "--database", "shapes", "--out", str(tmp_path / "b.png")]
    for given, method in (([], "local"), (["--method", "sdedit"], "sdedit"), (["--method", "restore"], "restore")):
        assert run(*command, *given).exit_code == 0
        assert pipeline.options["method"] == method
    assert run(*command, "--method", "paint").exit_code == 2
    refused(
        run(*command, "--method", "sdedit", "--largest-region", "1"),
        "--largest-region does not apply to --method sdedit",
    )


def test_edit_with_bundled_generator_changes_a_region(domain: Any, tmp_path: Path) -> None:
    source = drawn("blue", "circle", 64)
    source.save(tmp_path / "blue.png")
    options = ["--database", "shapes", "--model", "sticker-generator", "--root", str(domain.root)]
    out = tmp_path / "edited.png"
    result = run("edit", str(tmp_path / "blue.png"), "red ring", *options, "--candidates", "2", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(out)
    edited = np.asarray(Image.open(out))
    assert edited.shape == (64, 64, 3)
    same = (edited == np.asarray(source)).all(-1).mean()
    assert 0.4 < same < 0.98


def test_edit_with_same_seed_writes_the_same_image(domain: Any, tmp_path: Path) -> None:
    Image.new("RGBA", (90, 70), (0, 0, 255, 200)).save(tmp_path / "blue.png")
    options = ["--database", "shapes", "--candidates", "1", "--largest-region", "1", "--root", str(domain.root)]
    images = []
    for name, seed in (("a.png", "5"), ("b.png", "5"), ("c.png", "6")):
        out = tmp_path / name
        result = run("edit", str(tmp_path / "blue.png"), "red", *options, "--seed", seed, "--out", str(out))
        assert result.exit_code == 0, result.stderr
        images.append(np.asarray(Image.open(out)))
    assert images[0].shape == (16, 16, 3)
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()


def test_edit_with_invalid_image_or_number_fails_on_one_line(domain: Any, tmp_path: Path) -> None:
    options = ["--database", "shapes", "--root", str(domain.root), "--out", str(tmp_path / "a.png")]
    refused(run("edit", f"{tmp_path}/none.png", "a", *options), f"image does not exist: {tmp_path}/none.png")
    (tmp_path / "torn.png").write_bytes(b"not an image")
    refused(run("edit", f"{tmp_path}/torn.png", "a", *options), f"image cannot be read: {tmp_path}/torn.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "fine.png")
    refused(run("edit", f"{tmp_path}/fine.png", " ", *options), "a prompt is empty")
    message = "--strength is out of range: 2.0"
    refused(run("edit", f"{tmp_path}/fine.png", "a", *options, "--strength", "2"), message)
    refused(
        run("edit", f"{tmp_path}/fine.png", "a", *options, "--largest-region", "0"),
        "--largest-region is out of range: 0.0",
    )


def test_search_by_image_that_fails_in_a_pillow_plugin_fails_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.ppm").write_bytes(b"P6 x 3 255\n")
    with pytest.raises(ValueError, match="invalid literal"):
        Image.open(tmp_path / "bad.ppm")
    refused(run("search", "shapes", "--image", f"{tmp_path}/bad.ppm"), "image cannot be read", "bad.ppm (inv")


def test_generate_with_out_dir_writes_one_file_per_image(pipeline: FakePipeline, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    options = ["--database", "shapes", "--out-dir", str(folder), "--num-images", "2", "--query", "both"]
    result = run("generate", "a", "b", *options)
    assert result.exit_code == 0, result.output
    assert [Path(line) for line in result.stdout.splitlines()] == sorted(folder.iterdir())
    assert [path.name for path in sorted(folder.iterdir())] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert (pipeline.options["num_images_per_prompt"], pipeline.options["query"]) == (2, "both")


def test_generate_on_absent_device_fails_on_one_line(pipeline: FakePipeline, tmp_path: Path) -> None:
    def to(device: str) -> None:
        raise RuntimeError(f"No {device} here\nand more")

    pipeline.to = to  # type: ignore[attr-defined]
    options = ["--database", "shapes", "--out", str(tmp_path / "a.png"), "--model", "sticker-generator", "--device"]
    refused(run("generate", "a", *options, "cuda:7"), "--device is not available: cuda:7 (No cuda:7 here); use cpu")
    refused(run("generate", "a", *options, "tpu"), "--device is unknown: tpu; use cpu, cuda")


def test_generate_with_quiet_prints_only_the_path(pipeline: FakePipeline, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    root = ["--root", str(tmp_path)]  # nothing is registered here, which is otherwise mentioned
    result = run("generate", "a", "--database", "shapes", "--out", str(out), "--quiet", *root)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{out}\n", "")


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


def test_search_in_unknown_database_lists_registered_ones(domain: Any) -> None:
    refused(
        run("search", "shape", "a", "--root", str(domain.root)),
        "no database is registered as models:/knn-database.shape@champion",
        "knn-database.shapes@champion",
    )


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


def test_gc_without_delete_only_lists(living: Living, ray: WithoutRay) -> None:
    living.build(NAMES[:4])
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


def test_gc_with_one_failing_domain_lists_the_others(living: Living, ray: WithoutRay) -> None:
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
