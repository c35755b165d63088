"""Command that generates images: ``generate``."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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

if TYPE_CHECKING:
    from PIL import Image

LONGEST_ROW = 12
"""Maximum images in one row; more make a square grid, because formats limit the width (WebP: 16,383 px)."""


def generate(
    context: typer.Context,
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPTS", help="Texts or image files, one generated image each.")
    ],
    database: Annotated[str, typer.Option(help=DATABASE)],
    out: Annotated[
        Path | None, typer.Option(help="PNG, JPEG or WebP to write: up to 12 images in a row, more in a grid.")
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option(help="Folder for one PNG per image, 0000.png and so on, instead of --out.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Images per prompt.", min=1, max=1000)] = 1,
    model: Annotated[str, typer.Option(help=MODEL)] = "knn-diffusion",
    between: Annotated[int | None, typer.Option(help="Interpolate two prompts in this many images.")] = None,
    seed: Annotated[
        int, typer.Option(help="Random seed; the same seed gives the same images.", min=0, max=2**63 - 1)
    ] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps. Default: the generator's (bundled: 6).", min=1, max=1000)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale: 1 is the model as trained, more follows the prompt more strongly. "
            "Default: the generator's (bundled: 3)."
        ),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt; needs a guidance above 1.")] = None,
    neighbours: Annotated[
        int | None,
        typer.Option(help="Neighbours to condition on. Default: the generator's (bundled: 3).", min=1, max=1000),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(help="Images to choose each result from. Default: 3, with --quality best 8.", min=1, max=64),
    ] = None,
    query: Annotated[
        Literal["text", "mean", "both", "none"] | None,
        typer.Option(
            help="Embedding that accompanies the neighbours: the prompt's (text), the neighbours' mean, the mean of "
            "both, or none. Default: both; with --between, and for discrete generators, that of the generator "
            "(bundled: mean)."
        ),
    ] = None,
    quality: Annotated[
        Literal["fast", "best"],
        typer.Option(
            help="Preset of candidates, query, start and strength, which these options override. "
            "best takes almost three times as long."
        ),
    ] = "fast",
    start: Annotated[
        Literal["noise", "neighbour"] | None,
        typer.Option(
            help="Start from noise, or from a stored neighbour with noise added, which supplies the shapes. "
            "Default: that of --quality; noise with --between, and for discrete generators or databases without images."
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Share of noise added to the neighbour, in (0, 1]; small values copy it. Default: that of --quality."
        ),
    ] = None,
    reference: Annotated[
        Literal["none", "neighbour"],
        typer.Option(
            help="Show a stored neighbour to a generator trained for editing at noise levels above 0.85. "
            "Use it with --start noise, or with a --strength above 0.85."
        ),
    ] = "none",
    device: Device = "cpu",
    trust: Trust = False,
    root: Root = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Generate images from prompts and their neighbours in a database. A prompt may also be the path of an image.

    With two prompts and --between N, generate N images that interpolate between them; --candidates then has no effect.

    Example: knn-diffusion generate "a red heart" "a sad face" --database twemoji --out images.png
    """
    if (out is None) == (out_dir is None):
        raise typer.BadParameter("give exactly one output: --out FILE or --out-dir FOLDER")
    with report_errors(verbose, quiet):
        check_device(device)
        check_root(root)
        _check_output(out, out_dir)
        conditions = [_image_or_text(prompt) for prompt in prompts]
        _check_between(between, len(conditions), num_images, start)
        require_device(device)
        import torch

        pipeline = open_pipeline(context, model, database, device, root=root, trust=trust, quiet=quiet)
        options: dict[str, Any] = {
            "negative_prompt": negative,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "neighbours": neighbours,
            "candidates": candidates,
            "query": query,
            "quality": quality,
            "start": start,
            "strength": strength,
            "reference": reference,
            "generator": torch.Generator().manual_seed(seed),
        }
        if not quiet and between is None and start is None:
            _mention_noise(pipeline)
        with step_bar("generate") as on_progress:
            if between is None:
                output = pipeline(conditions, num_images_per_prompt=num_images, on_progress=on_progress, **options)
            else:
                output = pipeline.interpolate(conditions[0], conditions[1], between, on_progress=on_progress, **options)
        for path in _save(output.images, out, out_dir):
            say(path)


def _check_output(out: Path | None, out_dir: Path | None) -> None:
    """Raise ``InputError`` if the output cannot be written."""
    if out is not None:
        writable(out, "image", IMAGES)
    elif out_dir is not None and (not out_dir.parent.is_dir() or (out_dir.exists() and not out_dir.is_dir())):
        raise InputError(f"--out-dir cannot be created: {out_dir}; create its parent folder, or give another path")


def _check_between(between: int | None, prompts: int, num_images: int, start: str | None) -> None:
    """Raise ``InputError`` if ``--between`` does not fit the number of prompts or images."""
    if between is not None and prompts != 2:
        raise InputError(f"--between needs two prompts: {prompts} were given; give two")
    if between is not None and start == "neighbour":
        raise InputError("--start neighbour does not apply to --between; remove one of them")
    if between is not None and num_images > 1:
        raise InputError(f"--num-images does not apply to --between: {num_images}; remove one of them")


def _mention_noise(pipeline: Any) -> None:
    """Print that a preset starts from noise, if the images of the database cannot be read."""
    if pipeline.starts_from_images and not pipeline.has_images:
        reason = f"the images of database {pipeline.database.name} cannot be read; --start neighbour shows why"
        print(f"knn-diffusion: starting from noise, because {reason}", file=sys.stderr)


def _save(images: Sequence["Image.Image"], out: Path | None, out_dir: Path | None) -> list[Path]:
    """Write the images to one file or one file each, and return the paths."""
    from model.images import image_grid

    if out_dir is None:
        assert out is not None, "generate requires one of the two"  # noqa: S101 - for the type checker
        columns = len(images) if len(images) <= LONGEST_ROW else math.isqrt(len(images) - 1) + 1
        image_grid(images, columns=columns).save(out)
        return [out]
    out_dir.mkdir(exist_ok=True)
    paths = [out_dir / f"{number:04}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return paths


def _image_or_text(prompt: str) -> "str | Image.Image":
    """Return the image if ``prompt`` is the path of an image file, else the text.

    Raises:
        InputError: The prompt looks like an image path (image suffix, with a slash or without spaces), but no such
            image can be read.
    """
    path = Path(prompt)
    exists = bool(path.suffix) and len(prompt) < 256 and path.is_file()
    is_path = exists or (path.suffix.lower() in IMAGES and ("/" in prompt or " " not in prompt))
    return open_image(path) if is_path else prompt
