"""Build the sticker training set from public icon packages: one parquet file per style, as read by train.py.

The script uses the npm packages of ``sticker_recipe/styles.py`` and downloads missing tarballs with ``npm pack``. It
renders every icon on white, with its name and its Unicode CLDR keywords as captions. A style with an existing parquet
file is skipped, so an interrupted run resumes. With these versions, resvg-py 0.5 and Pillow 13, the files of 64 px are
byte for byte those that the bundled generator was trained on.

Columns: key (style/icon), style, license (SPDX), captions (name first, then keywords), webp (64 × 64 px, RGB).
30,863 images of 18 styles: 41 MB, from 53 MB of packages, in two and a half minutes on one CPU core. It needs npm,
which is part of Node.js, and the ``stickers`` extra with the SVG renderer. Command:

    python model/pretrained/sticker-generator/make_stickers.py --out STICKERS
    python model/pretrained/sticker-generator/make_stickers.py --out STICKERS --styles twemoji openmoji
    python model/pretrained/sticker-generator/make_stickers.py --out STICKERS --packages TARBALLS    # without npm
    python model/pretrained/sticker-generator/make_stickers.py --out STICKERS-128 --styles all --side 128

The last command renders further sets too. Of these, images are left out if they have no colour, are more than twice as
wide as high, or equal an earlier one of the set.
"""

import argparse
import io
import json
import logging
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sticker_recipe.styles import BUNDLED, NAMES, STYLES, Package
from tqdm.auto import tqdm

SIDE = 64
OVERSAMPLING = 2  # icons are rendered at this multiple of the side and scaled down, which preserves thin lines
QUALITY = 92  # of the WebP
BLANK = 3.0  # minimum standard deviation of the pixels (0 to 255); below it an icon is blank
WIDEST = 2.0  # ratio of the sides above which a filtered set's image is left out: words beside a logo
COLOURED, COLOURED_SHARE = 32, 0.004  # a pixel has a colour if its channels differ by more; minimum share of the pixels
DOWNLOAD_TIMEOUT_S = 600
log = logging.getLogger("make-stickers")


class PackageError(Exception):
    """Raised when a package cannot be downloaded or used; the message says how to fix it."""


SCHEMA = pa.schema([
    ("key", pa.string()), ("style", pa.string()), ("license", pa.string()), ("captions", pa.list_(pa.string())),
    ("webp", pa.binary()),
])  # fmt: skip


class Names:
    """Names and keywords of Unicode CLDR, indexed by code points, country and name."""

    def __init__(self, emojis: list[dict[str, Any]]) -> None:
        """Index emojibase's ``data.json``; variants with a skin tone get the keywords of their emoji."""
        self.emojis: dict[str, str] = {}
        self.flags: dict[str, str] = {}
        self._keywords: dict[str, list[str]] = {}
        for emoji in emojis:
            for form in [emoji, *emoji.get("skins", [])]:
                code, name = form["hexcode"].lower(), form["label"].replace(": ", " ")
                self.emojis[code] = name
                self._keywords.setdefault(_normalised(name), emoji.get("tags", []))
                if flag := re.fullmatch(r"(1f1[ef]\w)-(1f1[ef]\w)", code):
                    country = "".join(chr(int(letter, 16) - 0x1F1E6 + ord("a")) for letter in flag.groups())
                    self.flags[country] = name

    def of_icon(self, package: Package, key: str) -> str | None:
        """Return the name of the icon ``key``, or None if the package's pattern excludes it or it has none."""
        match = re.fullmatch(package.icon, key)
        if match is None:
            return None
        if match.lastgroup == "country":
            return self.flags.get(match["country"])
        if match.lastgroup == "code":
            return self.emojis.get(match["code"])
        name: str = package.caption.format(re.sub("[-_]", " ", match["name"]))
        return name

    def captions(self, name: str) -> list[str]:
        """Return the name and its keywords; for a flag, "flag of X" and "X flag"."""
        if flag := re.fullmatch(r"flag (?:for )?(.+)", name):
            return [f"flag of {flag[1]}", f"{flag[1]} flag"]
        return [name, *self._keywords.get(_normalised(name), [])]


