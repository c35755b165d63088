"""Conversion of images with an ICC profile to sRGB, which encoders expect."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # colour space of a profile, by mode of the image
_TOLERANCE = 2  # levels of 255: profiles of sRGB differ by this much from each other


def to_srgb(image: Image.Image) -> Image.Image:
    """Return an image in sRGB, with its transparency. Without a usable profile, return the image itself.

    Most profiles on the web describe sRGB. They are recognised by their effect, and the pixels are left as they are.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"):
        return image
    opaque, alpha = image, None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        opaque, alpha = rgba.convert("L" if image.mode in ("L", "LA") else "RGB"), rgba.getchannel("A")
    elif image.mode in ("P", "PA"):
        opaque = image.convert("RGB")
    transform = _transform(profile, opaque.mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(opaque, transform)
    if converted is None:
        return image
    converted.info = {}
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of images in ``mode`` to sRGB; None for a profile that is unusable or sRGB itself."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        return None if _is_identity(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return True if the transform leaves the colours of a coarse grid as they are."""
    if mode == "CMYK":
        return False
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    if mode == "L":
        grid = Image.fromarray(levels[None])
    else:
        grid = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(17, -1, 3))
    converted = ImageCms.applyTransform(grid, transform)
    if converted is None:
        return True
    changed = np.asarray(converted, dtype=np.int16) - np.asarray(grid.convert("RGB"), dtype=np.int16)
    return bool(np.abs(changed).max() <= _TOLERANCE)
