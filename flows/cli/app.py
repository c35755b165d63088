"""The ``knn-diffusion`` command.

Results go to standard output (only JSON with ``--json``); logs, progress and errors go to standard error. Exit codes:
0 for success, 1 for a failure that is reported on one line, 2 for wrong usage, 130 after Ctrl-C. Heavy imports are
inside the commands, so that ``--help`` is fast, and after the checks of :mod:`flows.cli.inputs`. ``demo`` and
``new-domain`` are here; the others are in the modules ``databases``, ``edit``, ``evaluate``, ``generate``,
``promotion``, ``service``, ``stack`` and ``upkeep``.
"""

import dataclasses
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import (
    Dedup,
    HostRate,
    Index,
    Memory,
    Quiet,
    Root,
    TargetRecall,
    Verbose,
    Verify,
    Wait,
    index_changes,
    prefect_server,
    print_traceback,
    report_errors,
    say,
)
from flows.cli.databases import databases, export, search
from flows.cli.edit import edit
from flows.cli.evaluate import evaluate
from flows.cli.generate import generate
from flows.cli.inputs import check_domain, check_encoder, check_folder, check_recipe
from flows.cli.promotion import history, lineage, promote, pull, push, rollback
from flows.cli.service import inspect, serve
from flows.cli.sources import Folder, OnlyFailed, UrlColumn, Urls, source_fields
from flows.cli.stack import cancel, deploy, down, run, runs, status, up
from flows.cli.upkeep import gc, merge, rebuild_index, relocate, subset


def demo(
    folder: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path("build/demo"),
    port: Annotated[
        int | None, typer.Option(help="Port of the local web server. Default: the last run's, or a free one.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Fine-tune the generator on the first domain (2,000 images).")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole pipeline on 5,400 emoji images: download, embed, index, register, generate, swap databases.

    Prints the paths of a figure and of a report, and three commands to try next.

    Example: knn-diffusion demo --folder build/demo
    """
    with report_errors(verbose, quiet), prefect_server(folder / "prefect"):
        from flows.demo.run import run_demo

        figure, report = run_demo(folder, port, train)
        sys.stderr.flush()
        say(figure)
        say(report)
        sys.stdout.flush()
        if not quiet:
            typer.echo(next_commands(folder / "data"), err=True)


def new_domain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Domain name: lower-case letters, digits, hyphens.")],
    urls: Urls = None,
    folder: Folder = None,
    url_column: UrlColumn = None,
    only_failed: OnlyFailed = False,
    root: Root = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT to allow although its address is not public. Repeatable.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Train a generator, or build only the database.")
    ] = False,
    texts: Annotated[str | None, typer.Option(help="Text file, one query per line, for recall and evaluation.")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="open_clip model: ViT-B-32/laion2b_s34b_b79k, hf-hub:… or local-dir:… Default: bundled sticker-clip."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Settings from flows/recipes.py: own_domain, demo_cpu, stickers_h100 or photos_h100.")
    ] = "own_domain",
    host_rate: HostRate = None,
    user_agent: Annotated[
        str | None,
        typer.Option(help="User-Agent, with a contact: NAME/1.0 (+mailto:YOU). Default: knn-diffusion/VERSION."),
    ] = None,
    robots_txt: Annotated[
        bool, typer.Option("--robots-txt", help="Skip URLs that the robots.txt of their site disallows.")
    ] = False,
    autoencoder: Annotated[
        str | None, typer.Option(help="Folder of a diffusers AutoencoderKL or VQModel; only for photos_h100.")
    ] = None,
    index: Index = None,
    memory: Memory = None,
    target_recall: TargetRecall = None,
    dedup: Dedup = None,
    verify: Verify = False,
    wait: Wait = 0.0,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Build a domain's database from a URL list or a folder of images, and register it.

    With --train, a generator is trained and registered too. A version becomes the champion if its gates pass.

    Example: knn-diffusion new-domain birds --urls birds.csv
    """
    with report_errors(verbose, quiet):
        given = {"train": train or None, "encoder": encoder, "autoencoder": autoencoder}
        options = {option: value for option, value in given.items() if value is not None}
        check_domain(name)
        check_recipe(recipe, options)
        check_folder("--autoencoder", autoencoder, "config.json")
        if encoder is not None:
            check_encoder(encoder)
        source = source_fields(urls, folder, url_column, only_failed, allow_hosts=allow_host or [])
        if user_agent is not None:
            from infra.download.user_agent import require_user_agent

            require_user_agent(user_agent)
        queries = _read_texts(texts)
        with prefect_server():
            from flows.new_domain import new_domain as flow
            from flows.recipes import RECIPES

            given_source = source["urls"] or source["folder"]  # recipes take one; replace() sets the right field
            config = RECIPES[recipe](
                name, given_source, root=root, texts=queries, allow_hosts=tuple(allow_host or ()), **options
            )
            changes = index_changes(index, memory, target_recall, dedup)
            requests = {"host_rate": host_rate, "user_agent": user_agent, "robots_txt": robots_txt or None}
            config = dataclasses.replace(
                config,
                download=config.download.with_policy(
                    **{name: value for name, value in requests.items() if value is not None}
                ),
                index=changes.over(config.index),
                wait_s=wait,
                verify=verify,
                **source,
            )
            domain = flow(config)
            say(domain.registered.alias_uri)
            if domain.trained is not None:
                say(domain.trained.registered.alias_uri)


def next_commands(root: Path) -> str:
    """Return commands to try after the demo, as the user can type them."""
    program = Path(sys.argv[0])
    command = program.name if shutil.which(program.name) == str(program.absolute()) else str(program)
    lines = (
        'search twemoji "a red apple" --html found.html',
        'generate "a smiling face" --database openmoji --out face.png',
        'edit face.png "a face with sunglasses" --database twemoji --out edited.png',
    )
    tried = (f"  {command} {line} --root {shlex.quote(str(root))}" for line in lines)
    served = f"  {command} serve --root {shlex.quote(str(root))}"
    return "\n".join(["", "Try next:", *tried, "In a browser, at http://127.0.0.1:8000:", served])


def _read_texts(path: str | None) -> tuple[str, ...]:
    """Return the lines of a file of texts, or none without a file."""
    if path is None:
        return ()
    from infra.formats.tables import read_lines

    return tuple(read_lines(path))


def _print_version(wanted: bool) -> None:
    """Print name and version, and exit, if ``--version`` is given."""
    if wanted:
        import importlib.metadata  # slow enough to notice in --help

        say(f"knn-diffusion {importlib.metadata.version('knn-diffusion')}")
        raise typer.Exit


app = typer.Typer(
    help="Generate images with a database of images: download, embed, index, search, train, generate, edit.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_LISTED = {
    "Start": (demo,),
    "Databases": (new_domain, rebuild_index, search, export, databases),
    "Generator": (generate, edit, evaluate),
    "Service": (serve, inspect),
    "Upkeep": (merge, subset, gc, relocate),
    "Operation": (up, status, down, deploy, run, runs, cancel),
    "Promotion": (promote, rollback, history, pull, push, lineage),
}
"""Commands by panel, in the order of ``--help``."""
for _panel, _commands in _LISTED.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of ``knn-diffusion`` itself."""


def main() -> None:
    """Entry point of the ``knn-diffusion`` command."""
    try:
        app()
    except Exception:  # the only place where a traceback is printed
        print_traceback()
        sys.exit(1)


if __name__ == "__main__":
    main()
