"""Commands that look into databases: search them, list them."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import (
    DATABASE,
    Root,
    Trust,
    Verbose,
    age,
    open_image,
    report_errors,
    say,
    settings,
    size,
    table,
    writable,
)

_FOUND = {"rank": "rank", "score": "score", "id": "id", "url": "url"}
_LISTED = {
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
    database: Annotated[str, typer.Argument(help=DATABASE)],
    query: Annotated[str | None, typer.Argument(help="What to look for, in words.")] = None,
    text: Annotated[str | None, typer.Option(help="The same as QUERY.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to look for: PNG, JPEG or WebP.")] = None,
    k: Annotated[int, typer.Option(help="Neighbours to show.", min=1)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list on standard output.")] = False,
    html: Annotated[Path | None, typer.Option(help="Page of the pictures to write, whole in one file.")] = None,
    trust: Trust = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Show the nearest images of a text or of a picture, as a table, as JSON or as a page of pictures."""
    texts = [given for given in (query, text) if given is not None]
    if len(texts) + (image is not None) != 1:
        raise typer.BadParameter("give one query: words, or --text TEXT, or --image FILE")
    with report_errors(verbose):
        from tasks.serve.gallery import most_shown, write_gallery
        from tasks.serve.load import search_database

        if html is not None:
            writable(html, "page", (".html", ".htm"))
            most_shown(k)
        sought = texts[0] if image is None else open_image(image)
        found = search_database(database, sought, k, settings(root), trust=trust)
        if html is not None:
            name = "" if image is None else image.name
            write_gallery(html, sought, found, settings(root).cache_folder, name=name)
        if as_json:
            print(json.dumps(found.rows, indent=1))
        elif html is not None:
            say(html)
        else:
            table(found.rows, _FOUND)


def databases(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list on standard output.")] = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """List registered databases: name, version, rows, recall, encoder, aliases, size, age."""
    with report_errors(verbose):
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
            words = {"aliases": ", ".join(entry["aliases"]), "created_ms": age(entry["created_ms"])}
            if "bytes" in entry:
                words["bytes"] = size(entry["bytes"])
            shown.append({**entry, **words})
        table(shown, _LISTED)
