"""The documentation: its commands and snippets run, its links lead somewhere, its tables are complete.

A fenced block runs as written, in the order of its page, unless its info string has a marker:

    ```bash gpu        needs a GPU
    ```bash cluster    needs servers, a cluster or an object store
    ```bash slow       takes minutes

Commands of marked blocks are parsed by the real command line, and the imports of marked Python blocks are resolved.
"""

import ast
import dataclasses
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import style
import typer
import yaml
from support import tiny_models
from support.changing_domain import BODY, NAMES
from support.fakes import LoopbackServer, Reply, WithoutRay
from typer.testing import CliRunner

from flows.cli.app import app
from infra.download.outcomes import ERROR_CLASSES
from infra.formats.webdataset import DUPLICATE, TAKEN_DOWN
from infra.settings import Settings

ROOT = Path(__file__).parents[1]
MARKS = {"gpu", "cluster", "slow"}
LANGUAGES = {"bash", "python", "text", "json", "mermaid", "yaml"}
GENERATED = {"docs/reference/cli.md", "docs/reference/configuration.md"}
OTHER_PROGRAMS = {"./run.sh", "curl", "mlflow", "npm", "pip", "prefect", "ray", "tar", "unzip", ".venv/bin/pre-commit"}

PROJECT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
CARDS = sorted((ROOT / "model/pretrained").glob("*/README.md"))
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: language, markers, text, and the line that it starts at."""

    language: str
    marks: frozenset[str]
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    source = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(source):
        language, *marks = re.sub(r'\w+="[^"]*"', "", match["info"]).split() or [""]
        text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        found.append(Block(language, frozenset(marks), text, source.count("\n", 0, match.start()) + 1))
    return found


def commands_of(text: str) -> list[list[str]]:
    """Return the commands of a shell block as words, without comments."""
    return [words for line in text.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


RUNNABLE = [page for page in [*PROJECT, *DOCS] if any(b.language in ("bash", "python") for b in blocks_of(page))]
# Garbage collection of the takedown guide deletes versions that other pages name, so that page comes last.
RUNNABLE.sort(key=lambda page: page.name == "take-down-images.md")


class Workspace:
    """A folder with the files and databases that the documentation assumes, in which pages run."""

    def __init__(self, folder: Path, server: LoopbackServer) -> None:
        """Write the input files; databases are built by :meth:`prepare`."""
        self.folder = folder
        self.env: dict[str, str] = {}
        lists = {"birds.txt": NAMES[:16], "birds-now.txt": NAMES[:20], "fish.txt": NAMES[20:32]}
        for name, paths in lists.items():
            (folder / name).write_text("".join(f"{server.url(path)}\n" for path in paths))
        (folder / "removed.csv").write_text(f"url\n{server.url(NAMES[1])}\n")
        (folder / "queries.txt").write_text("a red circle\na green ring\na blue square\na cross\n")
        (folder / "photo.jpg").write_bytes(BODY[NAMES[0]])
        (folder / "model").mkdir()
        (folder / "model" / "pretrained").symlink_to(ROOT / "model" / "pretrained")
        (folder / "build" / "demo").mkdir(parents=True)
        (folder / "build" / "demo" / "data").symlink_to(folder / Settings().root)

    def prepare(self) -> None:
        """Build the databases, and register the bundled generator (here a tiny one) as the champion."""
        from flows.adopt_generator import AdoptGeneratorConfig, adopt_generator
        from infra.promotions import Promotions
        from infra.registry_tags import GENERATOR_NAME
        from tasks.evaluate.config import EvaluateConfig

        for name, urls in {"birds": "birds", "fish": "fish", "twemoji": "fish", "openmoji": "fish"}.items():
            self.run(["new-domain", name, "--urls", f"{urls}.txt"])
        (database,) = (self.folder / Settings().root / "birds" / "database").iterdir()
        evaluate = EvaluateConfig(samples=4, bootstrap=0, seeds=2, diversity_prompts=1)
        adopt_generator(AdoptGeneratorConfig(domain="birds", database=str(database), evaluate=evaluate))
        Promotions(Settings()).move(GENERATOR_NAME, 1)  # untrained, so neighbours may lower its score

    def run(self, arguments: list[str]) -> None:
        """Run the command in this process; it must succeed."""
        arguments = [*arguments]
        if "--samples" in arguments:
            arguments[arguments.index("--samples") + 1] = "4"  # as many as can be measured
        result = CliRunner().invoke(app, arguments, env=self.env)
        assert result.exit_code == 0, f"{shlex.join(arguments)}\n{result.output}\n{result.exception!r}"

    def execute(self, block: Block, namespace: dict[str, Any]) -> None:
        """Run a block, or check it if it has a marker."""
        if block.language == "python":
            tree = ast.parse(block.text)
            if block.marks:
                resolve_imports(tree)
            else:
                exec(compile(tree, "<documentation>", "exec"), namespace)  # noqa: S102
        else:
            for words in commands_of(block.text):
                self.execute_command(words, block.marks)

    def execute_command(self, words: list[str], marks: frozenset[str]) -> None:
        """Run one shell command, or check it if its block has a marker or it is not this project's."""
        match words:
            case ["knn-diffusion", *arguments] if not marks and arguments[0] != "demo":
                self.run(arguments)
            case ["knn-diffusion", *arguments]:
                parse(arguments)
            case ["export", assignment] if not marks:
                name, value = assignment.split("=")
                self.env[name] = value
            case ["unset", name]:
                del self.env[name]
            case ["export", _] | ["source", ".venv/bin/activate"]:
                pass
            case ["make", *targets]:
                subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)
            case [".venv/bin/python", "-m", "pytest", *paths]:
                assert all(path.startswith("-") or (ROOT / path).exists() for path in paths)
            case ["python", script, *arguments] if marks:
                check_script(ROOT / script, arguments)
            case ["prefect", "deployment", "run", name, "--param", parameter]:
                validate_parameters(name, parameter)
            case [program, *_]:
                assert program in OTHER_PROGRAMS, f"no check for {program}; add one, or leave the command out"
                assert marks or program == ".venv/bin/pre-commit", f"mark the block of {program}"


