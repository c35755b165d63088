"""The command as a user meets it: what it prints where, and how it says no."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.changing_domain import NAMES, Living
from support.fakes import LoopbackServer, WithoutRay
from support.tiny_domain import drawn, write_urls
from typer.testing import CliRunner, Result

from flows.cli.app import app
from flows.cli.console import age, size
from infra import artifacts
from infra.errors import InputError
from infra.storage.lease import lease
from model.retrieval.faiss_index import MEMORY_BYTES


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refused(result: Result, *parts: str) -> None:
    """One line on standard error that holds every part, nothing on standard output, exit code 1."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, result.stderr
    line = lines[0]
    assert line.startswith("knn-diffusion: ")
    for part in parts:
        assert part in line


def test_help_names_every_command_in_order() -> None:
    result = run("--help")
    assert result.exit_code == 0
    databases = ("new-domain", "rebuild-index", "search", "databases")
    commands = ("demo", *databases, "generate", "edit", "evaluate", "merge", "subset", "gc")
    places = [result.stdout.index(f" {command} ") for command in commands]
    assert places == sorted(places)
    for command in commands:
        assert run(command, "--help").exit_code == 0


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, flows.cli.app; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert {"typer", "flows"} <= set(told.stdout.split())
    assert set(told.stdout.split()).isdisjoint({"torch", "numpy", "PIL", "mlflow", "ray", "pyarrow", "prefect"})


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
        ("search", "a", "b", "--k", "0"),
        ("rebuild-index",),
        ("subset", "reds", "shapes"),
        ("gc", "shapes", "--keep", "0"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_search_prints_json_alone_on_standard_output(domain: Any) -> None:
    result = run("search", "shapes", "a red circle", "--k", "3", "--json", "--root", str(domain.root))
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["rank"] for row in found] == [1, 2, 3]
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    assert {"rank", "score", "id", "key", "url"} <= set(found[0])
    assert "red" in found[0]["url"]


def test_search_takes_all_three_names_of_a_database(domain: Any) -> None:
    names = ("shapes", "models:/knn-database.shapes@champion", "models:/knn-database.shapes/1")
    names += (domain.result.database.reference.uri,)
    outputs = {run("search", name, "blue ring", "--json", "--root", str(domain.root)).stdout for name in names}
    assert len(outputs) == 1
    assert "blue" in outputs.pop()


def test_a_search_without_one_query_says_how() -> None:
    told = " ".join(run("search", "shapes").stderr.replace("│", " ").split())
    assert "give one query: words, or --text TEXT, or --image FILE" in told


def test_search_takes_the_text_as_an_option_too(domain: Any) -> None:
    options = ["--json", "--root", str(domain.root)]
    told = run("search", "shapes", "--text", "a red circle", *options)
    assert told.stdout == run("search", "shapes", "a red circle", *options).stdout
    assert len(json.loads(told.stdout)) == 10


def test_search_by_image_finds_the_image_whatever_its_mode(domain: Any, tmp_path: Path) -> None:
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


def test_search_writes_a_page_of_the_images(domain: Any, tmp_path: Path) -> None:
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


def test_search_refuses_what_cannot_be_sought_or_written(domain: Any, tmp_path: Path) -> None:
    root = ["--root", str(domain.root)]
    refused(run("search", "shapes", "--text", " ", *root), "the query is empty")
    refused(run("search", "shapes", "--image", f"{tmp_path}/no.png", *root), "no.png does not exist; name a picture")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused(run("search", "shapes", "--image", f"{tmp_path}/torn.png", *root), "torn.png is no picture")
    refused(run("search", "shapes", "a", "--html", f"{tmp_path}/page.png", *root), "no page name; end it in .html")
    refused(run("search", "shapes", "a", "--html", f"{tmp_path}/no/page.html", *root), "the folder", "does not exist")
    page = ["--html", f"{tmp_path}/page.html"]
    refused(run("search", "shapes", "a", "--k", "501", *page, *root), "at most 500 pictures, 501 were asked for")
    assert not (tmp_path / "page.html").exists()


