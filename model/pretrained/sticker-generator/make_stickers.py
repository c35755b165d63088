"""Make the sticker training set from the public icon packages: one parquet file a style, as train.py reads them.

It takes the npm packages of the table below, those whose tarball is in the folder already and the rest through
``npm pack``, draws every icon at 64 × 64 px on white, and captions it with its name and the keywords that Unicode CLDR
has for it. A style whose parquet file is there is skipped, so a killed run goes on where it was. With these versions
(and resvg-py 0.5, Pillow 13) the files are those that the embedded generator was trained on, byte for byte.

Columns: key (style/icon), style, license (SPDX), captions (name first, then keywords), webp (64 × 64 px, RGB).
30,863 pictures of 18 styles: 41 MB, from 53 MB of packages, in two and a half minutes on one CPU core. It needs npm,
which comes with Node.js, and the ``stickers`` extra, which brings the SVG renderer. Command:

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
DRAWN_SIDE = 128  # scaled down from here, which keeps thin lines
QUALITY = 92  # of the WebP
BLANK = 3.0  # standard deviation of the pixels, 0 to 255: white on white shows nothing
DOWNLOAD_TIMEOUT_S = 600
log = logging.getLogger("make-stickers")


class PackageError(Exception):
    """A package that cannot be had or used; the message names the mend."""


@dataclass(frozen=True, slots=True)
class Package:
    """One npm package; ``icon`` is the pattern of the icons that are taken, its group their name or country."""

    name: str
    version: str
    license: str
    icon: str = r"(?P<name>.+)"

    @property
    def tarball(self) -> str:
        """The file name that ``npm pack`` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


COUNTRY = r"(?P<country>[a-z]{2})"
DRAWN_LARGER = r"(?P<name>.+)-(?:24|32|48)"  # the same icons at 16, 20 and 28 px are coarser
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
    """Names and keywords of Unicode CLDR, by code points, by country and by name."""

    def __init__(self, emojis: list[dict[str, Any]]) -> None:
        """Index emojibase's ``data.json``; an emoji in a skin tone has the keywords of the emoji."""
        self.emojis: dict[str, str] = {}
        self.flags: dict[str, str] = {}
        self._keywords: dict[str, list[str]] = {}
        for emoji in emojis:
            for form in [emoji, *emoji.get("skins", [])]:
                code, name = form["hexcode"].lower(), form["label"].replace(": ", " ")
                self.emojis[code] = name
                self._keywords.setdefault(_plain(name), emoji.get("tags", []))
                if flag := re.fullmatch(r"(1f1[ef]\w)-(1f1[ef]\w)", code):
                    country = "".join(chr(int(letter, 16) - 0x1F1E6 + ord("a")) for letter in flag.groups())
                    self.flags[country] = name

    def captions(self, name: str) -> list[str]:
        """The name, then its keywords; the name of a flag both ways."""
        if flag := re.fullmatch(r"flag (?:for )?(.+)", name):
            return [f"flag of {flag[1]}", f"{flag[1]} flag"]
        return [name, *self._keywords.get(_plain(name), [])]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()


def fetch(package: Package, folder: Path) -> Path:
    """The package's tarball in ``folder``: the one that lies there, or a new one through ``npm pack``."""
    tarball = folder / package.tarball
    if tarball.is_file():
        return tarball
    npm = shutil.which("npm")
    if npm is None:
        raise PackageError(f"{tarball} is missing and npm is not installed: install Node.js, or put the file there")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}@{package.version}"
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        command = [npm, "pack", wanted, "--pack-destination", aside, "--loglevel", "error"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)  # noqa: S603
            (Path(aside) / tarball.name).rename(tarball)
        except subprocess.CalledProcessError as error:
            said = (error.stderr.strip() or str(error)).splitlines()[0]
            raise PackageError(f"{wanted} cannot be downloaded ({said}): try again, or put {tarball} there") from error
        except (subprocess.TimeoutExpired, OSError) as error:
            raise PackageError(f"{wanted} cannot be downloaded ({error}): try again, or put {tarball} there") from error
    return tarball


@contextmanager
def reading(tarball: Path) -> Iterator[None]:
    """Tell whatever goes wrong with a tarball's content in one line that names it."""
    try:
        yield
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError, TypeError, ValueError) as error:
        told = f"{tarball} cannot be used ({type(error).__name__}: {error})"
        raise PackageError(f"{told}: delete it, and the next run gets it anew") from error


