"""Conversion of images of any mode: the generator must see what the databases were made of."""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infra.download import images as infra_images
from model.errors import ModelError
from model.images import image_grid, to_pil, to_rgb

MODES = (
    *("1", "L", "P", "RGB", "RGBX", "RGBA", "RGBa", "LA", "La", "PA", "CMYK", "YCbCr", "LAB", "HSV"),
    *("I", "I;16", "I;16B", "I;16L", "F"),
)
GREYS = np.random.default_rng(0).integers(0, 65536, (6, 8))
COLOURS = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 8, 4), dtype=np.uint8), "RGBA")


def of_mode(mode: str) -> Image.Image:
    """Return an image of many values, and of many alpha values if the mode has alpha."""
    match mode:
        case "I":
            return Image.fromarray(GREYS.astype(np.int32))
        case "F":
            return Image.fromarray(GREYS.astype(np.float32) / 65535)
        case "I;16" | "I;16L" | "I;16B":
            return Image.frombytes(mode, (8, 6), GREYS.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
        case "La" | "LA":
            return COLOURS.convert("LA").convert(mode)
        case "LAB":
            return Image.frombytes(mode, (8, 6), COLOURS.convert("RGB").tobytes())
        case "PA":
            return COLOURS.convert("RGB").convert("P").convert("PA")
        case "RGBA" | "RGBa":
            return COLOURS.convert(mode)
        case _:
            return COLOURS.convert("RGB").convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_to_rgb_matches_the_databases_in_every_mode(mode: str) -> None:
    image = of_mode(mode)
    assert image.mode == mode
    before = image.tobytes()
    white = to_rgb(image)
    assert (white.mode, white.size) == ("RGB", (8, 6))
    np.testing.assert_array_equal(np.asarray(white), np.asarray(infra_images.to_rgb(image)))
    assert np.ptp(np.asarray(white)) > 150, "neither white nor black"
    assert image.tobytes() == before


@pytest.mark.parametrize(
    ("mode", "colour", "transparent"),
    [("L", 7, 7), ("I;16", 300, 300), ("RGB", (9, 8, 7), (9, 8, 7)), ("P", 3, 3), ("P", 3, b"\xff\xff\xff\x00")],
)
def test_to_rgb_transparent_colour_is_white(mode: str, colour: Any, transparent: Any, tmp_path: Path) -> None:
    image = Image.new(mode, (8, 6), colour)
    if mode == "P":
        image.putpalette([0, 0, 0] * 4)
    stored = io.BytesIO()
    image.save(stored, "PNG", transparency=transparent)
    with Image.open(stored) as opened:
        white = np.asarray(to_rgb(opened))
        np.testing.assert_array_equal(white, np.asarray(infra_images.to_rgb(opened)))
    assert (white == 255).all()


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_to_rgb_image_without_pixels_raises(size: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match=r"the image has no pixels: \d × \d; give a larger one"):
        to_rgb(Image.new("RGB", size))


def test_to_pil_rounds_the_model_range() -> None:
    levels = torch.tensor([-1.0, -0.6, 0.0, 1.0])
    (image,) = to_pil(levels.expand(1, 3, 2, 4))
    assert image.size == (4, 2)
    assert image.mode == "RGB"
    assert np.asarray(image)[0, :, 0].tolist() == [0, 51, 128, 255]


def test_to_pil_keeps_channels_and_orientation() -> None:
    image = torch.full((1, 3, 2, 3), -1.0)
    image[0, 0, 0, 2] = 1  # red, top right
    (converted,) = to_pil(image)
    reds = [place for place in itertools.product(range(3), range(2)) if converted.getpixel(place) == (255, 0, 0)]
    assert reds == [(2, 0)]


def test_image_grid_fills_rows_and_leaves_unused_cells_white() -> None:
    grid = image_grid([Image.new("RGB", (2, 3), colour) for colour in ("red", "green", "blue")], columns=2)
    assert grid.size == (4, 6)
    assert [grid.getpixel(place) for place in ((0, 0), (0, 3), (2, 3))] == [(255, 0, 0), (0, 0, 255), (255, 255, 255)]
