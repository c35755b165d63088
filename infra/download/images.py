"""Pictures as they come from the web, made alike: 8-bit RGB, upright, on white, not too large, stored as PNG.

PNG because it is lossless: the same picture gives the same bytes, and so the same digest, on every run.
Colour profiles are dropped without a conversion, as the usual CLIP preprocessing does.
"""

import contextlib
import io
import re
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

# What the web shows as still pictures. Pillow's other readers include ones that call outside programs (EPS).
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# First bytes that only a picture has: with them, what cannot be read is damaged, not something else.
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|II\*\0|MM\0\*|RIFF.{4}WEBP|.{4}(ftypavif|jP  )", re.DOTALL
)
_MAX_SCANS = 100  # of a JPEG: each may pass over all pixels. Encoders write about ten.
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # no stuffed byte, restart marker or fill byte
_SOS, _EOI = 0xDA, 0xD9
_WITHOUT_LENGTH = (0x01, 0xD8)
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_OUT_OF_MEMORY = "decode_memory: it needs more memory than decoding may take"

Normalised = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]
"""PNG bytes, width, height, original width, original height, error message: either the first five or the last."""


class ImageError(ValueError):
    """A picture that is not taken. ``str()`` is ``error_class: detail``."""

    def __init__(self, error_class: str, detail: str) -> None:
        """``error_class`` is a stable snake_case name."""
        super().__init__(f"{error_class}: {detail}")


class ImageNormaliser:
    """Callable in the place of img2dataset's resizer: it never raises, the last item says what was wrong."""

    def __init__(self, *, max_pixels: int, min_side_px: int, max_side_px: int) -> None:
        """Bounds on the original's pixels and shorter side, and the longer side that is stored at most."""
        self._max_pixels = max_pixels
        self._min_side_px = min_side_px
        self._max_side_px = max_side_px
        Image.init()
        self._formats = [name for name in _FORMATS if name in Image.OPEN]  # AVIF depends on Pillow's version

    def __call__(self, img_stream: BinaryIO, blurring_bbox_list: object = None) -> Normalised:
        """Normalise one encoded picture; the original's width and height are those of the upright picture."""
        try:
            upright = self.decode(img_stream.read())
            stored = shrink_to_fit(upright, self._max_side_px)
            buffer = io.BytesIO()
            stored.save(buffer, "PNG")
            return buffer.getvalue(), *stored.size, *upright.size, None
        except ImageError as error:
            return None, None, None, None, None, str(error)
        except MemoryError:
            return None, None, None, None, None, _OUT_OF_MEMORY
        except Exception as error:  # one odd picture must not cost img2dataset the row
            return None, None, None, None, None, f"internal_error: {type(error).__name__}: {error}"

    def decode(self, data: bytes) -> Image.Image:
        """Upright RGB picture in full size. Raises ``ImageError``."""
        if not data:
            raise ImageError("empty_body", "the answer held no bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is checked here, and of odd metadata
            image = self._identified(data)
            self._check(image)
            try:
                image.load()
            except Exception as error:  # plugins raise what they like on damaged data
                raise _refusal(error) from error
            orientation = 1
            with contextlib.suppress(Exception):  # unreadable EXIF is no reason to lose a picture
                orientation = image.getexif().get(_ORIENTATION_TAG, 1)
            rgb = to_rgb(image)
        return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb

    def _identified(self, data: bytes) -> Image.Image:
        """The image with its header read and nothing decoded."""
        if data.startswith(b"\xff\xd8") and jpeg_scans(data, most=_MAX_SCANS + 1) > _MAX_SCANS:
            raise ImageError("too_many_scans", f"a JPEG with more than {_MAX_SCANS} scans")
        try:
            return Image.open(io.BytesIO(data), formats=self._formats)
        except Image.DecompressionBombError as error:
            raise ImageError("too_many_pixels", str(error)) from error
        except UnidentifiedImageError as error:
            if _SIGNATURE.match(data):
                raise ImageError("decode_error", "its header cannot be read") from error
            raise ImageError("not_an_image", f"none of {', '.join(self._formats)}") from error
        except Exception as error:
            raise _refusal(error) from error

    def _check(self, image: Image.Image) -> None:
        size = f"{image.width}x{image.height} pixels"
        if image.width * image.height > self._max_pixels:
            raise ImageError("too_many_pixels", f"{size}, more than max_pixels={self._max_pixels}")
        if min(image.size) < self._min_side_px:
            raise ImageError("too_small", f"{size}, a side below min_side_px={self._min_side_px}")
        try:
            # An MPO's further frames are a camera's depth or brightness maps, not motion.
            moving = image.format != "MPO" and getattr(image, "is_animated", False)
        except Exception as error:
            raise _refusal(error) from error
        if moving:
            raise ImageError("animated", f"{image.format} with several frames")


def jpeg_scans(data: bytes, most: int) -> int:
    """Count the scans of a JPEG from its markers, without decoding, up to ``most``.

    Bytes between segments are skipped as libjpeg skips them; bytes inside a segment are not markers.
    """
    scans, position = 0, 0
    while scans < most and (found := _JPEG_MARKER.search(data, position)):
        marker, position = data[found.end() - 1], found.end()
        if marker == _EOI:
            break
        if marker not in _WITHOUT_LENGTH:
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
        scans += marker == _SOS
    return scans


def to_rgb(image: Image.Image) -> Image.Image:
    """A new 8-bit RGB picture of the same size without metadata: deep greys scaled, transparency laid on white.

    Takes any mode Pillow decodes: palettes, greys, CMYK (JPEGs with Adobe's inverted values included), 16-bit and
    floating greys, with alpha or a transparent colour.
    """
    if image.mode in _DEEP_MODES:
        image = _eight_bit(image)
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")  # Pillow converts it to nothing else
        image = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(image.convert("RGB"), mask=image.getchannel("A"))
        return rgb
    rgb = image.convert("RGB")
    rgb.info = {}  # else a colour profile or a transparent colour would be stored again
    return rgb


def shrink_to_fit(image: Image.Image, max_side_px: int) -> Image.Image:
    """``image`` reduced so that its longer side is at most ``max_side_px``; never enlarged, no side below 1."""
    longer = max(image.size)
    if longer <= max_side_px:
        return image
    width, height = (max(1, round(side * max_side_px / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _refusal(error: Exception) -> ImageError:
    """Return what a failure of Pillow says about the image. Codecs report exhausted memory in their own words."""
    if isinstance(error, MemoryError) or "memory" in str(error).lower():
        return ImageError(*_OUT_OF_MEMORY.split(": ", 1))
    return ImageError("decode_error", str(error) or type(error).__name__)


def _eight_bit(image: Image.Image) -> Image.Image:
    """A deep grey picture as ``L`` or ``LA``.

    White is 65535 for integers and the first of 1, 255 and 65535 that fits for floats; beyond, the brightest value.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    top = float(values.max(initial=0.0))
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((white for white in whites if top <= white), top)
    grey = Image.fromarray(np.rint(np.clip(values, 0.0, white) * (255.0 / white)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    alpha = np.where(values == float(transparent), 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))