def _normalised(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()


def fetch(package: Package, folder: Path) -> Path:
    """Return the package's tarball in ``folder``, downloaded with ``npm pack`` if it is missing."""
    tarball: Path = folder / package.tarball
    if tarball.is_file():
        return tarball
    npm = shutil.which("npm")
    if npm is None:
        raise PackageError(
            f"tarball is missing, and npm is not installed: {tarball}; install Node.js, or put the file there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    spec = f"{package.name}@{package.version}"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [npm, "pack", spec, "--pack-destination", temporary, "--loglevel", "error"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)  # noqa: S603
            (Path(temporary) / tarball.name).rename(tarball)
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip() or str(error)).splitlines()[0]
            raise PackageError(f"{spec} cannot be downloaded: {reason}; try again, or put {tarball} there") from error
        except (subprocess.TimeoutExpired, OSError) as error:
            raise PackageError(f"{spec} cannot be downloaded: {error}; try again, or put {tarball} there") from error
    return tarball


@contextmanager
def reading(tarball: Path) -> Iterator[None]:
    """Raise errors in a tarball's content as a one-line ``PackageError`` with its path."""
    try:
        yield
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PackageError(f"{tarball} cannot be used: {reason}; delete it, and run again to download it") from error


def unpack(tarball: Path, files: str) -> dict[str, bytes]:
    """Return the files with paths that match the pattern ``files``, in package order, without writing to disk."""
    found = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            path = member.name.removeprefix("package/")
            content = archive.extractfile(member) if re.fullmatch(files, path) else None
            if content is not None:
                found[path] = content.read()
    return found


def check_license(package: Package, license: str | None) -> None:  # noqa: A002
    """Raise ``PackageError`` unless the licence is the one in the table."""
    if license != package.license:
        raise PackageError(
            f"licence of {package.tarball} has changed: {license}, not {package.license}; use the original npm package"
        )


def render(svg: str, side: int) -> Image.Image:
    """Render an SVG on transparency, at ``OVERSAMPLING`` times the height ``side``; ``currentColor`` becomes black."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, height=OVERSAMPLING * side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)))


def frame(image: Image.Image, side: int) -> Image.Image:
    """Centre the whole image on a white square of ``side`` px, RGB."""
    longer = max(image.size)
    square = Image.new("RGBA", (longer, longer), "white")
    square.alpha_composite(image.convert("RGBA"), ((longer - image.width) // 2, (longer - image.height) // 2))
    return square.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def iconify_svg(icons: dict[str, Any], icon: dict[str, Any]) -> str:
    """Return the SVG of an icon of a set in Iconify's format."""
    left, top = (icon.get(side, icons.get(side, 0)) for side in ("left", "top"))
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def iconify_images(package: Package, tarball: Path, names: Names, side: int) -> Iterator[tuple[str, str, Image.Image]]:
    """Yield key, name and image of the matching icons of an Iconify set, except hidden and empty ones."""
    if package.member is None:
        files = unpack(tarball, r"(icons|info)\.json")
        icons, info = json.loads(files["icons.json"]), json.loads(files["info.json"])
    else:
        icons = json.loads(unpack(tarball, re.escape(package.member))[package.member])
        info = icons["info"]
    check_license(package, info["license"]["spdx"])
    for key, icon in tqdm(icons["icons"].items(), desc=icons["prefix"], unit="image", leave=False):
        empty = 0 in (icon.get("width"), icon.get("height"))  # a fault of the set: it cannot be rendered
        name = None if empty or icon.get("hidden") else names.of_icon(package, key)
        if name is not None:
            yield key, name, render(iconify_svg(icons, icon), side)


def file_images(package: Package, tarball: Path, names: Names, side: int) -> Iterator[tuple[str, str, Image.Image]]:
    """Yield key, name and image of the matching SVG and WebP files of a package."""
    files = unpack(tarball, rf"package\.json|{package.files}")
    check_license(package, json.loads(files.pop("package.json"))["license"])
    for path, content in tqdm(files.items(), desc=package.name, unit="image", leave=False):
        key = Path(path).stem
        name = names.of_icon(package, key)
        if name is not None:
            svg = path.endswith(".svg")
            yield key, name, render(content.decode(), side) if svg else Image.open(io.BytesIO(content))


class Suitable:
    """Decides which images of a set are used."""

    def __init__(self, package: Package) -> None:
        """Leave out blank images; of a filtered set also those without colour, wide ones and copies."""
        self._filtered, self._seen = package.filtered, set[int]()

    def __call__(self, image: Image.Image, sticker: Image.Image) -> bool:
        """Return True if the ``image``, framed as ``sticker``, is used."""
        pixels = np.asarray(sticker)
        if pixels.std() < BLANK:
            return False
        if not self._filtered:
            return True
        wide = max(image.size) > WIDEST * min(image.size)
        coloured = (np.ptp(pixels, axis=2) > COLOURED).mean() >= COLOURED_SHARE
        content = hash(pixels.tobytes())
        copy = content in self._seen
        self._seen.add(content)
        return coloured and not wide and not copy


def exists(path: Path, side: int) -> bool:
    """Return True if the style's file exists. Exit if its images have another side."""
    if not path.exists():
        return False
    first = next(pq.ParquetFile(path).iter_batches(batch_size=1, columns=["webp"]))["webp"][0].as_py()
    found = Image.open(io.BytesIO(first)).width
    if found != side:
        raise SystemExit(f"{path} has images of {found} px, not {side}; use another --out, or --side {found}")
    return True


def make_style(style: str, names: Names, packages: Path, out: Path, side: int = SIDE) -> int:
    """Write the style's parquet file atomically and return its number of rows."""
    package = STYLES[style]
    tarball = fetch(package, packages)
    read_images = iconify_images if package.files is None else file_images
    rows, suitable = [], Suitable(package)
    with reading(tarball):
        for key, name, image in read_images(package, tarball, names, side):
            sticker = frame(image, side)
            if not suitable(image, sticker):
                continue
            sticker.save(webp := io.BytesIO(), "WEBP", quality=QUALITY)
            row = (f"{style}/{key}", style, package.license, names.captions(name), webp.getvalue())
            rows.append(dict(zip(SCHEMA.names, row, strict=True)))
        if not rows:
            raise ValueError("no image in the package")
    partial = out / f"{style}.partial"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial, compression="none")
    partial.rename(out / f"{style}.parquet")
    return len(rows)


