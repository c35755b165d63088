"""How the commands talk: shared options, one line for what went wrong, tables, and names of files that are no use."""

import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL import Image

    from infra.settings import Settings
    from tasks.index.task import IndexOverrides

Root = Annotated[str | None, typer.Option("--root", help="Where artifacts are kept: a folder or s3://… .")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks, and what the libraries say.")]
Wait = Annotated[float, typer.Option("--wait", help="Seconds to wait while another writes this domain.", min=0)]
Verify = Annotated[
    bool, typer.Option("--verify", help="Check the digests of what is committed already, not only that it is there.")
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Trust a FOLDER outside of the root like code: read what it names, load its encoder."),
]
Index = Annotated[
    str | None,
    typer.Option(
        "--index", help="FAISS factory string, or auto: by rows and memory. Unset: auto in new-domain, else as it was."
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--memory",
        help="GiB of the index that a searching process may hold. Unset: 8 in new-domain, else as it was.",
        min=0,
        max=1e6,
    ),
]
TargetRecall = Annotated[
    float | None,
    typer.Option(
        "--target-recall",
        help="Recall at 10 to reach, or nothing is registered. Unset: 0.95 in new-domain, else as it was.",
    ),
]
Dedup = Annotated[
    bool | None,
    typer.Option(
        "--dedup/--no-dedup",
        help="Return one of each group of near-duplicates. Unset: not in new-domain, else as it was.",
    ),
]
MODEL = "Generator: short name, models:/…, a folder, or what ships with this package: sticker-generator[-discrete]."
DATABASE = "Short name (its champion), models:/NAME@ALIAS, models:/NAME/VERSION, or a folder."
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
_AGES = ((86_400, "d"), (3_600, "h"), (60, "min"))


def settings(root: str | None) -> "Settings":
    """The environment's settings, with ``root`` in the place of theirs when one is given."""
    from tasks.stage import settings_of

    return settings_of(root)


def index_changes(
    index: str | None, memory: float | None, target_recall: float | None, dedup: bool | None
) -> "IndexOverrides":
    """What the options of an index ask for; ``memory`` in GiB. Options that are not given leave it as it is."""
    from tasks.index.task import IndexOverrides

    memory_bytes = None if memory is None else int(memory * 2**30)
    return IndexOverrides(index=index, memory_bytes=memory_bytes, target_recall=target_recall, dedup=dedup)


@contextmanager
def report_errors(verbose: bool) -> Iterator[None]:
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
        from infra.text import sanitised

        print(f"knn-diffusion: {sanitised(' '.join(str(error).split()))}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("knn-diffusion: interrupted; what is committed is kept, run again to go on", file=sys.stderr)
        raise typer.Exit(130) from None


def open_image(path: Path) -> "Image.Image":
    """The picture in a file, turned upright. Raises ``InputError`` when there is none."""
    from PIL import Image, ImageOps

    from infra.errors import InputError

    try:
        with Image.open(path) as image:
            image.load()
            upright: Image.Image = image
            with suppress(Exception):  # unreadable EXIF is no reason to refuse a picture
                upright = ImageOps.exif_transpose(image)
            return upright
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; name a picture") from None
    except Exception as error:  # Pillow's plugins raise what they like on damaged data
        raise InputError(f"{path} is no picture that can be read ({error}); name a PNG, JPEG or WebP") from error


def writable(out: Path, kind: str, suffixes: Sequence[str]) -> None:
    """Raise ``InputError`` for a name that cannot be written to, before anything long begins."""
    from infra.errors import InputError

    if out.suffix.lower() not in suffixes:
        raise InputError(f"{out} is no {kind} name; end it in {suffixes[0]}")
    if not out.parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist; make it, or write elsewhere")
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise InputError(f"{out} cannot be written to; name another file")


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Print ``rows`` under the heads of ``columns``; what a row lacks shows as a dash."""
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
    """Print the traceback of the error that is being handled to standard error."""
    from infra.text import sanitised

    print("\n".join(sanitised(line) for line in traceback.format_exc().rstrip().split("\n")), file=sys.stderr)


def size(count: int) -> str:
    """Bytes in words: 512 B, 1.5 kB, 23 MB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if round(value) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if unit != "B" and value < 9.95 else f"{value:.0f} {unit}"


def age(created_ms: int) -> str:
    """How long ago a time in milliseconds of the epoch was: 3 min, 2 h, 5 d."""
    seconds = max(0.0, time.time() - created_ms / 1000)
    for length, unit in _AGES:
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


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