def unpack(tarball: Path, files: str) -> dict[str, bytes]:
    """The files whose path in the package matches the pattern, in its order; nothing is written to disk."""
    found = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            path = member.name.removeprefix("package/")
            content = archive.extractfile(member) if re.fullmatch(files, path) else None
            if content is not None:
                found[path] = content.read()
    return found


def check_license(package: Package, license: str | None) -> None:  # noqa: A002
    """Refuse a package whose licence is not the one in the table."""
    if license != package.license:
        raise PackageError(f"{package.tarball}: its licence is {license}, not {package.license}: get the npm package")


def draw(icons: dict[str, Any], icon: dict[str, Any]) -> Image.Image:
    """An Iconify icon, transparent where it is empty, ``DRAWN_SIDE`` high; black where it takes the text's colour."""
    import resvg_py

    left, top = (icon.get(side, icons.get(side, 0)) for side in ("left", "top"))
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, height=DRAWN_SIDE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)))


def frame(picture: Image.Image) -> Image.Image:
    """The whole picture in the middle of a white square of 64 px, RGB."""
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture.convert("RGBA"), ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def iconify_images(package: Package, tarball: Path, names: Names) -> Iterator[tuple[str, str, Image.Image]]:
    """Key, name and picture of each icon of an Iconify set that is taken; what the set itself hides is not."""
    files = unpack(tarball, r"(icons|info)\.json")
    icons, info = json.loads(files["icons.json"]), json.loads(files["info.json"])
    check_license(package, info["license"]["spdx"])
    for key, icon in tqdm(icons["icons"].items(), desc=icons["prefix"], unit="picture", leave=False):
        match = re.fullmatch(package.icon, key)
        if match is None or icon.get("hidden"):
            continue
        name = names.flags.get(key[:2]) if match.lastgroup == "country" else match["name"].replace("-", " ")
        if name is not None:
            yield key, name, draw(icons, icon)


def fluent_images(package: Package, tarball: Path, names: Names) -> Iterator[tuple[str, str, Image.Image]]:
    """Key, name and picture of each WebP file that is named after the code points of an emoji."""
    files = unpack(tarball, r"package\.json|assets/.+\.webp")
    check_license(package, json.loads(files.pop("package.json"))["license"])
    for path, webp in tqdm(files.items(), desc="fluent-3d", unit="picture", leave=False):
        key = Path(path).stem
        if key in names.emojis:
            yield key, names.emojis[key], Image.open(io.BytesIO(webp))


def make_style(style: str, names: Names, packages: Path, out: Path) -> int:
    """Write the style's parquet file, aside and renamed; returns its rows."""
    package = STYLES[style]
    tarball = fetch(package, packages)
    pictures = iconify_images if package.name.startswith("@iconify-json/") else fluent_images
    rows = []
    with reading(tarball):
        for key, name, picture in pictures(package, tarball, names):
            sticker = frame(picture)
            if np.asarray(sticker).std() < BLANK:
                continue
            sticker.save(webp := io.BytesIO(), "WEBP", quality=QUALITY)
            row = (f"{style}/{key}", style, package.license, names.captions(name), webp.getvalue())
            rows.append(dict(zip(SCHEMA.names, row, strict=True)))
        if not rows:
            raise ValueError("no picture in it")
    partial = out / f"{style}.partial"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial, compression="none")
    partial.rename(out / f"{style}.parquet")
    return len(rows)


def main() -> None:
    """Make every style that is not there yet."""
    options = _options()
    packages = options.packages or options.out / "packages"
    missing = [style for style in options.styles if not (options.out / f"{style}.parquet").exists()]
    log.info("%d styles asked for, %d of them are there", len(options.styles), len(options.styles) - len(missing))
    if not missing:
        return
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        tarball = fetch(NAMES, packages)
        with reading(tarball):
            names = Names(json.loads(unpack(tarball, r"en/data\.json")["en/data.json"]))
        for style in missing:
            log.info("%-28s %5d pictures", style, make_style(style, names, packages, options.out))
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install 'knn-diffusion[stickers]'") from None
    except PackageError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(f"{error}: --out and --packages are to be folders that can be written to") from None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the parquet files, one a style")
    parser.add_argument("--packages", type=Path, help="folder of the tarballs, OUT/packages unless told; npm fills it")
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES), metavar="STYLE", help="all 18")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    main()
