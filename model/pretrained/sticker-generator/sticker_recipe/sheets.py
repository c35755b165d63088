"""Sheets of images in one AVIF file each, for archives: smaller than files of single images of the same quality.

Legend: ``N`` images, ``S`` side.
"""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

ROW_IMAGES = 8
SHEET_IMAGES = ROW_IMAGES**2
QUALITY, SPEED = 45, 6
"""AVIF settings: quality of 0 to 100, and speed of 0 to 10."""
COLUMN = "avif"
"""Column of the sheets in a parquet file, in place of the images."""


def sheets(pixels: NDArray[np.uint8], columns: pa.Table) -> pa.Table:
    """Return images (N, S, S, 3) as sheets, with the ``columns`` (N) of their first images.

    Colours are not subsampled: icons have sharp edges between colours.
    """
    parts = [pixels[start : start + SHEET_IMAGES] for start in range(0, len(pixels), SHEET_IMAGES)]
    with ThreadPoolExecutor() as pool:
        encoded = list(pool.map(_sheet, parts))
    first = list(range(0, len(pixels), SHEET_IMAGES))
    of_first = {name: columns[name].take(first) for name in columns.column_names}
    return pa.table({**of_first, "images": [len(part) for part in parts], COLUMN: encoded})


def images_of_sheets(table: pa.Table) -> Iterator[NDArray[np.uint8]]:
    """Yield the images (n, S, S, 3) of every sheet."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(_images, table[COLUMN].to_pylist(), table["images"].to_pylist())


def _sheet(pixels: NDArray[np.uint8]) -> bytes:
    side = pixels.shape[1]
    whole = np.full((SHEET_IMAGES, side, side, 3), 255, dtype=np.uint8)
    whole[: len(pixels)] = pixels
    grid = whole.reshape(ROW_IMAGES, ROW_IMAGES, side, side, 3).swapaxes(1, 2)
    sheet = Image.fromarray(grid.reshape(ROW_IMAGES * side, ROW_IMAGES * side, 3))
    sheet.save(content := io.BytesIO(), "AVIF", quality=QUALITY, speed=SPEED, subsampling="4:4:4", max_threads=1)
    return content.getvalue()


def _images(sheet: bytes, count: int) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(sheet)) as image:
        pixels = np.asarray(image.convert("RGB"))
    side = len(pixels) // ROW_IMAGES
    grid = pixels.reshape(ROW_IMAGES, side, ROW_IMAGES, side, 3).swapaxes(1, 2)
    return grid.reshape(-1, side, side, 3)[:count]
