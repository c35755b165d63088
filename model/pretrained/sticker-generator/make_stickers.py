"""Build the sticker training set from public icon packages: one parquet file per style, as read by train.py.

The script uses the npm packages of the table below and downloads missing tarballs with ``npm pack``. It renders every
icon at 64 × 64 px on white, with its name and its Unicode CLDR keywords as captions. A style with an existing parquet
file is skipped, so an interrupted run resumes. With these versions, resvg-py 0.5 and Pillow 13, the files are byte for
byte those that the bundled generator was trained on.

Columns: key (style/icon), style, license (SPDX), captions (name first, then keywords), webp (64 × 64 px, RGB).
30,863 images of 18 styles: 41 MB, from 53 MB of packages, in two and a half minutes on one CPU core. It needs npm,
which is part of Node.js, and the ``stickers`` extra with the SVG renderer. Command:

    python model/pretrained/sticker-generator/make_stickers.py --out STICKERS
    python model/pretrained/sticker-generator/make_stickers.py --out STICKERS --styles twemoji openmoji
    python model/pretrained/sticker-generator/make_stickers.py --out STICKERS --packages TARBALLS    # without npm
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

SIDE = 64
RENDER_SIDE = 128  # rendered at this size and scaled down, which preserves thin lines
QUALITY = 92  # of the WebP
BLANK = 3.0  # minimum standard deviation of the pixels (0 to 255); below it an icon is blank
DOWNLOAD_TIMEOUT_S = 600
log = logging.getLogger("make-stickers")


class PackageError(Exception):
    """Raised when a package cannot be downloaded or used; the message says how to fix it."""


@dataclass(frozen=True, slots=True)
class Package:
    """An npm package.

    ``icon`` is a regular expression for the keys of the icons to use. Its group is the name or the country of an icon.
    """

    name: str
    version: str
    license: str
    icon: str = r"(?P<name>.+)"

    @property
    def tarball(self) -> str:
        """The file name of the tarball of ``npm pack``."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


COUNTRY = r"(?P<country>[a-z]{2})"
DRAWN_LARGER = r"(?P<name>.+)-(?:24|32|48)"  # the same icons at 16, 20 and 28 px have less detail
FILLED_TOO = r"(?P<name>.+?)(?:-fill)?"
NUMBERED = r"(?P<name>.+?)(?:-\d+)?"
NAMES = Package("emojibase-data", "17.0.0", "MIT")
STYLES = {
    "circle-flags": Package("@iconify-json/circle-flags", "1.2.11", "MIT", COUNTRY),
    "emojione-v1": Package("@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0"),
    "flag": Package("@iconify-json/flag", "1.2.12", "MIT", COUNTRY + "-4x3"),
    "flagpack": Package("@iconify-json/flagpack", "1.2.8", "MIT", COUNTRY),
    "flat-color-icons": Package("@iconify-json/flat-color-icons", "1.2.3", "MIT"),
    "fluent-3d": Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT"),
    "fluent-color": Package("@iconify-json/fluent-color", "1.2.21", "MIT", DRAWN_LARGER),
    "fluent-emoji": Package("@iconify-json/fluent-emoji", "1.2.7", "MIT"),
    "fluent-emoji-flat": Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    "fxemoji": Package("@iconify-json/fxemoji", "1.2.2", "Apache-2.0"),
    "meteocons": Package("@iconify-json/meteocons", "1.2.4", "MIT", FILLED_TOO),
    "noto": Package("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    "noto-v1": Package("@iconify-json/noto-v1", "1.2.5", "Apache-2.0"),
    "openmoji": Package("@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0"),
    "streamline-emojis": Package("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0", NUMBERED),
    "streamline-freehand-color": Package("@iconify-json/streamline-freehand-color", "1.2.2", "CC-BY-4.0", NUMBERED),
    "streamline-ultimate-color": Package("@iconify-json/streamline-ultimate-color", "1.2.2", "CC-BY-4.0", NUMBERED),
    "twemoji": Package("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
}
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

    def captions(self, name: str) -> list[str]:
        """Return the name and its keywords; for a flag, "flag of X" and "X flag"."""
        if flag := re.fullmatch(r"flag (?:for )?(.+)", name):
            return [f"flag of {flag[1]}", f"{flag[1]} flag"]
        return [name, *self._keywords.get(_normalised(name), [])]


def _normalised(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()


def fetch(package: Package, folder: Path) -> Path:
    """Return the package's tarball in ``folder``, downloaded with ``npm pack`` if it is missing."""
    tarball = folder / package.tarball
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


def render(icons: dict[str, Any], icon: dict[str, Any]) -> Image.Image:
    """Render an Iconify icon on transparency, ``RENDER_SIDE`` px high; ``currentColor`` becomes black."""
    import resvg_py

    left, top = (icon.get(side, icons.get(side, 0)) for side in ("left", "top"))
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, height=RENDER_SIDE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)))


def frame(image: Image.Image) -> Image.Image:
    """Centre the whole image on a white square of 64 px, RGB."""
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image.convert("RGBA"), ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def iconify_images(package: Package, tarball: Path, names: Names) -> Iterator[tuple[str, str, Image.Image]]:
    """Yield key, name and image of the matching icons of an Iconify set, except its hidden ones."""
    files = unpack(tarball, r"(icons|info)\.json")
    icons, info = json.loads(files["icons.json"]), json.loads(files["info.json"])
    check_license(package, info["license"]["spdx"])
    for key, icon in tqdm(icons["icons"].items(), desc=icons["prefix"], unit="image", leave=False):
        match = re.fullmatch(package.icon, key)
        if match is None or icon.get("hidden"):
            continue
        name = names.flags.get(key[:2]) if match.lastgroup == "country" else match["name"].replace("-", " ")
        if name is not None:
            yield key, name, render(icons, icon)


def fluent_images(package: Package, tarball: Path, names: Names) -> Iterator[tuple[str, str, Image.Image]]:
    """Yield key, name and image of each WebP file that is named after an emoji's code points."""
    files = unpack(tarball, r"package\.json|assets/.+\.webp")
    check_license(package, json.loads(files.pop("package.json"))["license"])
    for path, webp in tqdm(files.items(), desc="fluent-3d", unit="image", leave=False):
        key = Path(path).stem
        if key in names.emojis:
            yield key, names.emojis[key], Image.open(io.BytesIO(webp))


def make_style(style: str, names: Names, packages: Path, out: Path) -> int:
    """Write the style's parquet file atomically and return its number of rows."""
    package = STYLES[style]
    tarball = fetch(package, packages)
    read_images = iconify_images if package.name.startswith("@iconify-json/") else fluent_images
    rows = []
    with reading(tarball):
        for key, name, image in read_images(package, tarball, names):
            sticker = frame(image)
            if np.asarray(sticker).std() < BLANK:
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
    missing = [style for style in options.styles if not (options.out / f"{style}.parquet").exists()]
    log.info("%d styles requested, %d of them exist", len(options.styles), len(options.styles) - len(missing))
    if not missing:
        return
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        tarball = fetch(NAMES, packages)
        with reading(tarball):
            names = Names(json.loads(unpack(tarball, r"en/data\.json")["en/data.json"]))
        for style in missing:
            log.info("%-28s %5d images", style, make_style(style, names, packages, options.out))
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
        "--styles", nargs="+", choices=STYLES, default=list(STYLES), metavar="STYLE", help="default: all 18"
    )
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
