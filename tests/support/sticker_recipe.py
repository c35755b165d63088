"""The recipe of the bundled generator: its command line, its modules, and small image files."""

import importlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from support.tiny_domain import SHAPES, drawn

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "model" / "pretrained" / "sticker-generator" / "train.py"


class Done(NamedTuple):
    """Exit code of a command, and what it wrote to standard error."""

    returncode: int
    output: str


Run = Callable[..., Done]


def write_style(path: Path, colours: tuple[str, ...], side: int = 32) -> None:
    encoded = []
    for colour in colours:
        for shape in SHAPES:
            buffer = io.BytesIO()
            drawn(colour, shape, side).save(buffer, "WEBP", lossless=True)
            encoded.append(buffer.getvalue())
    pq.write_table(pa.table({"webp": encoded}), path)


SIZE = ["--size", "16", "--width", "16", "--head", "16", "--layers", "1", "--batch", "4", "--watch", "2"]


def command(name: str, stickers: Path, out: Path, images: int) -> list[str]:
    folders = ["--stickers", str(stickers), "--out", str(out)]
    return [sys.executable, str(SCRIPT), name, *folders, "--images", str(images), "--channels", "8", "8", "8", *SIZE]


def part(name: str) -> Any:
    """Import a module of the folder beside the script."""
    return importlib.import_module(f"sticker_recipe.{name}")
