"""Training data: images, embeddings, neighbours and aligned references of the sticker files, cached in one file.

Legend: ``N`` images, ``S`` side, ``D`` embedding width.
"""

import argparse
import hashlib
import io
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from model.configs import NEAR_DUPLICATE, ConditioningConfig
from model.encoder.clip import Encoder
from model.images import image_to_array
from model.training.alignment import align_all
from model.training.data import TrainingRows, TrainingSet
from sticker_recipe.encoder import load_encoder

UNSEEN = frozenset({"openmoji", "twemoji"})
WATCHED = "openmoji"
"""The unseen style that training is monitored on. The other one stays out of every choice."""
NEIGHBOURS, POOL = 10, 20
LAYOUT = 2
"""Version of the cached arrays."""
SIDE = 64
"""Side in px of the encoder's input, and the smallest side at which images are read."""
CHANNEL_ORDERS = ((1, 2, 0), (2, 0, 1), (2, 1, 0), (0, 2, 1), (1, 0, 2))
log = logging.getLogger("sticker-generator")


def load(path: Path, limit: int | None, side: int) -> NDArray[np.uint8]:
    """Read the images of a style, (N, side, side, 3) uint8."""
    encoded = pq.read_table(path, columns=["webp"])["webp"].to_pylist()[:limit]

    def decode(webp: bytes) -> NDArray[np.uint8]:
        with Image.open(io.BytesIO(webp)) as image:
            return image_to_array(image.convert("RGB"), side)

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(decode, encoded)))


def resized(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Scale images (N, S, S, 3) down to (N, side, side, 3)."""
    if side == pixels.shape[1]:
        return pixels
    return np.stack([cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in pixels])


def nearest(
    rows: NDArray[np.float16], k: int, device: str, styles: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Return ids (N, k) of the k nearest other rows of each of ``rows`` (N, D), without exact copies of the row.

    With ``styles`` (N,), rows of the same style come first. Others follow if a style has too few.
    """
    dense = torch.from_numpy(rows).float().to(device)
    labels = None if styles is None else torch.from_numpy(styles).to(device)
    groups = torch.from_numpy(np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)).to(device)
    found = []
    for start in range(0, len(dense), 1024):
        scores = dense[start : start + 1024] @ dense.T
        if labels is not None:
            scores += 4.0 * (labels[start : start + 1024, None] == labels)  # more than the range of a cosine
        scores[groups[start : start + 1024, None] == groups] = -2
        found.append(scores.topk(k, dim=1).indices)
    return torch.cat(found).cpu().numpy()


def near_duplicates(rows: NDArray[np.float16], device: str) -> NDArray[np.int64]:
    """Return the number (N,) of near-duplicates of each of ``rows`` (N, D), itself included."""
    dense = F.normalize(torch.from_numpy(rows).float().to(device), dim=1)
    found = [(chunk @ dense.T >= NEAR_DUPLICATE).sum(1) for chunk in torch.split(dense, 1024)]
    return torch.cat(found).clamp(min=1).cpu().numpy()


