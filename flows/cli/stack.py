"""Commands that operate a deployment: services, deployments and runs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import Root, Verbose, report_errors, say, settings, table

CHECKOUT = Path(__file__).parents[2]
Folder = Annotated[
    Path,
    typer.Option("--stack", envvar="KNN_DIFFUSION_STACK", help="Folder for the services' databases, logs and records."),
]
FOLDER = Path("~/.local/state/knn-diffusion")
DEFAULT_API = "http://127.0.0.1:4200/api"


def up(
    root: Root = None,
    stack: Folder = FOLDER,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's server.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's server.")] = 5000,
    ray_port: Annotated[int, typer.Option(help="Port of the Ray head.")] = 6379,
    server_python: Annotated[
        str | None,
        typer.Option(
            envvar="KNN_DIFFUSION_SERVER_PYTHON",
            help="Python with infra/deploy/prefect-server.txt installed. Default: an environment in --stack.",
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Start Ray, Prefect's server, MLflow's server and a worker on this machine, and wait until they are healthy.

    Prints the variables with which other commands use them. Services that run already are kept.

    Example: knn-diffusion up --root /srv/knn-diffusion-data
    """
    with report_errors(verbose):
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{prefect_port}/api"  # before Prefect is imported
        from infra import database_server, registry_database
        from infra.deploy import processes
        from infra.deploy.services import Stack, driver_environment, services

        here = settings(root)
        wanted = Stack(
            folder=stack.expanduser().absolute(),
            checkout=CHECKOUT,
            prefect_port=prefect_port,
            mlflow_port=mlflow_port,
            ray_port=ray_port,
            server_python=server_python,
        )
        database = registry_database.path_of(here.tracking_uri)
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
            registry_database.prepare(database, here.artifacts_uri)
        database_server.check(here.tracking_uri)
        *servers, worker = services(wanted, here)
        started = processes.start(servers, wanted.folder)
        from flows.deploy import create_automation

        create_automation()
        for one in [*started, *processes.start([worker], wanted.folder)]:
            print(f"{one.name}: healthy, process {one.pid}", file=sys.stderr)
        for name, value in driver_environment(wanted, here).items():
            say(f"export {name}={value}")


def status(stack: Folder = FOLDER, verbose: Verbose = False) -> None:
    """List the services that up started. Exits with 1 if one of them does not run.

    Example: knn-diffusion status
    """
    with report_errors(verbose):
        from infra.deploy.processes import read_started

        found = read_started(stack.expanduser())
        rows = [
            {"name": one.name, "pid": one.pid, "state": "running" if one.is_running() else "ended"} for one in found
        ]
        table(rows, {"name": "service", "pid": "process", "state": "state"})
        if not all(one.is_running() for one in found):
            raise typer.Exit(1)


def down(stack: Folder = FOLDER, verbose: Verbose = False) -> None:
    """Stop the services that up started, and no others.

    Example: knn-diffusion down
    """
    with report_errors(verbose):
        from infra.deploy import processes

        for name in processes.stop(stack.expanduser()):
            print(f"{name}: stopped", file=sys.stderr)


def deploy(verbose: Verbose = False) -> None:
    """Deploy prefect.yaml and domains.yaml, and delete deployments and schedules that they no longer contain.

    Example: knn-diffusion deploy
    """
    with report_errors(verbose):
        os.environ.setdefault("PREFECT_API_URL", DEFAULT_API)
        from flows.deploy import deploy as run_deploy

        done = run_deploy(CHECKOUT)
        for name in done.deployments:
            say(name)
        for name in (*done.deleted_deployments, *done.deleted_schedules):
            print(f"deleted: {name}", file=sys.stderr)


def run(
    deployment: Annotated[str, typer.Argument(metavar="DEPLOYMENT", help="FLOW/NAME, or NAME if both are equal.")],
    param: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE of a field of config, e.g. domain=birds. Repeatable."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the run until it ends.")] = True,
    verbose: Verbose = False,
) -> None:
    """Start a run of a deployment and follow it. Exits with 0 if it completes, 1 if it fails, 130 if it is cancelled.

    Example: knn-diffusion run new-domain --param domain=birds --param urls=/data/birds.parquet
    """
    with report_errors(verbose):
        os.environ.setdefault("PREFECT_API_URL", DEFAULT_API)
        from flows.deployment_runs import follow, link, start_run

        started = start_run(deployment, param or [])
        say(started.id)
        print(f"{started.name} {link(started.id)}", file=sys.stderr)
        if wait and (code := follow(started.id, lambda line: print(line, file=sys.stderr))):
            raise typer.Exit(code)


def runs(
    limit: Annotated[int, typer.Option(help="Number of runs.", min=1, max=200)] = 20, verbose: Verbose = False
) -> None:
    """List the newest runs of deployments.

    Example: knn-diffusion runs
    """
    with report_errors(verbose):
        os.environ.setdefault("PREFECT_API_URL", DEFAULT_API)
        from flows.deployment_runs import list_runs

        columns = {"id": "run", "name": "name", "state": "state", "start": "start", "seconds": "seconds"}
        table(list_runs(limit), columns)


def cancel(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of the run, from `knn-diffusion runs`.")],
    verbose: Verbose = False,
) -> None:
    """Cancel a run. Its committed shards and checkpoints remain, and another run resumes from them.

    Example: knn-diffusion cancel 01234567-89ab-cdef-0123-456789abcdef
    """
    with report_errors(verbose):
        os.environ.setdefault("PREFECT_API_URL", DEFAULT_API)
        from flows.deployment_runs import cancel as cancel_run

        say(cancel_run(run).name)