def test_databases_lists_what_is_registered(domain: Any) -> None:
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


def test_a_version_that_was_registered_without_its_size_shows_a_dash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from infra.registry import Registry

    entry = {"name": "knn-database.old", "version": 1, "rows": 9, "aliases": [], "encoder": "[red]x", "created_ms": 0}
    monkeypatch.setattr(Registry, "versions", lambda self, kind: [entry])
    _, row = run("databases", "--root", str(tmp_path)).stdout.splitlines()
    assert row.split()[:6] == ["knn-database.old", "1", "9", "–", "–", "[red]x"]
    assert row.split()[6] == "–"
    assert row.split()[-1] == "d"


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1549, "1.5 kB"), (9_960, "10 kB"), (23_400_000, "23 MB"),
     (999_700, "1.0 MB"), (2 * 10**12, "2.0 TB"), (5 * 10**15, "5000 TB")],
)  # fmt: skip
def test_sizes_are_told_in_words(count: int, told: str) -> None:
    assert size(count) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-5, "0 s"), (59, "59 s"), (3 * 60 + 1, "3 min"), (2.5 * 3600, "2 h"), (86_400, "1 d"), (400 * 86_400, "400 d")],
)
def test_ages_are_told_in_words(seconds: float, told: str) -> None:
    assert age(int((time.time() - seconds) * 1000)) == told


def test_generate_writes_a_image_a_prompt_and_repeats_itself(domain: Any, tmp_path: Path) -> None:
    pictures = []
    for name, seed, candidates in (("a.png", "5", "1"), ("b.png", "5", "1"), ("c.png", "6", "1"), ("d.png", "5", "9")):
        options = ["--seed", seed, "--steps", "2", "--candidates", candidates, "--root", str(domain.root)]
        asked = ("red circle", "blue bar", "--database", "shapes", "--out", str(tmp_path / name))
        result = run("generate", *asked, *options)
        assert result.exit_code == 0, result.stderr
        pictures.append(np.asarray(Image.open(tmp_path / name)))
    assert pictures[0].shape == (16, 32, 3)
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()
    assert (pictures[0] != pictures[3]).any()


def test_generate_takes_images_for_prompts_and_goes_from_one_to_another(domain: Any, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "blue.png")
    options = ["--database", "shapes", "--steps", "2", "--root", str(domain.root), "--out"]
    result = run("generate", str(tmp_path / "blue.png"), "red bar", *options, str(tmp_path / "a.png"), "--between", "3")
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "a.png").size == (48, 16)
    result = run("generate", "a", "b", "c", *options, str(tmp_path / "a.png"), "--between", "3")
    refused(result, "--between goes from one prompt to another; 3 were given")


