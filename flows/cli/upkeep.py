"""Commands that maintain databases: rebuild, merge, subset and garbage collection."""

from typing import Annotated

import typer

from flows.cli.console import (
    DATABASE,
    Dedup,
    HostRate,
    Index,
    Memory,
    Quiet,
    Root,
    TargetRecall,
    Trust,
    Verbose,
    Verify,
    Wait,
    index_changes,
    prefect_server,
    report_errors,
    say,
    settings,
)
from flows.cli.inputs import check_domain, check_root, check_source_root, check_takedown_list
from flows.cli.sources import Folder, OnlyFailed, UrlColumn, Urls, source_fields

Domain = Annotated[str, typer.Argument(metavar="NAME", help="Domain name: lower-case letters, digits, hyphens.")]
Replace = Annotated[
    bool, typer.Option("--replace", help="Replace the database even if NAME was built from its own downloads.")
]


def rebuild_index(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Domain whose champion is rebuilt.")],
    urls: Urls = None,
    folder: Folder = None,
    url_column: UrlColumn = None,
    only_failed: OnlyFailed = False,
    takedown: Annotated[
        str | None, typer.Option(help="List of images to take down, with a column url, sha256 or key.")
    ] = None,
    compact: Annotated[
        bool,
        typer.Option(
            "--compact",
            help="Rewrite the shards that hold images taken down. By default, shards are rewritten once more than 10% "
            "of all rows are taken down.",
        ),
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Retry listed URLs that failed before.")] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Request stored URLs again, and replace the images that have changed.")
    ] = False,
    host_rate: HostRate = None,
    index: Index = None,
    memory: Memory = None,
    target_recall: TargetRecall = None,
    dedup: Dedup = None,
    verify: Verify = False,
    wait: Wait = 0.0,
    root: Root = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Add new images to a domain's database and hide images taken down.

    The result is registered, and becomes the champion if its gates pass.

    Example: knn-diffusion rebuild-index birds --urls birds.csv --takedown removed.csv
    """
    with report_errors(verbose, quiet):
        check_domain(name)
        check_root(root)
        source = source_fields(urls, folder, url_column, only_failed, optional=True)
        if takedown is not None:
            check_takedown_list(takedown)
        with prefect_server():
            from flows.rebuild_config import RebuildIndexConfig
            from flows.rebuild_index import rebuild_index as flow
            from infra.registry_tags import DATABASE_PREFIX, champion_uri

            config = RebuildIndexConfig(
                domain=name,
                **source,
                takedown=takedown,
                compact=compact,
                retry_failed=retry_failed,
                refresh=refresh,
                host_rate=host_rate,
                index_changes=index_changes(index, memory, target_recall, dedup),
                root=root,
                wait_s=wait,
                verify=verify,
            )
            rebuilt = flow(config)
            if rebuilt.registered is None:
                say(f"{champion_uri(DATABASE_PREFIX + name)} is unchanged")
            else:
                say(rebuilt.registered.alias_uri)


def merge(
    name: Domain,
    databases: Annotated[list[str], typer.Argument(metavar="DATABASES", help=f"Two or more databases. {DATABASE}")],
    replace: Replace = False,
    index: Index = None,
    memory: Memory = None,
    target_recall: TargetRecall = None,
    dedup: Dedup = None,
    wait: Wait = 0.0,
    trust: Trust = False,
    root: Root = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Merge databases into one, without embedding an image again. What any of them has taken down stays hidden.

    Example: knn-diffusion merge emoji twemoji openmoji
    """
    with report_errors(verbose, quiet):
        from infra.errors import InputError

        check_domain(name)
        if len(databases) < 2:
            raise InputError(f"DATABASES has too few entries: {len(databases)}; give two or more")
        check_source_root(root, *databases)
        with prefect_server():
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
    database: Annotated[str, typer.Argument(metavar="DATABASE", help=DATABASE)],
    where: Annotated[
        str,
        typer.Option(
            help="Filter on url, key, sha256, width, height and columns of the list: 'id > 3 and url like \"%cat%\"'."
        ),
    ],
    replace: Replace = False,
    index: Index = None,
    memory: Memory = None,
    target_recall: TargetRecall = None,
    dedup: Dedup = None,
    wait: Wait = 0.0,
    trust: Trust = False,
    root: Root = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a database from the rows of another that match a filter, without embedding an image again.

    Example: knn-diffusion subset cats twemoji --where 'url like "%cat%"'
    """
    with report_errors(verbose, quiet):
        check_domain(name)
        check_source_root(root, database)
        with prefect_server():
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


def relocate(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="Root that was moved or copied to another path.")],
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Rewrite the absolute paths in a root that was moved or copied, in its registry too.

    Example: knn-diffusion relocate /data/birds-copy
    """
    with report_errors(verbose, quiet):
        check_root(root)
        from infra.relocation import relocate as rewrite

        done = rewrite(settings(root))
        if not done.former:
            typer.echo(f"{root} holds no path of another root", err=True)
        for former in done.former:
            say(f"{done.files} files rewritten: {former} is now {root}")


def gc(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Domain. Default: all domains.")] = None,
    keep: Annotated[
        int, typer.Option(help="Newest versions to keep, in addition to all versions with an alias.", min=1)
    ] = 2,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the files. Default: only list them.")] = False,
    grace_h: Annotated[float, typer.Option(help="Hours for which new files are kept in any case.", min=0)] = 24.0,
    wait: Wait = 0.0,
    root: Root = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the files that no retained version references; delete them with --delete.

    Example: knn-diffusion gc twemoji --keep 2 --delete
    """
    with report_errors(verbose, quiet):
        check_root(root)
        with prefect_server():
            from rich.filesize import decimal

            from flows.collect_garbage import CollectGarbageConfig, NotAllCollectedError, collect_garbage

            config = CollectGarbageConfig(
                domain=name, root=root, keep_versions=keep, dry_run=not delete, grace_s=3600 * grace_h, wait_s=wait
            )
            failure = None
            try:
                collected = collect_garbage(config)
            except NotAllCollectedError as error:
                failure, collected = error, list(error.collected)
            for garbage in collected:
                for uri, count in garbage.files:
                    say(f"{count:>12}  {uri}")
                done = "deleted" if delete else "to delete (run again with --delete)"
                typer.echo(f"{garbage.domain}: {len(garbage.files)} files, {decimal(garbage.bytes)} {done}", err=True)
            if failure is not None:
                raise failure