def parse(arguments: list[str]) -> None:
    """Parse a ``knn-diffusion`` command: its options exist and its values have their types."""
    name, *rest = arguments
    command: Any = typer.main.get_command(app)
    assert name in command.commands, f"no command {name}"
    command.commands[name].make_context(name, rest).close()


def check_script(script: Path, arguments: list[str]) -> None:
    """Check that a script of a recipe exists, and that its folder defines the options."""
    sources = "".join(path.read_text() for path in (script, *script.parent.glob("*_recipe/*.py")))
    for option in (argument.removeprefix("--") for argument in arguments if argument.startswith("--")):
        assert f'"{option}"' in sources or f'"--{option}"' in sources, f"{script.name} has no option --{option}"


def resolve_imports(tree: ast.Module) -> None:
    """Import what a snippet imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


def validate_parameters(name: str, parameter: str) -> None:
    """Check that a deployment exists and takes the parameter."""
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    (entrypoint,) = (entry["entrypoint"] for entry in deployments if f"{entry['name']}/{entry['name']}" == name)
    module, function = entrypoint.replace("/", ".").split(".py:")
    flow: Any = getattr(importlib.import_module(module), function)
    key, _, value = parameter.partition("=")
    flow.validate_parameters({key: json.loads(value)})


def tiny_generator(folder: Path) -> None:
    """Save an untrained 16 px pipeline in the space of the bundled encoder."""
    from model.encoder.clip import BUNDLED_ENCODER, Encoder
    from model.pipeline import new_pipeline

    identity = Encoder(BUNDLED_ENCODER).identity
    network = tiny_models.network(identity.dimension, image_size=16)
    defaults = {"neighbours": 3, "candidates": 2, "num_inference_steps": 2, "query": "mean"}
    new_pipeline(network, identity, **defaults).save_pretrained(folder)


@pytest.fixture(scope="module")
def workspace(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Yield the prepared workspace as the current folder: no Ray, tiny generators, loopback counts as public."""
    from infra.download import pacing, public_addresses, safe_urlopen
    from model import saved_generator

    folder = tmp_path_factory.mktemp("docs")
    replies = {path: Reply(body=body) for path, body in BODY.items()}
    with pytest.MonkeyPatch.context() as patch, LoopbackServer(replies) as server:
        WithoutRay().install(patch)
        for name in saved_generator.BUNDLED_GENERATORS:
            tiny_generator(folder / "pretrained" / name / "pipeline")
        patch.setattr(saved_generator, "_PRETRAINED", folder / "pretrained")
        for module in (public_addresses, safe_urlopen):  # the check in advance, and the download's own
            patch.setattr(module, "is_public", lambda address: True)
        patch.setattr(pacing.HostPacer, "wait", lambda *_: 0.0)  # the server is one host
        patch.setenv("KNN_DIFFUSION_CACHE", str(folder / "cache"))
        (folder / "work").mkdir()
        patch.chdir(folder / "work")
        prepared = Workspace(folder / "work", server)
        prepared.prepare()
        yield prepared


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_commands_and_snippets_run(page: Path, workspace: Workspace) -> None:
    workspace.env.clear()
    namespace: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.language in ("bash", "python"):
            try:
                workspace.execute(block, namespace)
            except Exception as error:
                raise AssertionError(f"{page.relative_to(ROOT)}:{block.line} does not run: {error}") from error


