"""The ``knn-diffusion`` command. JSON goes to standard output alone, everything else to standard error.

Exit code 0 for success, 1 for a failure told in one line, 2 for wrong usage. Heavy imports wait inside the commands, so
that ``--help`` answers at once.
"""

import inspect
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.prefect_api import prefect_api

if TYPE_CHECKING:
    from infra.settings import Settings

_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp"})

app = typer.Typer(
    help="Image generation from a database of images: download, embed, index, train, search, swap.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Root = Annotated[str | None, typer.Option("--root", help="Where artifacts are kept: a folder or s3://… .")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks, and what the libraries say.")]
_MODEL = "Generator: short name, models:/…, a folder, or sticker-generator, which ships with this package."
_DATABASE = "Short name (its champion), models:/NAME@ALIAS, models:/NAME/VERSION, or a folder."


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where everything the demo makes is kept.")] = Path("build/demo"),
    port: Annotated[int | None, typer.Option(help="Port of the stand-in web server; any free one by default.")] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Fine-tune the generator on the first domain.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole line on real pictures and end with one: download, embed, index, register, draw, swap."""
    with _told(verbose), prefect_api(folder / "prefect"):
        from flows.demo import run_demo

        picture, report = run_demo(folder, port, train)
        sys.stderr.flush()
        print(picture)
        print(report)


@app.command()
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
        str, typer.Option(help="own_domain, or stickers_h100, photos_h100: the settings of flows/recipes.py.")
    ] = "own_domain",
    autoencoder: Annotated[
        str | None, typer.Option(help="photos_h100: folder of a diffusers AutoencoderKL or VQModel.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Make a domain from a URL list: its database, and a generator with --train. Both become champions."""
    with _told(verbose), prefect_api():
        from flows.new_domain import new_domain as flow
        from flows.recipes import RECIPES
        from infra.errors import InputError
        from infra.shards import read_lines

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
        domain = flow(config)
        print(domain.registered.alias_uri)
        if domain.trained is not None:
            print(domain.trained.registered.alias_uri)


@app.command()
def search(
    database: Annotated[str, typer.Argument(help=_DATABASE)],
    query: Annotated[str, typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option(help="Neighbours to show.", min=1)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list on standard output.")] = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Show the nearest images of a text."""
    with _told(verbose):
        from tasks.serve import search_text

        found = search_text(database, query, k, _settings(root))
        if as_json:
            print(json.dumps(found, indent=1))
        else:
            _table(found, {"rank": "rank", "score": "score", "id": "id", "url": "url"})


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw, a picture each.")],
    database: Annotated[str, typer.Option(help=_DATABASE)],
    out: Annotated[Path, typer.Option(help="PNG to write; more prompts make a row.")],
    model: Annotated[str, typer.Option(help=_MODEL)] = "knn-diffusion",
    between: Annotated[int | None, typer.Option(help="Pictures from the first of two prompts to the second.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same pictures.", min=0, max=2**63 - 1)] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; the generator's default if unset.", min=1, max=1000)
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="1 follows the prompt as trained, more exaggerates.")] = None,
    negative: Annotated[str | None, typer.Option(help="What the pictures are to keep away from.")] = None,
    neighbours: Annotated[
        int | None, typer.Option(help="Neighbours to draw from; as trained if unset.", min=1, max=1000)
    ] = None,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Draw pictures from prompts, through a database's neighbours. A prompt that names a picture file is that picture.

    With two prompts and --between N, N pictures on the way from the first to the second.
    """
    with _told(verbose):
        import torch

        from infra.errors import InputError
        from infra.registry import load_pipeline
        from tasks.evaluate import contact_sheet

        _writable(out)
        pipeline = load_pipeline(model, database, _settings(root))
        asked = [_picture_or_text(prompt) for prompt in prompts]
        options = {
            "negative_prompts": negative,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "neighbours": neighbours,
            "generator": torch.Generator().manual_seed(seed),
        }
        if between is None:
            output = pipeline(asked, **options)
        elif len(asked) == 2:
            output = pipeline.interpolate(*asked, between, **options)
        else:
            raise InputError(f"--between goes from one prompt to another; {len(asked)} were given")
        contact_sheet(output.images, columns=len(output.images)).save(out)
        print(out)


@app.command()
def edit(
    image: Annotated[Path, typer.Argument(help="The picture to edit; its centre square is taken.")],
    prompt: Annotated[str, typer.Argument(help="What it should show afterwards.")],
    database: Annotated[str, typer.Option(help=_DATABASE)],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    model: Annotated[str, typer.Option(help=_MODEL)] = "knn-diffusion",
    strength: Annotated[
        float | None, typer.Option(help="Above 0, at most 1: how much of what is there the region may lose.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="How strongly to follow the prompt.")] = None,
    candidates: Annotated[
        int | None, typer.Option(help="Edits to choose among; 1 takes an eighth of the time.", min=1, max=64)
    ] = None,
    largest_region: Annotated[
        float | None, typer.Option(help="Share of the picture that may change, above 0; 1 for what fills it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same picture.", min=0, max=2**63 - 1)] = 0,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Change a picture by a text, without a mask: a region that disagrees with it is drawn anew, the rest stays.

    Of eight edits in four regions, the one closest to the text is kept.
    """
    with _told(verbose):
        import torch

        from infra.registry import load_pipeline

        _writable(out)
        source = _open_picture(image)
        pipeline = load_pipeline(model, database, _settings(root))
        given = {
            "strength": strength,
            "guidance_scale": guidance,
            "candidates": candidates,
            "largest_region": largest_region,
        }
        options = {name: value for name, value in given.items() if value is not None}
        (edited,) = pipeline.edit(source, prompt, generator=torch.Generator().manual_seed(seed), **options)
        edited.save(out)
        print(out)


@app.command()
def evaluate(
    databases: Annotated[list[str], typer.Argument(help=f"Databases to draw from. {_DATABASE}")],
    model: Annotated[str, typer.Option(help=_MODEL)] = "knn-diffusion",
    texts: Annotated[
        str | None, typer.Option(help="Text file, a prompt a line; without, pictures are prompts.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Pictures of each condition.", min=4)] = 256,
    ablations: Annotated[bool, typer.Option(help="Also other queries and numbers of neighbours.")] = True,
    inception: Annotated[str | None, typer.Option(help="torch-fidelity's Inception weights, for FID.")] = None,
    gpu: Annotated[bool, typer.Option(help="Draw on a GPU.")] = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """Score a generator on databases, swap them, and put scores, figures and worst copies on one page."""
    with _told(verbose), prefect_api():
        from flows.evaluate_generator import EvaluateGeneratorConfig, evaluate_generator
        from tasks.evaluate import EvaluateConfig

        asked = EvaluateConfig(samples=samples, ablations=ablations, inception_weights=inception, use_gpu=gpu)
        config = EvaluateGeneratorConfig(
            databases=tuple(databases), generator=model, texts=texts, root=root, evaluate=asked
        )
        print(evaluate_generator(config).report.reference.uri + "/evaluation.html")


@app.command()
def databases(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list on standard output.")] = False,
    root: Root = None,
    verbose: Verbose = False,
) -> None:
    """List registered databases: name, version, rows, recall, encoder, aliases."""
    with _told(verbose):
        from infra.registry import Registry

        listed = Registry(_settings(root)).versions("database")
        if as_json:
            print(json.dumps(listed, indent=1))
        else:
            shown = [{**entry, "aliases": ", ".join(entry["aliases"])} for entry in listed]
            names = ("name", "version", "rows", "recall_at_10_image", "recall_at_10_text", "encoder", "aliases")
            _table(shown, {name: name.replace("_at_10", "@10").replace("_", " ") for name in names})


def main() -> None:
    """Entry point of the ``knn-diffusion`` command."""
    app()


def _settings(root: str | None) -> "Settings":
    from tasks.stage import settings_of

    return settings_of(root)


@contextmanager
def _told(verbose: bool) -> Iterator[None]:
    """Run a command with logs set up, and tell what the user can mend in one line. Ctrl-C exits with 130."""
    _quiet_environment(verbose)
    from infra import logs

    logs.setup(verbose)
    from infra.errors import KNNDiffusionError

    try:
        yield
    except (KNNDiffusionError, ValueError, OSError) as error:
        if verbose or not _mendable(error):
            raise
        print(f"knn-diffusion: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("knn-diffusion: interrupted; what is committed is kept, run again to go on", file=sys.stderr)
        raise typer.Exit(130) from None


def _mendable(error: Exception) -> bool:
    """Whether the user can mend it: our own errors, the file system's, and settings that do not parse.

    Any other ValueError counts when this project raised it, and is a bug with its traceback when something below did.
    """
    from pydantic import ValidationError

    from infra.errors import KNNDiffusionError
    from model.errors import ModelError

    if isinstance(error, KNNDiffusionError | ModelError | OSError | ValidationError):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return module.split(".")[0] in {"flows", "tasks", "model", "infra"}


def _quiet_environment(verbose: bool) -> None:
    """Libraries read these once, at import: no telemetry, no start-up banners."""
    warnings.filterwarnings("ignore")
    quiet = {
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not verbose:
        quiet |= {"PREFECT_LOGGING_LEVEL": "CRITICAL", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def _picture_or_text(prompt: str) -> Any:
    """The picture where ``prompt`` names the file of one, else the text."""
    path = Path(prompt)
    return _open_picture(path) if path.suffix.lower() in _PICTURES and path.is_file() else prompt


def _open_picture(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    from infra.errors import InputError

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; name a picture") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no picture that can be read ({error}); name a PNG, JPEG or WebP") from error


def _writable(out: Path) -> None:
    from infra.errors import InputError

    if out.suffix.lower() not in _PICTURES:
        raise InputError(f"{out} is no picture name; end it in .png")
    if not out.parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist; make it, or write elsewhere")
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise InputError(f"{out} cannot be written to; name another file")


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns.values(), box=None, header_style="bold", pad_edge=False)
    for row in rows:
        values = (row.get(name, "") for name in columns)
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    main()
