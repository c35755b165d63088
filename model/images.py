"""Pictures of any mode, as people hand them in, made 8-bit RGB on white.

:func:`infra.download.images.to_rgb` does the same to what is downloaded; model and infra know nothing of each other.
"""

import numpy as np
from PIL import Image

from model.errors import ModelError

_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


def on_white(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB: deep greys scaled, transparency laid on white.

    Raises ``ModelError`` for one without pixels.
    """
    if not (image.width and image.height):
        raise ModelError(f"a picture of {image.width} × {image.height} pixels shows nothing; give a larger one")
    if image.mode in _DEEP_MODES:
        image = _eight_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # Pillow converts it to nothing else
    image = image.convert("RGBA")
    rgb = Image.new("RGB", image.size, "white")
    rgb.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return rgb


def _eight_bit(image: Image.Image) -> Image.Image:
    """A deep grey picture as ``L`` or ``LA``.

    White is 65535 for integers and the first of 1, 255 and 65535 that fits for floats; beyond, the brightest value.
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
