"""The pipeline of the commands that generate and edit."""

import sys
from typing import TYPE_CHECKING

import typer

from flows.cli.console import settings

if TYPE_CHECKING:
    from infra.settings import Settings
    from model.pipeline import KNNDiffusionPipeline


def open_pipeline(
    context: typer.Context, model: str, database: str, device: str, *, root: str | None, trust: bool, quiet: bool
) -> "KNNDiffusionPipeline":
    """Open the generator, with a database, on a device. Without ``--model`` it may be the bundled one."""
    from tasks.serve.load import load_pipeline

    found = settings(root)
    pipeline = load_pipeline(_choose(context, model, found, quiet), database, found, trust=trust)
    pipeline.to(device)
    return pipeline


def _choose(context: typer.Context, model: str, settings: "Settings", quiet: bool) -> str:
    """Return ``model``, or the bundled generator if ``--model`` is not given and its default has no champion."""
    from infra.registry import Registry
    from infra.registry_tags import CHAMPION
    from model.saved_generator import BUNDLED_GENERATOR

    source = context.get_parameter_source("model")
    given = source is not None and source.name != "DEFAULT"
    if given:
        return model
    registered = [entry for entry in Registry(settings).versions("generator") if entry["name"] == model]
    if any(CHAMPION in entry["aliases"] for entry in registered):
        return model
    if not quiet:
        what = (
            "no version of {} is the champion yet (see history)" if registered else "no generator is registered as {}"
        )
        print(f"knn-diffusion: {what.format(model)}; using the bundled {BUNDLED_GENERATOR}", file=sys.stderr)
    return BUNDLED_GENERATOR
