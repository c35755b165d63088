"""Pictures of any mode: what the generator sees is what the databases were made of."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra.download.images import to_rgb
from model.errors import ModelError
from model.images import on_white

MODES = (
    *("1", "L", "P", "RGB", "RGBX", "RGBA", "RGBa", "LA", "La", "PA", "CMYK", "YCbCr", "LAB", "HSV"),
    *("I", "I;16", "I;16B", "I;16L", "F"),
)
GREYS = np.random.default_rng(0).integers(0, 65536, (6, 8))
COLOURS = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 8, 4), dtype=np.uint8), "RGBA")


def of_mode(mode: str) -> Image.Image:
    """A picture of many values, the alpha's among them where the mode has one."""
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
def test_every_mode_looks_as_it_does_to_the_databases(mode: str) -> None:
    image = of_mode(mode)
    assert image.mode == mode
    before = image.tobytes()
    white = on_white(image)
    assert (white.mode, white.size) == ("RGB", (8, 6))
    np.testing.assert_array_equal(np.asarray(white), np.asarray(to_rgb(image)))
    assert np.ptp(np.asarray(white)) > 150, "neither white nor black"
    assert image.tobytes() == before


@pytest.mark.parametrize(
    ("mode", "colour", "transparent"),
    [("L", 7, 7), ("I;16", 300, 300), ("RGB", (9, 8, 7), (9, 8, 7)), ("P", 3, 3), ("P", 3, b"\xff\xff\xff\x00")],
)
def test_a_transparent_colour_is_white(mode: str, colour: Any, transparent: Any, tmp_path: Path) -> None:
    image = Image.new(mode, (8, 6), colour)
    if mode == "P":
        image.putpalette([0, 0, 0] * 4)
    stored = io.BytesIO()
    image.save(stored, "PNG", transparency=transparent)
    with Image.open(stored) as opened:
        white = np.asarray(on_white(opened))
        np.testing.assert_array_equal(white, np.asarray(to_rgb(opened)))
    assert (white == 255).all()


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match=r"a picture of \d × \d pixels shows nothing; give a larger one"):
        on_white(Image.new("RGB", size))