def mirrored(pixels: NDArray[np.uint8], styles: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Mirror images horizontally. ``styles`` is unused."""
    return np.ascontiguousarray(pixels[:, :, ::-1])


def recoloured(pixels: NDArray[np.uint8], styles: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Permute the colour channels, with the same permutation for all images of a style."""
    orders = np.array(CHANNEL_ORDERS)[styles % len(CHANNEL_ORDERS)]
    return np.take_along_axis(pixels, orders[:, None, None], axis=3)


# A variant is a separate domain with its own embeddings and neighbours. The network must therefore take the colours
# from the neighbours. The number is how often an epoch contains each image of the variant.
Change = Callable[[NDArray[np.uint8], NDArray[np.int64]], NDArray[np.uint8]]
VARIANTS: dict[str, tuple[int, Change]] = {
    "as they are": (4, lambda pixels, styles: pixels),
    "mirrored": (1, mirrored),
    "recoloured": (1, recoloured),
}


def prepare(options: argparse.Namespace) -> dict[str, NDArray[Any]]:
    """Compute pixels, embeddings, neighbours, aligned references and weights of all variants; cache them in a file."""
    cache = options.out / f"data-{LAYOUT}-{data_digest(options)[:12]}.npz"
    if cache.exists():
        return dict(np.load(cache))
    encoder = load_encoder(options)
    paths = {path.stem: path for path in sorted(options.stickers.glob("*.parquet"))}
    side = max(options.size, SIDE)
    loaded = {name: load(path, options.limit, side) for name, path in paths.items() if name not in UNSEEN}
    pixels = np.concatenate(list(loaded.values()))
    styles = np.repeat(np.arange(len(loaded)), [len(images) for images in loaded.values()])
    for name, images in loaded.items():
        log.info("%-28s %5d images", name, len(images))
    pool = min(POOL, len(pixels) - 1)
    near = nearest(embedded(pixels, encoder), pool, options.device)
    aligned = align_all(resized(pixels, options.size), near)
    log.info("%.0f%% of the first neighbours were aligned", 100 * aligned.converged)
    parts: dict[str, list[NDArray[Any]]] = {}
    for number, (weight, change) in enumerate(VARIANTS.values()):
        changed = change(pixels, styles)
        rows = embedded(changed, encoder)
        arrays: dict[str, NDArray[Any]] = {
            "pixels": resized(changed, options.size),
            "rows": rows,
            "neighbours": nearest(rows, pool, options.device) + number * len(pixels),
            "own_style_neighbours": nearest(rows, pool, options.device, styles) + number * len(pixels),
            "near_duplicates": near_duplicates(rows, options.device),
            "references": change(aligned.pixels, styles),
            "weights": np.full(len(pixels), weight),
        }
        for name, part in arrays.items():
            parts.setdefault(name, []).append(part)
    data = {name: np.concatenate(part) for name, part in parts.items()}
    for name in sorted(UNSEEN & paths.keys()):
        unseen = load(paths[name], options.limit, side)
        data[f"{name}_pixels"], data[f"{name}_rows"] = resized(unseen, options.size), embedded(unseen, encoder)
    unfinished = cache.with_suffix(".partial.npz")
    np.savez(unfinished, **data)  # type: ignore[arg-type]
    unfinished.rename(cache)
    return data


def data_digest(options: argparse.Namespace) -> str:
    """Return the digest of the image files, the size and the limit per style."""
    files = {path.name: file_digest(path) for path in sorted(options.stickers.glob("*.parquet"))}
    return hashlib.sha256(json.dumps([files, options.size, options.limit]).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def embedded(pixels: NDArray[np.uint8], encoder: Encoder) -> NDArray[np.float16]:
    """Return float16 embeddings (N, D), as stored by the embedding stage."""
    return encoder.embed_pixels(resized(pixels, SIDE)).numpy().astype(np.float16)


def conditioning(options: argparse.Namespace) -> ConditioningConfig:
    """Return the condition of the training samples."""
    return ConditioningConfig(
        neighbours=NEIGHBOURS, pool=POOL, fewer_neighbours=options.fewer_neighbours, mean_query=options.mean_query
    )


def training_set(
    data: dict[str, NDArray[Any]], options: argparse.Namespace, *, references: bool = False
) -> TrainingSet:
    """Return the training set, each image repeated by its weight; with aligned neighbours for editing.

    With ``--balanced``, the weight is divided among near-duplicates: of five skin tones with weight 4, four are used
    once. A share ``--own-style-share`` of the samples has neighbours of the image's own style.
    """
    weights = data["weights"] / (data["near_duplicates"] if options.balanced else 1)
    ends = np.floor(np.cumsum(weights) + 0.5).astype(np.int64)
    chosen = np.repeat(np.arange(len(weights)), np.diff(ends, prepend=0))
    own_style = np.random.default_rng(0).random((len(chosen), 1)) < options.own_style_share
    rows = TrainingRows(
        images=data["pixels"][chosen],
        embeddings=data["rows"][chosen],
        neighbours=np.where(own_style, data["own_style_neighbours"][chosen], data["neighbours"][chosen]),
        reference=data["references"][chosen] if references else None,
    )
    images = data["pixels"] if options.image_tokens else None
    return TrainingSet(rows, data["rows"], device=options.device, window_rows=len(chosen), database_images=images)
