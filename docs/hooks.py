"""MkDocs hooks: generate the command line and configuration references from the code, show markers of code blocks.

The command line is read from the Typer application. Configurations are read from the source of their dataclasses,
because the comment behind a field describes it and is not available at run time.
"""

import ast
import functools
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
MARKERS = {"gpu": "Needs a GPU", "cluster": "Needs servers or a cluster", "slow": "Takes minutes to hours"}
"""Markers in the info string of a code block, and the title that the reader sees."""
PACKAGES = ("flows", "tasks", "model", "infra")
_CONFIG_NAME = re.compile(r"^[A-Z]\w*(Config|Policy|Changes)$")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, "reference/cli.md", content=cli_page()))
    files.append(File.generated(config, "reference/configuration.md", content=configuration_page()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker of a code block by a title."""
    fence = rf"^( *```\w+) ({'|'.join(MARKERS)})$"
    return re.sub(fence, lambda match: f'{match[1]} title="{MARKERS[match[2]]}"', markdown, flags=re.MULTILINE)


def cli_page() -> str:
    """Return the page of all commands, arguments and options."""
    sys.path.insert(0, str(ROOT))
    try:
        import typer

        from flows.cli.app import app
    finally:
        sys.path.remove(str(ROOT))
    lines = [
        "# Command line",
        "",
        "This page is generated from the `knn-diffusion` command. `knn-diffusion COMMAND --help` prints the same text.",
        "",
    ]
    commands = typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    for (name, command), registered in zip(commands, app.registered_commands, strict=True):
        types = get_type_hints(registered.callback)
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        usage = " ".join(["knn-diffusion", name, "[OPTIONS]", *(_usage(argument) for argument in arguments)])
        lines += [f"## {name}", "", _cell(command.help or "", keep_paragraphs=True), ""]
        lines += ["```text", usage, "```", ""]
        for title, parameters in (("Argument", arguments), ("Option", options)):
            if parameters:
                lines += [f"| {title} | Type | Default | Description |", "| --- | --- | --- | --- |"]
                lines += [_row(parameter, types[parameter.name]) for parameter in parameters]
                lines += [""]
    return "\n".join(lines)


def configuration_page() -> str:
    """Return the page of all configuration dataclasses."""
    lines = [
        "# Configuration",
        "",
        "This page is generated from the configuration dataclasses. Flows take them as the parameter `config`, in",
        "Python, in `prefect.yaml`, or as JSON. Fields without a default are required. A field of another",
        "configuration is given as a nested object.",
        "",
    ]
    for package in PACKAGES:
        paths = [path for path in sorted((ROOT / package).rglob("*.py")) if "pretrained" not in path.parts]
        found = [entry for path in paths for entry in _configs(path)]
        if not found:
            continue
        lines += [f"## {package}", ""]
        for module, node, comments in found:
            lines += [f"### {node.name}", "", f"`{module}.{node.name}`", ""]
            summary, described = _docstring(node)
            lines += [_cell(summary, keep_paragraphs=True), ""]
            lines += ["| Field | Type | Default | Description |", "| --- | --- | --- | --- |"]
            lines += [_field(module, field, comments, described) for field in _fields(node)] + [""]
    return "\n".join(lines)


def _configs(path: Path) -> Iterator[tuple[str, ast.ClassDef, dict[int, str]]]:
    """Yield module, class and comments by line of the configuration dataclasses in ``path``."""
    source = path.read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    chosen = [node for node in classes if _CONFIG_NAME.match(node.name) and _is_dataclass(node) and any(_fields(node))]
    if chosen:
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {
            token.start[0]: token.string.lstrip("# ").partition("  # ")[0]
            for token in tokens
            if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:", "# fmt:"))
        }
        yield from ((_module(path), node, comments) for node in chosen)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    fields = [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]
    return [field for field in fields if "ClassVar" not in ast.unparse(field.annotation)]


def _docstring(node: ast.ClassDef) -> tuple[str, dict[str, str]]:
    """Return the text of a class docstring, and the descriptions of its section "Attributes"."""
    text, _, section = (ast.get_docstring(node) or "").partition("\nAttributes:\n")
    section = section.partition("\n\n")[0]
    entries = re.split(r"^    (?=\w+: )", section, flags=re.MULTILINE)
    return text.strip(), dict(entry.split(": ", 1) for entry in entries if ": " in entry)


def _field(module: str, field: ast.AnnAssign, comments: dict[int, str], described: dict[str, str]) -> str:
    """Return the table row of a field, described by the docstring or by the comment on its lines."""
    own = range(field.lineno, (field.end_lineno or field.lineno) + 1)
    said = " ".join(comments[line] for line in own if line in comments)
    name = ast.unparse(field.target)
    said = described.get(name) or said
    value = "required" if field.value is None else _code(_default(module, field.value))
    return f"| `{name}` | {_code(_annotation(field.annotation))} | {value} | {_cell(said)} |"


def _annotation(annotation: ast.expr) -> str:
    """Return an annotation without its bounds, which the description or the default makes plain."""
    if isinstance(annotation, ast.BinOp):
        return f"{_annotation(annotation.left)} | {_annotation(annotation.right)}"
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)  # noqa: S101 - for the type checker
        return ast.unparse(annotation.slice.elts[0])
    return ast.unparse(annotation)


def _default(module: str, value: ast.expr) -> str:
    """Return the default as written: constants by value, a ``default_factory`` as the call that it makes."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        for keyword in value.keywords:
            if keyword.arg == "default":
                return _default(module, keyword.value)
            if keyword.arg == "default_factory":
                factory = keyword.value
                return ast.unparse(factory.body) if isinstance(factory, ast.Lambda) else f"{ast.unparse(factory)}()"
    if isinstance(value, ast.Name):
        return _constant(module, value.id)
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.attr.isupper():
        return _constant(_imports(module).get(value.value.id, ""), value.attr)
    return ast.unparse(value)


def _constant(module: str, name: str) -> str:
    """Return the value of a module's constant, which may be imported from another module of this project."""
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        return name
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and name in {ast.unparse(target) for target in node.targets}:
            return ast.unparse(node.value)
    origin, _, original = _imports(module).get(name, "").rpartition(".")
    return _constant(origin, original) if origin else name


@functools.cache
def _imports(module: str) -> dict[str, str]:
    """Return what ``from ... import ...`` binds in a module: local name to dotted name."""
    source = (ROOT / Path(*module.split(".")).with_suffix(".py")).read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in nodes for alias in node.names}


def _usage(argument: Any) -> str:
    name = (argument.name or "").upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _row(parameter: Any, annotation: Any) -> str:
    names = [parameter.name.upper()] if parameter.param_type_name == "argument" else parameter.opts
    title = ", ".join(f"`{name}`" for name in [*names, *parameter.secondary_opts])
    shown = "required" if parameter.required else "" if parameter.default is None else f"`{parameter.default}`"
    return (
        f"| {title} | {_cell(_type(annotation))} | {_cell(shown)} | {_cell(getattr(parameter, 'help', None) or '')} |"
    )


def _type(annotation: Any) -> str:
    """Return a parameter's type in words: optional types without None, the choices of a Literal."""
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is list:
        return f"{_type(get_args(annotation)[0])}, repeatable"
    if parts := [part for part in get_args(annotation) if part is not type(None)]:
        return _type(parts[0])
    return {str: "text", int: "integer", float: "number", bool: "flag", Path: "path"}[annotation]


def _code(text: str) -> str:
    """Return ``text`` as code for a table, where a pipe needs no escape."""
    return f"`{' '.join(text.split())}`"


def _cell(text: str, *, keep_paragraphs: bool = False) -> str:
    """Return ``text`` as Markdown: on one line for a table, reST roles and double backticks as code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    if keep_paragraphs:
        return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
    return " ".join(text.split()).replace("|", "\\|")
