"""Command that evaluates a generator: ``evaluate``."""

from typing import Annotated

import typer

from flows.cli.console import (
    DATABASE,
    MODEL,
    Quiet,
    Root,
    Trust,
    Verbose,
    prefect_server,
    report_errors,
    say,
)
from flows.cli.inputs import check_root


def evaluate(
    databases: Annotated[
        list[str], typer.Argument(metavar="DATABASES", help=f"Databases to retrieve from. {DATABASE}")
    ],
    model: Annotated[str, typer.Option(help=MODEL)] = "knn-diffusion",
    texts: Annotated[
        str | None, typer.Option(help="Text file, one prompt per line. Default: images of the database as prompts.")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Images per condition: two conditions, about ten with ablations.", min=4)
    ] = 256,
    ablations: Annotated[bool, typer.Option(help="Also evaluate other queries and numbers of neighbours.")] = True,
    inception: Annotated[
        str | None, typer.Option(help="File of torch-fidelity's Inception weights, to compute FID.")
    ] = None,
    gpu: Annotated[bool, typer.Option(help="Generate on a GPU.")] = False,
    trust: Trust = False,
    root: Root = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Evaluate a generator on databases, and write scores, figures and the closest copies to one page.

    With several databases, the effect of swapping them is measured too.

    Example: knn-diffusion evaluate twemoji openmoji --texts prompts.txt --samples 256
    """
    with report_errors(verbose, quiet):
        check_root(root)
        with prefect_server():
            from flows.evaluate_generator import EvaluateGeneratorConfig, evaluate_generator
            from tasks.evaluate.task import EvaluateConfig

            evaluate_config = EvaluateConfig(
                samples=samples, ablations=ablations, inception_weights=inception, use_gpu=gpu
            )
            config = EvaluateGeneratorConfig(
                databases=tuple(databases),
                generator=model,
                texts=texts,
                root=root,
                evaluate=evaluate_config,
                trust=trust,
            )
            say(evaluate_generator(config).report.reference.uri + "/evaluation.html")
