"""Shared CLI options, one-line error reporting, tables, and output-path checks."""

import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.home import set_home
from infra.quiet import QUIET

if TYPE_CHECKING:
    from PIL import Image

    from infra.settings import Settings
    from tasks.index.config import IndexOverrides

Root = Annotated[
    str | None,
    typer.Option(
        "--root", help="Folder or s3://… URI of the artifacts. Default: KNN_DIFFUSION_ROOT, or knn-diffusion-data."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks and the output of libraries.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and errors: no stages, no progress.")]
Device = Annotated[str, typer.Option("--device", help="Device of the networks: cpu, cuda, cuda:0 or mps.")]
Wait = Annotated[float, typer.Option("--wait", help="Seconds to wait while another process writes this domain.", min=0)]
Verify = Annotated[
    bool, typer.Option("--verify", help="Check the digests of committed files, not only that they exist.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="Trust a folder outside of the root like code: read the files it names, load its encoder."
    ),
]
Index = Annotated[
    str | None,
    typer.Option(
        "--index",
        help="FAISS factory string, or auto (by rows and memory). Default: auto for new-domain, else unchanged.",
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory",
        help="Memory limit of the index in a searching process, in GiB. Default: 8 for new-domain, else unchanged.",
        min=0,
        max=1e6,
    ),
]
TargetRecall = Annotated[
    float | None,
    typer.Option(
        "--target-recall",
        help="Minimum recall@10 in [0, 1]; below, nothing is registered. Default: 0.95 for new-domain, else unchanged.",
    ),
]
Dedup = Annotated[
    bool | None,
    typer.Option(
        "--dedup/--no-dedup",
        help="Return one of each group of near-duplicates. Default: off for new-domain, else unchanged.",
    ),
]
HostRate = Annotated[
    float | None,
    typer.Option(
        "--host-rate",
        help="Requests per second to one host, except those of --allow-host; 0 is unlimited. Default: 10.",
        min=0,
    ),
]
MODEL = "Generator: short name, models:/…, a folder, sticker-generator or sticker-generator-discrete (bundled)."
DATABASE = "Short name (its champion), models:/NAME@ALIAS, models:/NAME/VERSION, or a folder."
_MAX_PIXELS = 178_956_970  # of an image that the user gives: Pillow's own limit
_SVG_SIDE_PX = 512
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
_AGES = ((86_400, "d"), (3_600, "h"), (60, "min"))
_OPTIONS = {
    "allow_hosts": "--allow-host",
    "guidance_scale": "--guidance",
    "host_rate": "--host-rate",
    "inception_weights": "--inception",
    "keep_versions": "--keep",
    "largest_region": "--largest-region",
    "negative_prompt": "--negative",
    "num_images_per_prompt": "--num-images",
    "num_inference_steps": "--steps",
    "target_recall": "--target-recall",
    "user_agent": "--user-agent",
    "strength": "--strength",
    "candidates": "--candidates",
    "neighbours": "--neighbours",
}
"""Option of each Python argument that error messages name."""
_WORDS = ("strength", "candidates", "neighbours")  # also common words: replaced only where a message starts with them
_ARGUMENTS = re.compile(
    rf"^(?:{'|'.join(_WORDS)})(?= is | must )|(?<![\w./-])(?:{'|'.join(_OPTIONS.keys() - _WORDS)})(?![\w./-])"
)


def settings(root: str | None) -> "Settings":
    """Return the settings of the environment, with ``root`` if it is given."""
    from tasks.stage import settings_of

    return settings_of(root)


def index_changes(
    index: str | None, memory: float | None, target_recall: float | None, dedup: bool | None
) -> "IndexOverrides":
    """Return the changes of the index options; ``memory`` in GiB. None leaves a setting unchanged."""
    from infra.errors import InputError
    from tasks.index.config import IndexOverrides

    if memory == 0:
        raise InputError("--memory is too small: 0; give the GiB that a searching process may use")
    memory_bytes = None if memory is None else int(memory * 2**30)
    return IndexOverrides(index=index, memory_bytes=memory_bytes, target_recall=target_recall, dedup=dedup)


@contextmanager
def prefect_server(home: Path | None = None) -> Iterator[None]:
    """Connect Prefect to a server within the block, as :func:`infra.prefect_server.prefect_api` does.

    The module is imported here, because ``--help`` does not need it.
    """
    from infra.prefect_server import prefect_api

    with prefect_api(home):
        yield


@contextmanager
def _silenced() -> Iterator[None]:
    """Show no log lines and no progress bars within the block."""
    logger, before = logging.getLogger("knn_diffusion"), os.environ.get("TQDM_DISABLE")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it at import
    try:
        yield
    finally:
        logger.setLevel(level)
        os.environ.pop("TQDM_DISABLE")
        if before is not None:
            os.environ["TQDM_DISABLE"] = before


@contextmanager
def report_errors(verbose: bool, quiet: bool = False) -> Iterator[None]:
    """Configure logging, and report errors that the user can fix on one line.

    Exits with code 1 after such an error and with 130 after Ctrl-C. Other errors propagate with their traceback.

    Args:
        verbose: Show tracebacks and the output of libraries.
        quiet: Show no log lines and no progress.
    """
    _quiet_environment(verbose)
    from infra import logs

    logs.setup(verbose)
    try:
        with _silenced() if quiet else nullcontext():
            yield
    except _user_errors() as error:
        if verbose:
            raise
        from infra.text import sanitised

        line = name_options(" ".join(str(error).split()))
        print(f"knn-diffusion: {sanitised(line)}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("knn-diffusion: interrupted; committed work is kept, run the command again to resume", file=sys.stderr)
        raise typer.Exit(130) from None


def name_options(message: str) -> str:
    """Replace the names of Python arguments in an error message with the options of the command line."""
    return _ARGUMENTS.sub(lambda match: _OPTIONS[match[0]], message)


def open_image(path: Path) -> "Image.Image":
    """Read an image as the download does: upright, 8-bit sRGB, on white; of an animation, the first frame.

    Raises ``InputError`` if it cannot be read.
    """
    from infra.download.images import ImageError, ImageNormaliser
    from infra.errors import InputError

    normaliser = ImageNormaliser(max_pixels=_MAX_PIXELS, min_side_px=1, max_side_px=_SVG_SIDE_PX)
    try:
        return normaliser.decode(path.read_bytes(), first_frame=True)
    except FileNotFoundError:
        raise InputError(f"image does not exist: {path}; check the path") from None
    except (ImageError, OSError) as error:
        detail = error.detail if isinstance(error, ImageError) else error
        raise InputError(f"image cannot be read: {path} ({detail}); give a PNG, JPEG or WebP file") from error


def require_device(device: str) -> None:
    """Raise ``InputError`` if this machine does not have ``device``."""
    if device == "cpu":
        return
    import torch

    from infra.errors import InputError

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by its build
        reason = str(error).splitlines()[0]
        raise InputError(f"--device is not available: {device} ({reason}); use cpu") from error


def writable(out: Path, kind: str, suffixes: Sequence[str]) -> None:
    """Raise ``InputError`` if ``out`` cannot be written, before long work starts.

    Args:
        out: Path of the output file.
        kind: What the file is, for messages.
        suffixes: Allowed suffixes, in lower case.
    """
    from infra.errors import InputError

    if out.suffix.lower() not in suffixes:
        raise InputError(f"{kind} has an unknown suffix: {out}; use {', '.join(suffixes)}")
    if not out.parent.is_dir():
        raise InputError(f"folder does not exist: {out.parent}; create it, or write to another folder")
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise InputError(f"{kind} cannot be written: {out}; give another path")


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Print ``rows`` as a table; ``columns`` maps keys to headers. Missing values are printed as a dash."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from infra.text import printable

    shown = Table(*columns.values(), box=None, header_style="bold", pad_edge=False)
    for row in rows:
        values = (row.get(name, "–") for name in columns)
        texts = (f"{value:.3f}" if isinstance(value, float) else printable(str(value)) for value in values)
        shown.add_row(*map(Text, texts))
    Console(width=None if sys.stdout.isatty() else 200).print(shown)


def say(line: object) -> None:
    """Print one line to standard output."""
    from infra.text import printable

    print(printable(str(line)))


def print_traceback() -> None:
    """Print the traceback of the current exception to standard error."""
    from infra.text import sanitised

    print("\n".join(sanitised(line) for line in traceback.format_exc().rstrip().split("\n")), file=sys.stderr)


def age(created_ms: int) -> str:
    """Format the age of a timestamp in milliseconds since the epoch, e.g. 3 min, 2 h, 5 d."""
    seconds = max(0.0, time.time() - created_ms / 1000)
    for length, unit in _AGES:
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def _user_errors() -> tuple[type[Exception], ...]:
    """Return the types of errors that the user can fix. Any other error is a bug, and needs its traceback."""
    from pydantic import ValidationError

    from infra.errors import KNNDiffusionError
    from model.errors import ModelError

    return KNNDiffusionError, ModelError, OSError, ValidationError


def _quiet_environment(verbose: bool) -> None:
    """Set the variables of the home folder, of telemetry and of start-up banners; libraries read them at import."""
    set_home()
    warnings.filterwarnings("ignore")
    quiet = {**QUIET, "TOKENIZERS_PARALLELISM": "false"}
    if not verbose:
        quiet |= {"PREFECT_LOGGING_LEVEL": "CRITICAL", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
