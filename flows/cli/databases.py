"""Commands that read databases: search, export and list."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import (
    DATABASE,
    Device,
    Quiet,
    Root,
    Trust,
    Verbose,
    age,
    open_image,
    report_errors,
    require_device,
    say,
    settings,
    table,
    writable,
)
from flows.cli.inputs import check_device, check_export, check_root

_HIT_COLUMNS = {"rank": "rank", "score": "score", "id": "id", "url": "url"}
_DATABASE_COLUMNS = {
    "name": "name",
    "version": "version",
    "rows": "rows",
    "recall_at_10_image": "recall@10 image",
    "recall_at_10_text": "recall@10 text",
    "encoder": "encoder",
    "aliases": "aliases",
    "bytes": "size",
    "created_ms": "age",
}


def search(
    database: Annotated[str, typer.Argument(metavar="DATABASE", help=DATABASE)],
    query: Annotated[str | None, typer.Argument(metavar="QUERY", help="Text to search for.")] = None,
    text: Annotated[str | None, typer.Option(help="Same as QUERY.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image to search for, in any format of a download.")] = None,
    k: Annotated[int, typer.Option(help="Number of neighbours; at most 500 with --html.", min=1)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the found images to a self-contained HTML page.")] = None,
    device: Device = "cpu",
    trust: Trust = False,
    root: Root = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Search a database for the nearest images of a text or an image, and show a table, JSON or an HTML page.

    Example: knn-diffusion search twemoji "a red heart" --k 5 --json
    """
    texts = [given for given in (query, text) if given is not None]
    if len(texts) + (image is not None) != 1:
        raise typer.BadParameter("give exactly one query: QUERY, --text TEXT or --image FILE")
    with report_errors(verbose, quiet):
        check_device(device)
        check_root(root)
        if html is not None:
            writable(html, "page", (".html", ".htm"))
        query_or_image = texts[0] if image is None else open_image(image)
        require_device(device)
        from tasks.serve.gallery import most_shown, write_gallery
        from tasks.serve.load import search_database

        if html is not None:
            most_shown(k)
        found = search_database(database, query_or_image, k, settings(root), trust=trust, device=device)
        if html is not None:
            name = "" if image is None else image.name
            write_gallery(html, query_or_image, found, settings(root).cache_folder, name=name)
        if as_json:
            print(json.dumps(found.rows, indent=1))
        elif html is not None:
            say(html)
        else:
            table(found.rows, _HIT_COLUMNS)


def export(
    database: Annotated[str, typer.Argument(metavar="DATABASE", help=DATABASE)],
    out: Annotated[Path, typer.Option(help="Folder to write to; it must be empty or not exist.")],
    kind: Annotated[str, typer.Option("--format", help="parquet, csv or clip-retrieval.")] = "parquet",
    trust: Trust = False,
    root: Root = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export the rows of a database with the columns of its URL list; clip-retrieval includes the embeddings.

    Example: knn-diffusion export birds --format csv --out birds-rows
    """
    with report_errors(verbose, quiet):
        check_root(root)
        check_export(kind, out)
        from tasks.serve.export import export_database

        exported = export_database(database, kind, out, settings(root), trust=trust)
        for file in exported.files:
            say(file)


def databases(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
    root: Root = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the registered databases: name, version, rows, recall, encoder, aliases, size and age.

    Example: knn-diffusion databases --json
    """
    with report_errors(verbose, quiet):
        check_root(root)
        from rich.filesize import decimal

        from infra.registry import Registry
        from infra.uris import masked

        listed = Registry(settings(root)).versions("database")
        if as_json:
            print(json.dumps(listed, indent=1))
            return
        if not listed:
            print(f"no databases are registered at {masked(settings(root).tracking_uri)}", file=sys.stderr)
            return
        shown = []
        for entry in listed:
            formatted = {"aliases": ", ".join(entry["aliases"]), "created_ms": age(entry["created_ms"])}
            if "bytes" in entry:
                formatted["bytes"] = decimal(entry["bytes"])
            shown.append({**entry, **formatted})
        table(shown, _DATABASE_COLUMNS)
