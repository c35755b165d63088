"""Commands of the service: serve, and inspect for the images that it generates."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import DATABASE, MODEL, Device, Quiet, Root, Trust, Verbose, report_errors, say, settings
from flows.cli.console import require_device as require_available
from flows.cli.inputs import check_device, check_root


def serve(
    model: Annotated[
        str | None,
        typer.Option(help=f"{MODEL} Default: the champion of knn-diffusion, or the bundled one without a champion."),
    ] = None,
    database: Annotated[
        list[str] | None,
        typer.Option(help=f"{DATABASE} Repeatable; the first is the default of a request. Default: all champions."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Interface to bind. Any other than loopback requires API keys or --allow-anonymous.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind; 0 chooses a free one.", min=0, max=65535)] = 8000,
    keys_file: Annotated[
        Path | None,
        typer.Option(help="File of accepted API keys, one per line, in addition to those of KNN_DIFFUSION_API_KEYS."),
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Accept requests without a key on every interface.")
    ] = False,
    device: Device = "cpu",
    trust: Trust = False,
    root: Root = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Serve search, generation and editing over HTTP, and the playground, if the extra web is installed.

    Databases and generators are swapped when their champion moves. Prints one line when the service is ready. SIGTERM
    finishes the accepted requests and exits with 0.

    Example: knn-diffusion serve --database birds --port 8000
    """
    with report_errors(verbose, quiet):
        check_device(device)
        check_root(root)
        from tasks.serve.api.config import ApiConfig
        from tasks.serve.api.keys import Keys
        from tasks.serve.service.config import ServiceConfig

        api = ApiConfig(host=host, keys=Keys.read(keys_file), allow_anonymous=allow_anonymous)
        config = ServiceConfig(model=model, databases=tuple(database or ()), device=device, trust=trust)
        from tasks.serve.api import server

        with server.bind(host, port) as bound:
            require_available(device)
            from tasks.serve.api.app import create_app
            from tasks.serve.service.engine import Engine

            here = settings(root)
            engine = Engine.open(config, here)
            app = create_app(here, engine=engine, api=api)

            def announce() -> None:
                names = [one.name for one in engine.databases() if one.served is not None]
                say(f"{server.address_of(bound)} serves {engine.info().model} with {', '.join(names)}")
                sys.stdout.flush()

            ending = server.run(app, engine, bound, api, announce)
        if not ending.drained:
            print(f"knn-diffusion: stopped; not all requests finished within {api.drain_s:g} s", file=sys.stderr)
            server.end_process(ending.exit_code)
        if ending.exit_code:
            print("knn-diffusion: interrupted; the accepted requests were answered", file=sys.stderr)
            raise typer.Exit(ending.exit_code)


def inspect(
    image: Annotated[Path, typer.Argument(metavar="FILE", help="PNG file that the service generated.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of lines.")] = False,
    verbose: Verbose = False,
) -> None:
    """Print where a generated image comes from: model, database, seed, settings, neighbours, and the nearest image.

    Example: knn-diffusion inspect heart.png
    """
    with report_errors(verbose):
        import json

        from tasks.serve.service.provenance import describe, read_provenance

        found = read_provenance(image)
        for line in [json.dumps(found)] if as_json else describe(found):
            say(line)
