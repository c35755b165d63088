"""Command that edits an image: ``edit``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows.cli.console import (
    DATABASE,
    IMAGES,
    MODEL,
    Device,
    Quiet,
    Root,
    Trust,
    Verbose,
    open_image,
    report_errors,
    require_device,
    say,
    writable,
)
from flows.cli.inputs import check_device, check_root
from flows.cli.pipeline import open_pipeline
from flows.cli.progress import step_bar
from infra.errors import InputError


def edit(
    context: typer.Context,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image to edit; it is cropped to its centre square.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text that describes the edited image.")],
    database: Annotated[str, typer.Option(help=DATABASE)],
    out: Annotated[Path, typer.Option(help="PNG, JPEG or WebP to write.")],
    model: Annotated[str, typer.Option(help=MODEL)] = "knn-diffusion",
    method: Annotated[
        Literal["flow", "local", "restore", "sdedit"] | None,
        typer.Option(
            help="flow: move the whole image towards the text; local: regenerate one region; restore: regenerate the "
            "image with a generator trained for editing; sdedit: add noise to the image and denoise it. "
            "Default: flow; local for discrete generators, or with --largest-region."
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Edit strength in (0, 1]; 1 ignores the original content of the region. Default: 1; 0.925 for flow."
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale: how strongly to follow the prompt. Default: 4.")
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(
            help="Number of edits to choose the best from; the cost is proportional. Default: 8; 1 for flow.",
            min=1,
            max=64,
        ),
    ] = None,
    largest_region: Annotated[
        float | None,
        typer.Option(help="Share of the image that --method local may change, in (0, 1]. Default: 0.4."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Random seed; the same seed gives the same image.", min=0, max=2**63 - 1)
    ] = 0,
    device: Device = "cpu",
    trust: Trust = False,
    root: Root = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Edit an image by a text, without a mask. Parts that do not match the text change; the others are kept.

    Example: knn-diffusion edit heart.png "a green heart" --database twemoji --out green.png
    """
    with report_errors(verbose, quiet):
        check_device(device)
        check_root(root)
        writable(out, "image", IMAGES)
        if largest_region is not None and method not in ("local", None):
            raise InputError(
                f"--largest-region does not apply to --method {method}; use --method local, or remove the option"
            )
        source = open_image(image)
        require_device(device)
        import torch

        pipeline = open_pipeline(context, model, database, device, root=root, trust=trust, quiet=quiet)
        given = {
            "method": method,
            "strength": strength,
            "guidance_scale": guidance,
            "candidates": candidates,
            "largest_region": largest_region,
        }
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        with step_bar("edit") as on_progress:
            (edited,) = pipeline.edit(
                source, prompt, generator=torch.Generator().manual_seed(seed), on_progress=on_progress, **options
            )
        edited.save(out)
        say(out)
