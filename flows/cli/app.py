"""The ``knn-diffusion`` command.

Results go to standard output (only JSON with ``--json``); logs, progress and errors go to standard error. Exit codes:
0 for success, 1 for a failure that is reported on one line, 2 for wrong usage, 130 after Ctrl-C. Heavy imports are
inside the commands, so that ``--help`` is fast. :mod:`flows.cli.databases` has the commands that read databases,
:mod:`flows.cli.upkeep` those that maintain them.
"""

import dataclasses
import importlib.metadata
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
    choose_generator,
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
"""Maximum images in one row; more make a square grid, because formats limit the width (WebP: 16,383 px)."""


def demo(
    folder: Annotated[Path, typer.Option(help="Folder for everything that the demo writes.")] = Path("build/demo"),
    port: Annotated[
        int | None, typer.Option(help="Port of the local web server. Default: the last run's, or a free one.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Fine-tune the generator on the first domain (2,000 images).")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole pipeline on 5,400 emoji images: download, embed, index, register, generate, swap databases.

    Prints the paths of a figure and of a report.

    Example: knn-diffusion demo --folder build/demo
    """
    with report_errors(verbose), prefect_api(folder / "prefect"):
        from flows.demo.run import run_demo

        figure, report = run_demo(folder, port, train)
        sys.stderr.flush()
        say(figure)
        say(report)


def new_domain(
    name: Annotated[str, typer.Argument(help="Domain name: lower-case letters, digits, hyphens.")],
    urls: Annotated[str, typer.Option(help="URL list with a column 'url': parquet, csv, tsv, JSON lines or text.")],
    root: Root = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT to allow although its address is not public. Repeatable.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Train a generator, or build only the database.")
    ] = False,
    texts: Annotated[str | None, typer.Option(help="Text file, one query per line, for recall and evaluation.")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="open_clip model: ViT-B-32/laion2b_s34b_b79k, hf-hub:… or local-dir:… Default: bundled sticker-clip."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Settings from flows/recipes.py: own_domain, demo_cpu, stickers_h100 or photos_h100.")
    ] = "own_domain",
    autoencoder: Annotated[
        str | None, typer.Option(help="Folder of a diffusers AutoencoderKL or VQModel; only for photos_h100.")
    ] = None,
    index: Index = None,
    memory: Memory = None,
    target_recall: TargetRecall = None,
    dedup: Dedup = None,
    verify: Verify = False,
    wait: Wait = 0.0,
    verbose: Verbose = False,
) -> None:
    """Build a domain's database from a URL list, and a generator with --train; register both as champions.

    Example: knn-diffusion new-domain birds --urls birds.csv
    """
    with report_errors(verbose), prefect_api():
        from flows.new_domain import new_domain as flow
        from flows.recipes import RECIPES
        from infra.errors import InputError
        from infra.formats.tables import read_lines

        if recipe not in RECIPES:
            raise InputError(f"--recipe is unknown: {recipe}; use one of {', '.join(RECIPES)}")
        given = {"train": train or None, "encoder": encoder, "autoencoder": autoencoder}
        options = {option: value for option, value in given.items() if value is not None}
        takes = inspect.signature(RECIPES[recipe]).parameters
        if unknown := options.keys() - takes.keys():
            raise InputError(f"--{min(unknown)} does not apply to --recipe {recipe}; remove the option")
        if "autoencoder" in takes and autoencoder is None:
            raise InputError(f"--autoencoder is missing: --recipe {recipe} trains on latents; add --autoencoder FOLDER")
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
    context: typer.Context,
    prompts: Annotated[list[str], typer.Argument(help="Texts or image files, one generated image each.")],
    database: Annotated[str, typer.Option(help=DATABASE)],
    out: Annotated[Path, typer.Option(help="PNG, JPEG or WebP to write: up to 12 images in a row, more in a grid.")],
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
        typer.Option(help="Images to choose each result from. Default: the generator's (bundled: 2).", min=1, max=64),
    ] = None,
    trust: Trust = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Generate images from prompts and their neighbours in a database. A prompt may also be the path of an image.

    With two prompts and --between N, generate N images that interpolate between them; --candidates then has no effect.

    Example: knn-diffusion generate "a red heart" "a sad face" --database twemoji --out images.png
    """
    with report_errors(verbose):
        import torch

        from infra.errors import InputError
        from model.images import image_grid
        from tasks.serve.load import load_pipeline

        writable(out, "image", IMAGES)
        conditions = [_image_or_text(prompt) for prompt in prompts]
        model = choose_generator(context, model, settings(root))
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
            output = pipeline(conditions, **options)
        elif len(conditions) == 2:
            output = pipeline.interpolate(conditions[0], conditions[1], between, **options)
        else:
            raise InputError(f"--between needs two prompts: {len(conditions)} were given; give two")
        count = len(output.images)
        image_grid(output.images, columns=count if count <= LONGEST_ROW else math.isqrt(count - 1) + 1).save(out)
        say(out)


def edit(
    context: typer.Context,
    image: Annotated[Path, typer.Argument(help="Image to edit; it is cropped to its centre square.")],
    prompt: Annotated[str, typer.Argument(help="Text that describes the edited image.")],
    database: Annotated[str, typer.Option(help=DATABASE)],
    out: Annotated[Path, typer.Option(help="PNG, JPEG or WebP to write.")],
    model: Annotated[str, typer.Option(help=MODEL)] = "knn-diffusion",
    method: Annotated[
        Literal["local", "restore", "sdedit"],
        typer.Option(
            help="local: regenerate one region; restore: the whole image, with a generator trained for editing; "
            "sdedit: the whole image, from the noised source."
        ),
    ] = "local",
    strength: Annotated[
        float | None,
        typer.Option(help="Edit strength in (0, 1]; 1 ignores the original content of the region. Default: 1."),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale: how strongly to follow the prompt. Default: 4.")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(help="Edits to choose from; the cost is proportional. Default: 8.", min=1, max=64)
    ] = None,
    largest_region: Annotated[
        float | None,
        typer.Option(help="Share of the image that local may change, in (0, 1]. Default: 0.4."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Random seed; the same seed gives the same image.", min=0, max=2**63 - 1)
    ] = 0,
    trust: Trust = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Edit an image with a text, without a mask: the region that does not match the text is regenerated.

    By default eight edits are generated in four regions, and the one closest to the text is kept.

    Example: knn-diffusion edit heart.png "a green heart" --database twemoji --out green.png
    """
    with report_errors(verbose):
        import torch

        from infra.errors import InputError
        from tasks.serve.load import load_pipeline

        writable(out, "image", IMAGES)
        if largest_region is not None and method != "local":
            raise InputError(
                f"--largest-region does not apply to --method {method}; use --method local, or remove the option"
            )
        source = open_image(image)
        model = choose_generator(context, model, settings(root))
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
    databases: Annotated[list[str], typer.Argument(help=f"Databases to retrieve from. {DATABASE}")],
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
    verbose: Verbose = False,
) -> None:
    """Evaluate a generator on databases, and write scores, figures and the closest copies to one page.

    With several databases, the effect of swapping them is measured too.

    Example: knn-diffusion evaluate twemoji openmoji --texts prompts.txt --samples 256
    """
    with report_errors(verbose), prefect_api():
        from flows.evaluate_generator import EvaluateGeneratorConfig, evaluate_generator
        from tasks.evaluate.task import EvaluateConfig

        evaluate_config = EvaluateConfig(samples=samples, ablations=ablations, inception_weights=inception, use_gpu=gpu)
        config = EvaluateGeneratorConfig(
            databases=tuple(databases), generator=model, texts=texts, root=root, evaluate=evaluate_config, trust=trust
        )
        say(evaluate_generator(config).report.reference.uri + "/evaluation.html")


def _print_version(wanted: bool) -> None:
    """Print name and version, and exit, if ``--version`` is given."""
    if wanted:
        say(f"knn-diffusion {importlib.metadata.version('knn-diffusion')}")
        raise typer.Exit


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


app = typer.Typer(
    help="Generate images with a database of images: download, embed, index, search, train, generate, edit.",
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
"""Commands by panel, in the order of ``--help``."""
for _panel, _commands in _LISTED.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of ``knn-diffusion`` itself."""


def main() -> None:
    """Entry point of the ``knn-diffusion`` command."""
    try:
        app()
    except Exception:  # the only place where a traceback is printed
        print_traceback()
        sys.exit(1)


if __name__ == "__main__":
    main()
