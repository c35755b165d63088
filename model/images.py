"""Image conversions: any mode to RGB, uint8 to [-1, 1] and back, grids.

Legend: ``B`` images, ``S`` side.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from model.errors import ModelError

if TYPE_CHECKING:  # figures of a database need no torch
    from torch import Tensor

_HIGH_PRECISION_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB: scale 16-bit and float greys, composite transparency onto white.

    Raises ``ModelError`` for an image without pixels.
    """
    if not (image.width and image.height):
        raise ModelError(f"the image has no pixels: {image.width} × {image.height}; give a larger one")
    if image.mode in _HIGH_PRECISION_MODES:
        image = _to_eight_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # the only conversion that Pillow offers for this mode
    image = image.convert("RGBA")
    rgb = Image.new("RGB", image.size, "white")
    rgb.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return rgb


def image_to_array(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """Crop an RGB image to its centre square, as CLIP does, and resize it: (side, side, 3) uint8."""
    return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS), dtype=np.uint8)


def to_model_range(pixels: "Tensor") -> "Tensor":
    """Convert uint8 (B, S, S, 3) to float32 (B, 3, S, S) in [−1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: "Tensor") -> NDArray[np.uint8]:
    """Convert float32 (B, 3, S, S) in [−1, 1] on the CPU to uint8 (B, S, S, 3)."""
    pixels: NDArray[np.uint8] = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return pixels


def to_pil(images: "Tensor") -> list[Image.Image]:
    """Convert float32 (B, 3, S, S) in [−1, 1] on the CPU to RGB images."""
    return [Image.fromarray(pixels) for pixels in to_pixels(images)]


def image_grid(images: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """Arrange RGB images of one size in rows of ``columns``; unused cells are white."""
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        grid.paste(image, (column * width, row * height))
    return grid


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """Convert a 16-bit, 32-bit or float grey image to ``L``, or to ``LA`` if one of its values is transparent.

    White is 65535 for integers. For floats it is the first of 1, 255 and 65535 that no pixel exceeds, else the maximum.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    top = float(values.max())
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((white for white in whites if top <= white), top)
    grey = Image.fromarray(np.rint(np.clip(values, 0.0, white) * (255.0 / white)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == float(transparent), 0, 255).astype(np.uint8))))
