"""The ``knn-diffusion`` command. What was asked for goes to standard output, alone where it is JSON; the rest does not.

Exit code 0 for success, 1 for a failure told in one line, 2 for wrong usage. Heavy imports wait inside the commands, so
that ``--help`` answers at once. What looks into databases is in :mod:`flows.cli.databases`, what keeps
them in :mod:`flows.cli.upkeep`.
"""

import dataclasses
import inspect
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.cli.console import (
    DATABASE,
    IMAGES,
    MODEL,
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
    open_image,
    print_traceback,
    report_errors,
    say,
    settings,
    writable,
)
from flows.cli.databases import databases, search
from flows.cli.upkeep import gc, merge, rebuild_index, subset
from infra.prefect_server import prefect_api

if TYPE_CHECKING:
    from PIL import Image

LONGEST_ROW = 12
"""Pictures side by side; more make a square, for no format takes a picture of any width (WebP ends at 16,383 px)."""


def demo(
    folder: Annotated[Path, typer.Option(help="Where everything the demo makes is kept.")] = Path("build/demo"),
    port: Annotated[int | None, typer.Option(help="Port of the stand-in web server; any free one by default.")] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Fine-tune the generator on the first domain.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole line on real pictures and end with one: download, embed, index, register, draw, swap."""
    with report_errors(verbose), prefect_api(folder / "prefect"):
        from flows.demo.run import run_demo

        picture, report = run_demo(folder, port, train)
        sys.stderr.flush()
        say(picture)
        say(report)


def new_domain(
    name: Annotated[str, typer.Argument(help="The domain: lower-case letters, digits, hyphens.")],
    urls: Annotated[str, typer.Option(help="URL list: parquet, csv, tsv, json lines or text; a column 'url'.")],
    root: Root = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT that may be downloaded from though not public. Repeatable.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Train a generator, or make the database alone.")
    ] = False,
    texts: Annotated[str | None, typer.Option(help="Text file, a query a line: for recall and evaluation.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="open_clip model: ViT-B-32/laion2b_s34b_b79k, hf-hub:…, local-dir:… .")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="own_domain, or demo_cpu, stickers_h100, photos_h100: the settings of flows/recipes.py.")
    ] = "own_domain",
    autoencoder: Annotated[
        str | None, typer.Option(help="photos_h100: folder of a diffusers AutoencoderKL or VQModel.")
    ] = None,
    index: Index = None,
    memory: Memory = None,
    target_recall: TargetRecall = None,
    dedup: Dedup = None,
    verify: Verify = False,
    wait: Wait = 0.0,
    verbose: Verbose = False,
) -> None:
    """Make a domain from a URL list: its database, and a generator with --train. Both become champions."""
    with report_errors(verbose), prefect_api():
        from flows.new_domain import new_domain as flow
        from flows.recipes import RECIPES
        from infra.errors import InputError
        from infra.formats.tables import read_lines

        if recipe not in RECIPES:
            raise InputError(f"no recipe {recipe}; there are {', '.join(RECIPES)}")
        given = {"train": train or None, "encoder": encoder, "autoencoder": autoencoder}
        options = {option: value for option, value in given.items() if value is not None}
        takes = inspect.signature(RECIPES[recipe]).parameters
        if unknown := options.keys() - takes.keys():
            raise InputError(f"the recipe {recipe} takes no --{min(unknown)}; it decides that itself")
        if "autoencoder" in takes and autoencoder is None:
            raise InputError(f"the recipe {recipe} works on latents; name their --autoencoder FOLDER")
        config = RECIPES[recipe](
            name,
            urls,
            root=root,
            texts=tuple(read_lines(texts)) if texts else (),
            allow_hosts=tuple(allow_host or ()),
            **options,
        )
        changes = index_changes(index, memory, target_recall, dedup)
        config = dataclasses.replace(config, index=changes.over(config.index), wait_s=wait, verify=verify)
        domain = flow(config)
        say(domain.registered.alias_uri)
        if domain.trained is not None:
            say(domain.trained.registered.alias_uri)


def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw, a picture each.")],
    database: Annotated[str, typer.Option(help=DATABASE)],
    out: Annotated[Path, typer.Option(help="PNG, JPEG or WebP to write; more prompts make a row, many a grid.")],
    model: Annotated[str, typer.Option(help=MODEL)] = "knn-diffusion",
    between: Annotated[int | None, typer.Option(help="Pictures from the first of two prompts to the second.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same pictures.", min=0, max=2**63 - 1)] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; the generator's default if unset.", min=1, max=1000)
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="1 follows the prompt as trained, more exaggerates.")] = None,
    negative: Annotated[str | None, typer.Option(help="What the pictures are to keep away from.")] = None,
    neighbours: Annotated[
        int | None, typer.Option(help="Neighbours to draw from; the generator's default if unset.", min=1, max=1000)
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(help="Draws to choose each picture from; the generator's default if unset.", min=1, max=64),
    ] = None,
    trust: Trust = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Draw pictures from prompts, through a database's neighbours. A prompt that names a picture file is that picture.

    With two prompts and --between N, N pictures on the way from the first to the second, without a choice among draws.
    """
    with report_errors(verbose):
        import torch

        from infra.errors import InputError
        from model.images import image_grid
        from tasks.serve.load import load_pipeline

        writable(out, "picture", IMAGES)
        asked = [_image_or_text(prompt) for prompt in prompts]
        pipeline = load_pipeline(model, database, settings(root), trust=trust)
        options: dict[str, Any] = {
            "negative_prompt": negative,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "neighbours": neighbours,
            "candidates": candidates,
            "generator": torch.Generator().manual_seed(seed),
        }
        if between is None:
            output = pipeline(asked, **options)
        elif len(asked) == 2:
            output = pipeline.interpolate(asked[0], asked[1], between, **options)
        else:
            raise InputError(f"--between goes from one prompt to another; {len(asked)} were given")
        count = len(output.images)
        image_grid(output.images, columns=count if count <= LONGEST_ROW else math.isqrt(count - 1) + 1).save(out)
        say(out)


def edit(
    image: Annotated[Path, typer.Argument(help="The picture to edit; its centre square is taken.")],
    prompt: Annotated[str, typer.Argument(help="What it should show afterwards.")],
    database: Annotated[str, typer.Option(help=DATABASE)],
    out: Annotated[Path, typer.Option(help="PNG, JPEG or WebP to write.")],
    model: Annotated[str, typer.Option(help=MODEL)] = "knn-diffusion",
    method: Annotated[
        Literal["local", "restore", "sdedit"],
        typer.Option(
            help="local draws a region anew; restore all, by a generator trained for it; sdedit all, from the noised "
            "picture."
        ),
    ] = "local",
    strength: Annotated[
        float | None, typer.Option(help="Above 0, at most 1: how much of what is there may be lost where it is drawn.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="How strongly to follow the prompt.")] = None,
    candidates: Annotated[
        int | None, typer.Option(help="Edits to choose among; 1 takes an eighth of the time.", min=1, max=64)
    ] = None,
    largest_region: Annotated[
        float | None,
        typer.Option(help="Share of the picture that local may change, above 0; 1 for what fills it."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same picture.", min=0, max=2**63 - 1)] = 0,
    trust: Trust = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Change a picture by a text, without a mask: a region that disagrees with it is drawn anew, the rest stays.

    Of eight edits in four regions, the one closest to the text is kept.
    """
    with report_errors(verbose):
        import torch

        from infra.errors import InputError
        from tasks.serve.load import load_pipeline

        writable(out, "picture", IMAGES)
        if largest_region is not None and method != "local":
            raise InputError(f"--largest-region is of the method local; {method} has no regions")
        source = open_image(image)
        pipeline = load_pipeline(model, database, settings(root), trust=trust)
        given = {
            "method": method,
            "strength": strength,
            "guidance_scale": guidance,
            "candidates": candidates,
            "largest_region": largest_region,
        }
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        (edited,) = pipeline.edit(source, prompt, generator=torch.Generator().manual_seed(seed), **options)
        edited.save(out)
        say(out)


def evaluate(
    databases: Annotated[list[str], typer.Argument(help=f"Databases to draw from. {DATABASE}")],
    model: Annotated[str, typer.Option(help=MODEL)] = "knn-diffusion",
    texts: Annotated[
        str | None, typer.Option(help="Text file, a prompt a line; without, a database's own pictures are prompts.")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Pictures of each of two conditions, some ten with ablations.", min=4)
    ] = 256,
    ablations: Annotated[bool, typer.Option(help="Also other queries and numbers of neighbours.")] = True,
    inception: Annotated[str | None, typer.Option(help="torch-fidelity's Inception weights, for FID.")] = None,
    gpu: Annotated[bool, typer.Option(help="Draw on a GPU.")] = False,
    trust: Trust = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Score a generator on databases, swap them, and put scores, figures and worst copies on one page."""
    with report_errors(verbose), prefect_api():
        from flows.evaluate_generator import EvaluateGeneratorConfig, evaluate_generator
        from tasks.evaluate.task import EvaluateConfig

        asked = EvaluateConfig(samples=samples, ablations=ablations, inception_weights=inception, use_gpu=gpu)
        config = EvaluateGeneratorConfig(
            databases=tuple(databases), generator=model, texts=texts, root=root, evaluate=asked, trust=trust
        )
        say(evaluate_generator(config).report.reference.uri + "/evaluation.html")


def _image_or_text(prompt: str) -> "str | Image.Image":
    """The picture where ``prompt`` names the file of one, else the text.

    Raises ``InputError`` for what reads as a picture's name, ends as one and has a slash or no space, and is none.
    """
    path = Path(prompt)
    there = bool(path.suffix) and len(prompt) < 256 and path.is_file()
    named = there or (path.suffix.lower() in IMAGES and ("/" in prompt or " " not in prompt))
    return open_image(path) if named else prompt


app = typer.Typer(
    help="Image generation from a database of images: download, embed, index, train, search, swap.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_LISTED = {
    "Start": (demo,),
    "Databases": (new_domain, rebuild_index, search, databases),
    "Generator": (generate, edit, evaluate),
    "Upkeep": (merge, subset, gc),
}
"""The commands as ``--help`` lists them."""
for _panel, _commands in _LISTED.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)


def main() -> None:
    """Entry point of the ``knn-diffusion`` command."""
    try:
        app()
    except Exception:  # the only place where a traceback is printed
        print_traceback()
        sys.exit(1)


if __name__ == "__main__":
    main()
