"""Pack all that a run needs on another machine into one archive: images, sources, the image encoder and a command."""

import argparse
import io
import logging
import math
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

import model
from sticker_recipe.data import SIDE, load, style_files
from sticker_recipe.encoder import write_image_encoder
from sticker_recipe.sheets import sheets
from sticker_recipe.styles import UNSEEN

ARCHIVE = "sticker-generator.tar.gz"
LARGEST_BYTES = 60_000_000
COLUMNS = ["style", "license", "webp"]
"""Columns of the images that are packed. Captions are never read."""
UNSEEN_IMAGES = 1024
"""Largest number of images of an unseen style that are packed at more than 64 px, evenly spaced."""
PATCHES = 16
"""Most patches along a side of an image, so that larger images take no more tokens."""
COMMAND = """#!/bin/sh
# Train for MINUTES and write files of at most 16 MiB to OUT: ./run.sh MINUTES OUT [options of train.py base]
# Repeat the command to resume. The checkpoint stays in state/, in this folder.
set -eu
minutes=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
shift 2
cd "$(dirname "$0")"
PYTHONPATH=. exec "${PYTHON:-python3}" model/pretrained/sticker-generator/train.py base \\
    --stickers stickers --encoder encoder --out state --export "$out" --minutes "$minutes" \\
    --size SIZE --patch PATCH --rotary --schedule wsd --choose gap --image-tokens 1 --device cuda --watch 1000 \\
    --own-style-share 0.5 --balanced --mean-query 0.33 --fewer-neighbours 0.5 "$@"
"""
log = logging.getLogger("sticker-generator")


def pack(options: argparse.Namespace) -> None:
    """Write the archive to the output folder. Exit if it is larger than ``LARGEST_BYTES``, or cannot be trained on."""
    patch = max(4, options.size // PATCHES)
    if options.size % (2 * patch):  # images of neighbours have patches of twice the side
        raise SystemExit(
            f"--size is not a multiple of {2 * patch}: {options.size}; patches of {patch} px must fit into it"
        )
    archive = options.out / ARCHIVE
    unfinished = archive.with_suffix(".partial")
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(unfinished, "w:gz") as tar:
        for name, path in _files(options, Path(scratch)):
            tar.add(path, name, filter=_anonymous)
        content = COMMAND.replace("SIZE", str(options.size)).replace("PATCH", str(patch)).encode()
        command = tarfile.TarInfo("run.sh")
        command.size, command.mode = len(content), 0o755
        tar.addfile(command, io.BytesIO(content))
    size = unfinished.stat().st_size
    if size > LARGEST_BYTES:
        unfinished.unlink()
        raise SystemExit(
            f"the archive is too large: {size / 1e6:.1f} MB, at most {LARGEST_BYTES / 1e6:.0f} MB; remove styles from "
            f"{options.stickers}"
        )
    unfinished.rename(archive)
    log.info("%s: %.1f MB; unpack it and run ./run.sh MINUTES OUT", archive, size / 1e6)


def _files(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name in the archive and the path of every file. Changed files are written to ``scratch``."""
    package = Path(model.__file__).parent
    recipe = package / "pretrained" / "sticker-generator"
    sources = [path for path in package.rglob("*.py") if "pretrained" not in path.relative_to(package).parts]
    for path in sorted([*sources, recipe / "train.py", *(recipe / "sticker_recipe").glob("*.py")]):
        yield str(path.relative_to(package.parent)), path
    for path in (path for paths in style_files(options.stickers) for path in paths.values()):
        columns = [name for name in COLUMNS if name in pq.read_schema(path).names]
        if "webp" not in columns:
            raise SystemExit(f"{path} has sheets of images, from an archive; pack the files of make_stickers.py")
        table = pq.read_table(path, columns=columns)
        if options.size > SIDE:
            every = math.ceil(table.num_rows / UNSEEN_IMAGES) if path.stem in UNSEEN else 1
            table = table.take(list(range(0, table.num_rows, every)))
            table = sheets(load(path, None, options.size)[::every], table.drop_columns(["webp"]))
        pq.write_table(table, scratch / path.name)
        yield f"stickers/{path.name}", scratch / path.name
    write_image_encoder(scratch / "encoder")
    for path in sorted((scratch / "encoder").iterdir()):
        yield f"encoder/{path.name}", path


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove the owner and the time, so that equal files give equal archives."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
