"""Commands for registered versions: promote, rollback, history, pull, push and lineage."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import Root, Trust, Verbose, Wait, prefect_server, report_errors, say, settings, table
from flows.cli.inputs import check_root

Name = Annotated[str, typer.Argument(metavar="NAME", help="Domain, or knn-diffusion for generators.")]
_HISTORY_COLUMNS = {
    "at": "time (UTC)",
    "version": "version",
    "outcome": "outcome",
    "before": "before",
    "after": "after",
    "requester": "requester",
    "reason": "reason",
}


def promote(
    name: Name,
    version: Annotated[int | None, typer.Option(help="Version to promote. Default: the candidate.", min=1)] = None,
    force: Annotated[bool, typer.Option("--force", help="Promote even if gates fail. Needs --reason.")] = False,
    reason: Annotated[str, typer.Option(help="Reason to record.")] = "",
    approval: Annotated[
        bool, typer.Option("--approval", help="Require that the version has the tag approval=approved.")
    ] = False,
    wait: Wait = 0.0,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Make a version the champion if its gates pass, and record the decision. Exits with 1 if it is not promoted.

    Example: knn-diffusion promote birds --version 3
    """
    with report_errors(verbose):
        check_root(root)
        with prefect_server():
            from flows.promote_version import PromoteVersionConfig, promote_version
            from infra.errors import InputError
            from infra.registry_tags import champion_uri

            config = PromoteVersionConfig(
                name=name, version=version, root=root, approval=approval, force=force, reason=reason, wait_s=wait
            )
            decision = promote_version(config)
            for gate in decision.gates:
                typer.echo(str(gate), err=True)
            if decision.outcome == "pending":
                raise InputError(
                    f"version {decision.version} of {decision.name} is not approved; "
                    "set the tag approval=approved of the version and promote it again"
                )
            if not decision.moved:
                raise InputError(
                    f"version {decision.version} of {decision.name} was not promoted because gates failed; "
                    "build a better version, or use --force with --reason"
                )
            say(champion_uri(decision.name))


def rollback(
    name: Name,
    to: Annotated[int | None, typer.Option(help="Version to restore. Default: the previous champion.", min=1)] = None,
    reason: Annotated[str, typer.Option(help="Reason to record.")] = "",
    wait: Wait = 0.0,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Restore an earlier champion and pin it. Later versions stay candidates until you promote one.

    A rollback is refused if the version shows images that were taken down since.

    Example: knn-diffusion rollback birds --to 2 --reason "blurred images"
    """
    with report_errors(verbose):
        check_root(root)
        from infra.registry_tags import champion_uri
        from infra.storage.lease import lease
        from tasks.promote import promotion_folder, registered_name
        from tasks.promote import rollback as roll_back

        configured = settings(root)
        model = registered_name(name)
        with lease(promotion_folder(model, configured), holder=f"rollback {model}", wait_s=wait):
            decision = roll_back(model, to, configured, reason=reason)
        typer.echo(f"version {decision.version} is pinned; use promote to replace it", err=True)
        say(champion_uri(model))


def history(
    name: Name,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """List the promotion decisions of a domain or of the generators, newest first.

    Example: knn-diffusion history birds --json
    """
    with report_errors(verbose):
        check_root(root)
        from infra.promotions import Promotions
        from tasks.promote import registered_name

        decisions = Promotions(settings(root)).history(registered_name(name))
        if as_json:
            print(json.dumps(decisions, indent=1))
            return
        if not decisions:
            typer.echo(f"no decisions are recorded for {registered_name(name)}", err=True)
            return
        for decision in decisions:
            decision["at"] = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(decision["at_ms"] / 1000))
        table(decisions, _HISTORY_COLUMNS)


def pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Database or knn-diffusion: short name, models:/… or a folder.")
    ],
    to: Annotated[Path, typer.Option(help="Folder to copy to. An interrupted copy resumes.")],
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Copy a database or a generator to a folder that works without network and registry.

    Every file is checked against its digest.

    Example: knn-diffusion pull birds --to birds-copy
    """
    with report_errors(verbose):
        check_root(root)
        from tasks.pull import pull_database, pull_generator

        copy = pull_generator if _kind_of(name) == "generator" else pull_database
        copy(name, to, settings(root))
        say(to)


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder written by pull.")],
    name: Annotated[str, typer.Option(help="Domain of a database, or knn-diffusion for a generator.")],
    database: Annotated[
        str | None,
        typer.Option(help="Domain of a generator's default database. Default: the database that it was trained on."),
    ] = None,
    trust: Trust = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Register a folder written by pull as a candidate. Its files are checked, and copied below the root.

    A registered version is trusted like code, so a folder outside of the root needs --trust. An interrupted push
    resumes. Promote the candidate with promote.

    Example: knn-diffusion push birds-copy --name birds --trust
    """
    with report_errors(verbose):
        from infra.errors import InputError
        from infra.registry_tags import GENERATOR_NAME
        from tasks.push import kind_of, push_database, push_generator

        kind, is_generator = kind_of(folder), name == GENERATOR_NAME
        if is_generator != (kind == "generator"):
            raise InputError(f"{folder} holds a {kind}, which cannot be pushed as {name}; use another --name")
        if is_generator:
            registered = push_generator(folder, database, settings(root), trust=trust)
        elif database is not None:
            raise InputError("--database does not apply to a database; remove the option")
        else:
            registered = push_database(folder, name, settings(root), trust=trust)
        say(registered.uri)


def lineage(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Database or knn-diffusion: short name, models:/… or a folder.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print nested JSON objects.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print a Mermaid flowchart.")] = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Show what a database or generator was made from: databases, embeddings, images, URL lists and encoders.

    Example: knn-diffusion lineage knn-diffusion --graph
    """
    with report_errors(verbose):
        check_root(root)
        from infra.registry import Registry
        from tasks.references.lineage_graph import lineage_of, to_dict, to_mermaid, to_text

        pulled = Registry(settings(root)).pull(name, kind=_kind_of(name))
        node = lineage_of(pulled.manifest, pulled.folder_uri)
        if as_json:
            print(json.dumps(to_dict(node), indent=1))
        else:
            print(to_mermaid(node) if graph else to_text(node))


def _kind_of(name: str) -> str:
    """Return the kind of artifact that a registered name refers to."""
    from infra.registry_tags import GENERATOR_NAME

    bare = name.removeprefix("models:/").partition("@")[0].partition("/")[0]
    return "generator" if bare == GENERATOR_NAME else "database"