def main() -> None:
    """Build all requested styles that do not exist yet."""
    options = _options()
    packages = options.packages or options.out / "packages"
    missing = [style for style in options.styles if not exists(options.out / f"{style}.parquet", options.side)]
    log.info("%d styles requested, %d of them exist", len(options.styles), len(options.styles) - len(missing))
    if not missing:
        return
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        tarball = fetch(NAMES, packages)
        with reading(tarball):
            names = Names(json.loads(unpack(tarball, r"en/data\.json")["en/data.json"]))
        for style in missing:
            log.info("%-28s %5d images", style, make_style(style, names, packages, options.out, options.side))
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed; run pip install 'knn-diffusion[stickers]'") from None
    except PackageError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(f"{error}; --out and --packages must be writable folders") from None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the parquet files, one per style")
    parser.add_argument(
        "--packages", type=Path, help="folder of the tarballs, by default OUT/packages; npm adds missing ones"
    )
    parser.add_argument(
        "--styles", nargs="+", choices=[*STYLES, "all"], default=list(BUNDLED), metavar="STYLE",
        help=f"default: the {len(BUNDLED)} of the bundled generator; all: {len(STYLES)}",
    )  # fmt: skip
    parser.add_argument("--side", type=int, default=SIDE, help=f"side of the images in px, default: {SIDE}")
    options = parser.parse_args()
    options.styles = list(STYLES) if "all" in options.styles else options.styles
    return options


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