@pytest.mark.parametrize(
    "command", ["search birds owl --no-such-option", "search birds owl --k many", "find birds", "gc --keep 0"]
)
def test_parse_refuses_what_the_command_line_refuses(command: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|valid integer|no command|greater than or equal"):
        parse(shlex.split(command))


def test_marked_snippet_with_an_unknown_import_fails() -> None:
    with pytest.raises(ModuleNotFoundError):
        resolve_imports(ast.parse("from tasks.serve.load import no_such_function"))


def test_blocks_have_known_languages_and_markers() -> None:
    for page in [*PROJECT, *DOCS]:
        for block in blocks_of(page):
            where = f"{page.relative_to(ROOT)}:{block.line}"
            assert block.language in LANGUAGES, f"{where} has the language {block.language!r}"
            assert block.marks <= MARKS, f"{where} has the markers {sorted(block.marks)}"


def test_commands_are_in_fenced_blocks() -> None:
    command = re.compile(r"^ {4,}(?:\.venv/bin/|knn-diffusion |make |pip |prefect |ray )", re.MULTILINE)
    for page in [*PROJECT, *DOCS]:
        outside = _FENCE.sub("", page.read_text(encoding="utf-8"))
        assert not command.search(outside), f"{page.relative_to(ROOT)} has a command in an indented block"


@pytest.mark.parametrize("page", [*PROJECT, *DOCS, *CARDS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        name, _, anchor = target.partition("#")
        if re.match(r"https?:", name):
            continue
        path = (page.parent / name).resolve() if name else page
        relative = str(path.relative_to(ROOT))
        if relative in GENERATED:
            continue
        assert path.exists(), f"{page.relative_to(ROOT)} links to {target}"
        if anchor:
            assert anchor in anchors_of(path), f"{page.relative_to(ROOT)} links to {target}, which has no such heading"


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_screenshot_is_small() -> None:
    assert (ROOT / "docs/images/search.png").stat().st_size <= 300_000


def test_settings_page_lists_every_variable() -> None:
    page = (ROOT / "docs/reference/settings.md").read_text(encoding="utf-8")
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        names = getattr(alias, "choices", [alias or f"KNN_DIFFUSION_{name.upper()}"])
        assert all(f"`{variable}`" in page for variable in names), names


def test_error_class_page_lists_every_value() -> None:
    page = (ROOT / "docs/reference/error-classes.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert {*ERROR_CLASSES, DUPLICATE, TAKEN_DOWN} <= listed


def test_site_builds_and_documents_every_command_and_configuration(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True)
    assert built.returncode == 0, built.stderr.decode()
    commands = (tmp_path / "reference/cli.html").read_text(encoding="utf-8")
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f'id="{name}"' in commands
    configurations = (tmp_path / "reference/configuration.html").read_text(encoding="utf-8")
    for name in ("newdomainconfig", "downloadpolicy", "indexconfig", "trainconfig", "editconfig"):
        assert f'id="{name}"' in configurations


def test_checked_pages_have_no_banned_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert style.main() == 0, capsys.readouterr().out


def test_style_findings_names_line_and_word() -> None:
    text = "one line\nit is " + "to" + "ld twice"
    assert [(line, word) for line, word, _ in style.findings(text)] == [(2, "to" + "ld")]
