"""Training data: images, embeddings, neighbours and aligned references of the sticker files, cached in one file.

Legend: ``N`` images, ``V`` variants of each, ``S`` side, ``D`` embedding width.
"""

import argparse
import hashlib
import io
import json
import logging
from collections.abc import Mapping
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
from sticker_recipe.sheets import COLUMN, images_of_sheets
from sticker_recipe.styles import UNSEEN, training_styles
from sticker_recipe.variants import VARIANTS, WEIGHTS, AllVariants, reader, variant

WATCHED = "openmoji"
"""The unseen style that training is monitored on. The others stay out of every choice."""
NEIGHBOURS, POOL = 10, 20
LAYOUT = 3
"""Version of the cached arrays."""
SIDE = 64
"""Side in px of the encoder's input, and the smallest side at which images are read."""
log = logging.getLogger("sticker-generator")


def style_files(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the files of the styles to train on, and those of the unseen ones, by name. Exit if one is unsuitable."""
    paths = {path.stem: path for path in sorted(folder.glob("*.parquet"))}
    for name, path in paths.items():
        if "style" in pq.read_schema(path).names:
            found = set(pq.read_table(path, columns=["style"])["style"].to_pylist())
            if found != {name}:
                raise SystemExit(f"{path} has other styles than its name: {sorted(found)}; write one file per style")
    try:
        chosen = training_styles(list(paths))
    except ValueError as error:
        raise SystemExit(f"{folder}: {error}") from None
    return {name: paths[name] for name in chosen}, {name: paths[name] for name in sorted(UNSEEN & paths.keys())}


def load(path: Path, limit: int | None, side: int) -> NDArray[np.uint8]:
    """Read the images of a style, (N, side, side, 3) uint8. Exit if they are smaller than the side asked for."""
    table = pq.read_table(path)
    if COLUMN in table.column_names:
        pixels = np.concatenate(list(images_of_sheets(table)))[:limit]
        _require(pixels.shape[1], side, path)
        return resized(pixels, side)

    def decode(webp: bytes) -> NDArray[np.uint8]:
        with Image.open(io.BytesIO(webp)) as image:
            _require(min(image.size), side, path)
            return image_to_array(image.convert("RGB"), side)

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(decode, table["webp"].to_pylist()[:limit])))


def _require(found: int, side: int, path: Path) -> None:
    if side > SIDE and found < side:
        raise SystemExit(f"images of {path} are smaller than --size: {found} px; run make_stickers.py --side {side}")


def _count(path: Path, limit: int | None) -> int:
    """Return the number of images that ``load`` returns."""
    rows: int = pq.read_metadata(path).num_rows
    if COLUMN in pq.read_schema(path).names:
        rows = sum(pq.read_table(path, columns=["images"])["images"].to_pylist())
    return min(rows, limit or rows)


def load_all(paths: Mapping[str, Path], limit: int | None, side: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the images of all styles into one array (N, side, side, 3), and the number (N,) of each one's style."""
    counts = [_count(path, limit) for path in paths.values()]
    pixels = np.empty((sum(counts), side, side, 3), dtype=np.uint8)  # joining parts would take twice the memory
    ends = np.cumsum(counts)
    for (name, path), end, count in zip(paths.items(), ends, counts, strict=True):
        pixels[end - count : end] = load(path, limit, side)
        log.info("%-28s %5d images", name, count)
    return pixels, np.repeat(np.arange(len(counts)), counts)


def resized(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Scale images (N, S, S, 3) down to (N, side, side, 3)."""
    if side == pixels.shape[1]:
        return pixels
    result = np.empty((len(pixels), side, side, 3), dtype=np.uint8)
    for image, small in zip(pixels, result, strict=True):
        cv2.resize(image, (side, side), dst=small, interpolation=cv2.INTER_AREA)
    return result


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


def encoder_inputs(pixels: NDArray[np.uint8], encoder: Encoder) -> NDArray[np.uint8]:
    """Resize images (N, S, S, 3) to the input of the encoder, as it does itself, in threads."""
    if pixels.shape[1] == SIDE:
        return pixels
    with ThreadPoolExecutor() as pool:
        resize = pool.map(lambda image: encoder.preprocessing.resize(Image.fromarray(image)), pixels)
        return np.fromiter(resize, dtype=(np.uint8, (SIDE, SIDE, 3)), count=len(pixels))


def prepare(options: argparse.Namespace) -> dict[str, NDArray[Any]]:
    """Compute the arrays of the training, and cache them in a file.

    Pixels and aligned references are stored once, for the images as they are. Embeddings, neighbours and weights have
    entries for all variants.
    """
    cache = options.out / f"data-{LAYOUT}-{data_digest(options)[:12]}.npz"
    if cache.exists():
        return dict(np.load(cache))
    encoder = load_encoder(options)
    training, unseen = style_files(options.stickers)
    side = max(options.size, SIDE)
    pixels, styles = load_all(training, options.limit, side)
    data: dict[str, NDArray[Any]] = {"pixels": resized(pixels, options.size), "styles": styles}
    inputs = encoder_inputs(pixels, encoder)
    parts = [_of_variant(number, inputs, styles, encoder, options) for number in range(len(VARIANTS))]
    data |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    aligned = align_all(data["pixels"], data["neighbours"][: len(pixels)])
    log.info("%.0f%% of the first neighbours were aligned", 100 * aligned.converged)
    data["references"] = aligned.pixels
    for name, path in unseen.items():
        images = load(path, options.limit, side)
        data[f"{name}_pixels"] = resized(images, options.size)
        data[f"{name}_rows"] = embedded(encoder_inputs(images, encoder), encoder)
    unfinished = cache.with_suffix(".partial.npz")
    np.savez(unfinished, **data)  # type: ignore[arg-type]
    unfinished.rename(cache)
    return data


def _of_variant(
    number: int, inputs: NDArray[np.uint8], styles: NDArray[np.int64], encoder: Encoder, options: argparse.Namespace
) -> dict[str, NDArray[Any]]:
    """Return embeddings, neighbours and weights of one variant of the images (N, SIDE, SIDE, 3)."""
    rows, device = embedded(variant(inputs, styles, number), encoder), options.device
    pool, first = min(POOL, len(rows) - 1), number * len(rows)
    return {
        "rows": rows,
        "neighbours": nearest(rows, pool, device) + first,
        "own_style_neighbours": nearest(rows, pool, device, styles) + first,
        "near_duplicates": near_duplicates(rows, device),
        "weights": np.full(len(rows), WEIGHTS[number]),
    }


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
    data: dict[str, NDArray[Any]],
    options: argparse.Namespace,
    *,
    references: bool = False,
    codes: NDArray[np.int16] | None = None,
) -> TrainingSet:
    """Return the training set, each image repeated by its weight; with aligned neighbours for editing.

    With ``--balanced``, the weight is divided among near-duplicates: of five skin tones with weight 4, four are used
    once. A share ``--own-style-share`` of the samples has neighbours of the image's own style. ``codes`` (V · N,
    tokens) replace the pixels.
    """
    weights = data["weights"] / (data["near_duplicates"] if options.balanced else 1)
    ends = np.floor(np.cumsum(weights) + 0.5).astype(np.int64)
    chosen = np.repeat(np.arange(len(weights)), np.diff(ends, prepend=0))
    own_style = np.random.default_rng(0).random((len(chosen), 1)) < options.own_style_share
    rows = TrainingRows(
        images=data["pixels"] if codes is None else codes[chosen],
        embeddings=data["rows"][chosen],
        neighbours=np.where(own_style, data["own_style_neighbours"][chosen], data["neighbours"][chosen]),
        reference=data["references"] if references else None,
        read=reader(data["styles"], chosen, options.device) if codes is None else None,
    )
    images = all_variants(data) if options.image_tokens else None
    return TrainingSet(rows, data["rows"], device=options.device, window_rows=len(chosen), database_images=images)


def all_variants(data: dict[str, NDArray[Any]]) -> AllVariants:
    """Return the images of all variants."""
    return AllVariants(data["pixels"], data["styles"], len(data["rows"]))