class Drawer:
    """A pipeline that draws black pictures of 4 px, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.options: dict[str, Any] = {}

    def __call__(self, prompts: list[Any], **options: Any) -> Any:
        self.asked, self.options = prompts, options
        return SimpleNamespace(images=[Image.new("RGB", (4, 4))] * len(prompts))

    def interpolate(self, first: Any, second: Any, count: int, **options: Any) -> Any:
        return self([first] * count, **options)

    def edit(self, source: Image.Image, prompt: str, **options: Any) -> list[Image.Image]:
        self.asked, self.options = [prompt], options
        return [source]


@pytest.fixture
def drawer(monkeypatch: pytest.MonkeyPatch) -> Drawer:
    made = Drawer()
    monkeypatch.setattr("tasks.serve.load.load_pipeline", lambda *_, **__: made)
    return made


def test_a_prompt_that_reads_as_a_images_name_is_no_text(drawer: Drawer, tmp_path: Path) -> None:
    options = ["--database", "shapes", "--out", str(tmp_path / "a.png")]
    for name in ("photo.PNG", f"{tmp_path}/my photo.webp"):
        refused(run("generate", "red bar", name, *options), f"{name} does not exist; name a picture")
    (tmp_path / "torn.png").write_bytes(b"no picture")
    refused(run("generate", f"{tmp_path}/torn.png", *options), "torn.png is no picture that can be read")
    assert not (tmp_path / "a.png").exists()
    for name in ("my photo.png", "my photo.bmp"):
        Image.new("RGB", (5, 5)).save(tmp_path / name)
    texts = ("a drawing of what is called red.png", "photo.txt", "is this. a text " * 20)
    result = run("generate", *texts, f"{tmp_path}/my photo.png", f"{tmp_path}/my photo.bmp", *options)
    assert result.exit_code == 0, result.stderr
    assert drawer.asked[:3] == [*texts]
    assert [picture.size for picture in drawer.asked[3:]] == [(5, 5), (5, 5)]


@pytest.mark.parametrize("command", ["search", "generate", "edit", "evaluate", "merge", "subset"])
def test_foreign_folder_is_refused_without_trust(prefect_server: None, command: str, tmp_path: Path) -> None:
    with LoopbackServer({}) as internal:
        source = {"embeddings": {"uri": internal.url("/shapes/embeddings/0"), "digest": "0"}}
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
def test_few_images_make_a_row_and_many_a_grid(
    drawer: Drawer, tmp_path: Path, count: int, columns: int, rows: int
) -> None:
    options = ["--database", "shapes", "--between", str(count), "--out", str(tmp_path / "a.webp")]
    result = run("generate", "a", "b", *options)
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "a.webp").size == (4 * columns, 4 * rows)


def test_the_method_of_an_edit_may_be_chosen(drawer: Drawer, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command = ["edit", str(tmp_path / "a.png"), "red", "--database", "shapes", "--out", str(tmp_path / "b.png")]
    for given, method in (([], "local"), (["--method", "sdedit"], "sdedit"), (["--method", "restore"], "restore")):
        assert run(*command, *given).exit_code == 0
        assert drawer.options["method"] == method
    assert run(*command, "--method", "paint").exit_code == 2
    refused(run(*command, "--method", "sdedit", "--largest-region", "1"), "--largest-region is of the method local")


def test_edit_changes_a_region_with_the_embedded_generator(domain: Any, tmp_path: Path) -> None:
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


def test_edit_takes_any_generator_that_draws_pixels_and_repeats_itself(domain: Any, tmp_path: Path) -> None:
    Image.new("RGBA", (90, 70), (0, 0, 255, 200)).save(tmp_path / "blue.png")
    options = ["--database", "shapes", "--candidates", "1", "--largest-region", "1", "--root", str(domain.root)]
    pictures = []
    for name, seed in (("a.png", "5"), ("b.png", "5"), ("c.png", "6")):
        out = tmp_path / name
        result = run("edit", str(tmp_path / "blue.png"), "red", *options, "--seed", seed, "--out", str(out))
        assert result.exit_code == 0, result.stderr
        pictures.append(np.asarray(Image.open(out)))
    assert pictures[0].shape == (16, 16, 3)
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


def test_edit_refuses_what_is_no_image_and_numbers_without_meaning(domain: Any, tmp_path: Path) -> None:
    options = ["--database", "shapes", "--root", str(domain.root), "--out", str(tmp_path / "a.png")]
    refused(run("edit", f"{tmp_path}/none.png", "a", *options), "none.png does not exist")
    (tmp_path / "torn.png").write_bytes(b"no picture")
    refused(run("edit", f"{tmp_path}/torn.png", "a", *options), "torn.png is no picture that can be read")
    Image.new("RGB", (16, 16)).save(tmp_path / "fine.png")
    refused(run("edit", f"{tmp_path}/fine.png", " ", *options), "a prompt is empty")
    told = "strength is out of range: 2.0; give a number above 0"
    refused(run("edit", f"{tmp_path}/fine.png", "a", *options, "--strength", "2"), told)
    refused(
        run("edit", f"{tmp_path}/fine.png", "a", *options, "--largest-region", "0"),
        "largest_region is out of range: 0.0; give a number above 0",
    )


def test_search_refuses_a_image_that_pillow_finds_no_class_of_error_for(tmp_path: Path) -> None:
    (tmp_path / "bad.ppm").write_bytes(b"P6 x 3 255\n")
    with pytest.raises(ValueError, match="invalid literal"):
        Image.open(tmp_path / "bad.ppm")
    refused(run("search", "shapes", "--image", f"{tmp_path}/bad.ppm"), "bad.ppm is no picture that can be read (inv")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--recipe", "nope"), "no recipe nope; there are own_domain"),
        (("--recipe", "photos_h100"), "name their --autoencoder FOLDER"),
        (("--recipe", "stickers_h100", "--train"), "takes no --train; it decides that itself"),
    ],
)
def test_new_domain_refuses_recipes_that_do_not_fit(prefect_server: None, options: tuple[str, ...], told: str) -> None:
    refused(run("new-domain", "x", "--urls", "list.txt", *options), told)


def test_new_domain_passes_on_what_the_index_is_to_be(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[Any] = []

    def stopped(config: Any) -> None:
        configs.append(config)
        raise InputError("far enough")

    monkeypatch.setattr("flows.new_domain.new_domain", stopped)
    options = ("--index", "IVF64,SQ8", "--memory", "0.5", "--target-recall", "0.9", "--dedup")
    refused(run("new-domain", "x", "--urls", "list.txt", *options), "far enough")
    refused(run("new-domain", "x", "--urls", "list.txt"), "far enough")
    told, untold = (config.index for config in configs)
    assert (told.index, told.memory_bytes, told.target_recall, told.dedup) == ("IVF64,SQ8", 1 << 29, 0.9, True)
    assert (untold.index, untold.memory_bytes, untold.dedup) == ("auto", MEMORY_BYTES, False)
    refused(run("new-domain", "x", "--urls", "list.txt", "--target-recall", "2"), "target_recall is a share")


def test_commands_that_read_create_nothing_without_a_registry(prefect_server: None, tmp_path: Path) -> None:
    root = tmp_path / "new"
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
        refused(run(*arguments, "--root", str(root)), "no database is registered as", "registered: none at all")
    assert not root.exists()


def test_unknown_database_says_what_there_is(domain: Any) -> None:
    refused(
        run("search", "shape", "a", "--root", str(domain.root)),
        "no database is registered as models:/knn-database.shape@champion",
        "knn-database.shapes@champion",
    )


def test_unknown_folder_empty_query_and_odd_output_name(domain: Any, tmp_path: Path) -> None:
    root = str(domain.root)
    refused(run("search", f"{tmp_path}/none", "a", "--root", root), f"{tmp_path}/none holds no committed database")
    refused(run("search", "shapes", "  ", "--root", root), "the query is empty")
    options = ["--database", "shapes", "--root", root, "--out"]
    refused(run("generate", "a", *options, "picture"), "picture is no picture name; end it in .png")
    refused(run("generate", "a", *options, f"{tmp_path}/no/a.png"), f"the folder {tmp_path}/no does not exist")
    refused(run("generate", " ", *options, f"{tmp_path}/a.png"), "a prompt is empty")


@pytest.mark.parametrize(
    ("content", "told"),
    [("", "lists no URL"), ('{"link": "http://a/b.png"}\n', "has no column 'url', only link")],
)
def test_new_domain_refuses_an_unusable_list(prefect_server: None, tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / ("list.jsonl" if content else "list.txt")
    path.write_text(content)
    refused(run("new-domain", "x", "--urls", str(path), "--root", str(tmp_path / "data")), str(path), told)


def test_new_domain_refuses_a_missing_list_and_a_bad_name(prefect_server: None, tmp_path: Path) -> None:
    root = str(tmp_path)
    refused(run("new-domain", "x", "--urls", f"{tmp_path}/no.csv", "--root", root), "no.csv does not exist")
    refused(run("new-domain", "My Domain", "--urls", "a.csv", "--root", root), "'My Domain' must be lower-case")


def test_new_domain_makes_a_database_of_ones_own_list(domain: Any, tmp_path: Path) -> None:
    urls = write_urls(tmp_path / "urls.jsonl", [domain.server.url(f"/{c}-ring.png") for c in ("red", "blue", "green")])
    options = ["--root", str(tmp_path / "data"), "--allow-host", domain.server.host, "--no-train"]
    result = run("new-domain", "rings", "--urls", str(urls), *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == "models:/knn-database.rings@champion"
    found = json.loads(run("search", "rings", "a red ring", "--json", "--root", str(tmp_path / "data")).stdout)
    assert len(found) == 3
    assert found[0]["url"].endswith("/red-ring.png")


def test_without_permission_loopback_is_not_downloaded_from(domain: Any, tmp_path: Path) -> None:
    urls = write_urls(tmp_path / "urls.jsonl", [domain.server.url("/red-ring.png")])
    asked = len(domain.server.requests)
    result = run("new-domain", "rings", "--urls", str(urls), "--root", str(tmp_path / "data"))
    refused(result, "none of the 1 URLs", "blocked_address 1")
    assert len(domain.server.requests) == asked


def test_a_rebuild_with_nothing_to_do_says_so(domain: Any) -> None:
    result = run("rebuild-index", "shapes", "--urls", str(domain.urls), "--root", str(domain.root))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["models:/knn-database.shapes@champion stays as it is"]


def test_gc_lists_and_deletes_nothing_unless_told_to(living: Living, ray: WithoutRay) -> None:
    living.build(NAMES[:4])
    living.rebuild(takedown=living.listed({"url": living.server.url(NAMES[1])}, name="down.jsonl"), compact=True)
    before = living.files()
    command = ("gc", "shapes", "--keep", "1", "--grace-h", "0", "--root", str(living.root))
    listed = run(*command)
    assert living.files() == before
    deleted = run(*command, "--delete")
    assert listed.exit_code == deleted.exit_code == 0, listed.output + deleted.output
    assert "to delete (--delete does)" in listed.stderr
    assert listed.stdout == deleted.stdout
    going = [line.split()[1] for line in listed.stdout.splitlines()]
    assert any(uri.endswith(".tar") for uri in going)
    assert living.files().keys() == {name for name in before if f"{living.root}/shapes/{name}" not in going}


def test_gc_waits_for_another_writer_when_told_to(domain: Any) -> None:
    command = ("gc", "shapes", "--root", str(domain.root))
    with contextlib.ExitStack() as held:
        held.enter_context(lease(f"{domain.root}/shapes", holder="another"))
        refused(run(*command), "is being written by another")
        end = threading.Timer(0.5, held.close)
        end.start()
        result = run(*command, "--wait", "60")
        end.join()
    assert result.exit_code == 0, result.output
    assert "to delete (--delete does)" in result.stderr


def test_gc_lists_what_it_did_though_one_domain_is_refused(living: Living, ray: WithoutRay) -> None:
    living.garbage_beside_what_is_refused()
    before = living.files()
    result = run("gc", "--keep", "1", "--grace-h", "0", "--delete", "--root", str(living.root))
    assert result.exit_code == 1
    listed = {line.split()[1] for line in result.stdout.splitlines()}
    assert listed == {f"{living.root}/shapes/{name}" for name in before.keys() - living.files().keys()} != set()
    assert f"shapes: {len(listed)} files" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("knn-diffusion: 1 of 2 domains were not collected; aa: no version of aa is registered")


def test_what_upkeep_cannot_do_is_said_in_one_line(domain: Any, tmp_path: Path) -> None:
    root = ("--root", str(domain.root))
    refused(run("rebuild-index", "birds", *root), "no database is registered as models:/knn-database.birds@champion")
    refused(run("merge", "all", "shapes", *root), "databases names two or more")
    refused(run("subset", "reds", "shapes", "--where", "colour == 1", *root), "colour")
    empty = tmp_path / "takedown.txt"
    empty.write_text("http://nowhere/at-all.png\n")
    refused(run("rebuild-index", "shapes", "--takedown", str(empty), *root), "matches no image", "at-all.png")
