"""Commands that keep databases: rebuild, merge, take a part, collect what no version needs."""

from typing import Annotated

import typer

from flows.cli.console import (
    DATABASE,
    Dedup,
    Index,
    Memory,
    Root,
    TargetRecall,
    Trust,
    Verbose,
    Verify,
    Wait,
    index_changes,
    report_errors,
    say,
    size,
)
from infra.prefect_server import prefect_api

Domain = Annotated[str, typer.Argument(help="The domain: lower-case letters, digits, hyphens.")]
Replace = Annotated[bool, typer.Option("--replace", help="Even where NAME holds pictures of its own.")]


def rebuild_index(
    name: Annotated[str, typer.Argument(help="The domain whose champion is rebuilt.")],
    urls: Annotated[str | None, typer.Option(help="URL list as of new-domain: only what is new is downloaded.")] = None,
    takedown: Annotated[
        str | None, typer.Option(help="List of what may not be shown again: a column url, sha256 or key.")
    ] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="Rewrite the shards that hold what was taken down.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again for URLs that failed.")] = False,
    index: Index = None,
    memory: Memory = None,
    target_recall: TargetRecall = None,
    dedup: Dedup = None,
    verify: Verify = False,
    wait: Wait = 0.0,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Add what is new to a domain's database, drop what was taken down; the result becomes the champion."""
    with report_errors(verbose), prefect_api():
        from flows.rebuild_index import RebuildIndexConfig
        from flows.rebuild_index import rebuild_index as flow

        config = RebuildIndexConfig(
            domain=name,
            urls=urls,
            takedown=takedown,
            compact=compact,
            retry_failed=retry_failed,
            index_changes=index_changes(index, memory, target_recall, dedup),
            root=root,
            wait_s=wait,
            verify=verify,
        )
        rebuilt = flow(config)
        if rebuilt.registered is None:
            say(f"models:/knn-database.{name}@champion stays as it is")
        else:
            say(rebuilt.registered.alias_uri)


def merge(
    name: Domain,
    databases: Annotated[list[str], typer.Argument(help=f"Two or more. {DATABASE}")],
    replace: Replace = False,
    index: Index = None,
    memory: Memory = None,
    target_recall: TargetRecall = None,
    dedup: Dedup = None,
    wait: Wait = 0.0,
    trust: Trust = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Make one database of several, without embedding a picture again."""
    with report_errors(verbose), prefect_api():
        from flows.combine_databases import MergeDatabasesConfig, merge_databases

        config = MergeDatabasesConfig(
            domain=name,
            databases=tuple(databases),
            index_changes=index_changes(index, memory, target_recall, dedup),
            replace=replace,
            trust=trust,
            root=root,
            wait_s=wait,
        )
        say(merge_databases(config).registered.alias_uri)


def subset(
    name: Domain,
    database: Annotated[str, typer.Argument(help=DATABASE)],
    where: Annotated[
        str, typer.Option(help="Filter on url, key, sha256, width, height: 'width >= 64 and url like \"%cat%\"'.")
    ],
    replace: Replace = False,
    index: Index = None,
    memory: Memory = None,
    target_recall: TargetRecall = None,
    dedup: Dedup = None,
    wait: Wait = 0.0,
    trust: Trust = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Make a database of a part of another, without embedding a picture again."""
    with report_errors(verbose), prefect_api():
        from flows.combine_databases import SubsetDatabaseConfig, subset_database

        config = SubsetDatabaseConfig(
            domain=name,
            database=database,
            where=where,
            index_changes=index_changes(index, memory, target_recall, dedup),
            replace=replace,
            trust=trust,
            root=root,
            wait_s=wait,
        )
        say(subset_database(config).registered.alias_uri)


def gc(
    name: Annotated[str | None, typer.Argument(help="The domain; all of them without.")] = None,
    keep: Annotated[int, typer.Option(help="Newest versions to keep beside all that has an alias.", min=1)] = 2,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it, only list.")] = False,
    grace_h: Annotated[float, typer.Option(help="Hours for which files stay whatever refers to them.", min=0)] = 24.0,
    wait: Wait = 0.0,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """List the files that no kept version refers to, and delete them with --delete."""
    with report_errors(verbose), prefect_api():
        from flows.collect_garbage import CollectGarbageConfig, NotAllCollectedError, collect_garbage

        config = CollectGarbageConfig(
            domain=name, root=root, keep_versions=keep, dry_run=not delete, grace_s=3600 * grace_h, wait_s=wait
        )
        refused = None
        try:
            collected = collect_garbage(config)
        except NotAllCollectedError as error:
            refused, collected = error, list(error.collected)
        for garbage in collected:
            for uri, count in garbage.files:
                say(f"{count:>12}  {uri}")
            done = "deleted" if delete else "to delete (--delete does)"
            typer.echo(f"{garbage.domain}: {len(garbage.files)} files, {size(garbage.bytes)} {done}", err=True)
        if refused is not None:
            raise refused
