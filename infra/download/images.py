"""Normalisation of web images: 8-bit sRGB, upright, on a white background, bounded in size, stored as PNG.

PNG is lossless: the same image gives the same bytes, and so the same digest, on every run. The image of a query is
normalised by the same functions as a stored one, see :func:`as_stored`.
"""

import io
import re
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from infra.download.colour import to_srgb
from infra.download.formats import DECODED, format_of, missing_extra, register_plugins, render_svg

# Formats of still images on the web. Some of Pillow's other readers call external programs (EPS).
_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# Further images in a file of these are not an animation: depth maps of a camera, sizes of an icon, pages. The main or
# first one is taken.
_SEVERAL_STILLS = ("HEIF", "ICO", "MPO", "TIFF")
# Signatures of image files: an unreadable file with one of them is corrupt, not another type of file.
_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|II\*\0|MM\0\*|RIFF.{4}WEBP|.{4}(ftypavif|jP  )|\0\0\1\0[\1-\x40]\0",
    re.DOTALL,
)
_MAX_SCANS = 100  # of a JPEG: each scan may cover all pixels. Encoders write about ten.
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # no stuffed byte, restart marker or fill byte
_SOS, _EOI = 0xDA, 0xD9
_WITHOUT_LENGTH = (0x01, 0xD8)
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_OUT_OF_MEMORY = "decode_memory: decoding exceeds the memory limit"

Normalised = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]
"""PNG bytes, width, height, original width, original height, error message.

Sizes are in pixels. Either the first five items or the last one is set; the others are None.
"""


class ImageError(ValueError):
    """Raised when an image is rejected. ``str()`` is ``error_class: detail``."""

    def __init__(self, error_class: str, detail: str) -> None:
        """Set the message; ``error_class`` is a stable snake_case name."""
        super().__init__(f"{error_class}: {detail}")
        self.detail = detail


class ImageNormaliser:
    """A replacement for img2dataset's resizer. It never raises; the last item of the result is the error message."""

    def __init__(self, *, max_pixels: int, min_side_px: int, max_side_px: int) -> None:
        """Set the size bounds.

        Args:
            max_pixels: Maximum number of pixels of the original.
            min_side_px: Minimum shorter side of the original.
            max_side_px: Maximum longer side of the stored image; larger images are reduced.
        """
        self._max_pixels = max_pixels
        self._min_side_px = min_side_px
        self._max_side_px = max_side_px
        Image.init()
        # AVIF support depends on the version of Pillow.
        self._formats = [name for name in (*_FORMATS, *register_plugins()) if name in Image.OPEN]

    def __call__(self, img_stream: BinaryIO, blurring_bbox_list: object = None) -> Normalised:
        """Normalise one encoded image; the original width and height are those after rotation to upright."""
        try:
            upright = self.decode(img_stream.read())
            stored = self._shrink(upright)
            buffer = io.BytesIO()
            stored.save(buffer, "PNG")
            return buffer.getvalue(), *stored.size, *upright.size, None
        except ImageError as error:
            return None, None, None, None, None, str(error)
        except MemoryError:
            return None, None, None, None, None, _OUT_OF_MEMORY
        except Exception as error:  # img2dataset would lose the row
            return None, None, None, None, None, f"internal_error: {type(error).__name__}: {error}"

    def decode(self, data: bytes, *, first_frame: bool = False) -> Image.Image:
        """Decode to an upright sRGB image of the original size. Raises ``ImageError``.

        Args:
            data: Encoded image. An SVG has no size of its own; it is rendered as large as images are stored.
            first_frame: Take the first frame of an animation instead of rejecting it.
        """
        if not data:
            raise ImageError("empty_body", "the response has no content")
        with warnings.catch_warnings():
            # Pillow warns about large images, which are checked here, and about odd metadata.
            warnings.simplefilter("ignore")
            image = self._open(data)
            self._check(image, first_frame=first_frame)
            try:
                image.load()
            except Exception as error:  # plugins raise arbitrary exceptions on corrupt data
                raise _decode_failure(error) from error
            self._check(image, first_frame=True)  # a size in the header of an icon may be wrong
            return _upright_rgb(image)

    def _shrink(self, image: Image.Image) -> Image.Image:
        """Reduce an image to the size in which it is stored. Raises ``ImageError`` if that is too narrow."""
        stored = shrink_to_fit(image, self._max_side_px)
        if min(stored.size) < self._min_side_px:
            sizes = f"{image.width}x{image.height} pixels, {stored.width}x{stored.height} as stored"
            raise ImageError("too_small", f"{sizes}, a side below min_side_px={self._min_side_px}")
        return stored

    def _open(self, data: bytes) -> Image.Image:
        """Read the header of an image without decoding its pixels."""
        if data.startswith(b"\xff\xd8") and jpeg_scans(data, most=_MAX_SCANS + 1) > _MAX_SCANS:
            raise ImageError("too_many_scans", f"a JPEG with more than {_MAX_SCANS} scans")
        name = format_of(data)
        if name is not None and (install := missing_extra(name)):
            raise ImageError("unsupported_format", f"{name}; to decode it, {install}")
        try:
            if name == "SVG":
                return render_svg(data, self._max_side_px)
            return Image.open(io.BytesIO(data), formats=self._formats)
        except Image.DecompressionBombError as error:
            raise ImageError("too_many_pixels", str(error)) from error
        except UnidentifiedImageError as error:
            if _SIGNATURE.match(data) or name in DECODED:
                raise ImageError("decode_error", "the header is corrupt") from error
            if name is not None:
                raise ImageError("unsupported_format", f"{name}; convert it to {', '.join(self._formats)}") from error
            raise ImageError("not_an_image", f"not one of the formats {', '.join(self._formats)}") from error
        except Exception as error:
            raise _decode_failure(error) from error

    def _check(self, image: Image.Image, *, first_frame: bool) -> None:
        size = f"{image.width}x{image.height} pixels"
        if image.width * image.height > self._max_pixels:
            raise ImageError("too_many_pixels", f"{size}, more than max_pixels={self._max_pixels}")
        if min(image.size) < self._min_side_px:
            raise ImageError("too_small", f"{size}, a side below min_side_px={self._min_side_px}")
        if first_frame or image.format in _SEVERAL_STILLS:
            return
        try:
            animated = getattr(image, "is_animated", False)
        except Exception as error:
            raise _decode_failure(error) from error
        if animated:
            raise ImageError("animated", f"{image.format} with several frames")


def as_stored(image: Image.Image, max_side_px: int) -> Image.Image:
    """Convert an image as :class:`ImageNormaliser` does before it stores one, so that a query finds its own image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shrink_to_fit(_upright_rgb(image), max_side_px)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Rotate a decoded image by its EXIF orientation, and convert it to sRGB."""
    upright: Image.Image = image
    try:
        upright = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # noqa: S110 - unreadable EXIF is no reason to reject an image
        pass
    return to_rgb(to_srgb(upright))


def jpeg_scans(data: bytes, most: int) -> int:
    """Count the scans of a JPEG from its markers without decoding; stop at ``most``.

    Bytes between segments are skipped, as in libjpeg; bytes inside a segment are not markers.
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
    """Return a new 8-bit RGB image of the same size without metadata, composited on white.

    Accepts any mode that Pillow decodes: palettes, greys, CMYK (including JPEGs with Adobe's inverted values), 16-bit
    and floating-point greys, with alpha or a transparent colour. Deep greys are scaled to 8 bits.
    """
    if image.mode in _DEEP_MODES:
        image = _to_8_bit(image)
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")  # the only conversion that Pillow supports for "La"
        image = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(image.convert("RGB"), mask=image.getchannel("A"))
        return rgb
    rgb = image.convert("RGB")
    rgb.info = {}  # else a colour profile or a transparent colour would be stored with the image
    return rgb


def shrink_to_fit(image: Image.Image, max_side_px: int) -> Image.Image:
    """Reduce ``image`` so that its longer side is at most ``max_side_px``; never enlarge it. No side is below 1 px."""
    longer = max(image.size)
    if longer <= max_side_px:
        return image
    width, height = (max(1, round(side * max_side_px / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _decode_failure(error: Exception) -> ImageError:
    """Return the error for an exception of Pillow. Codecs report exhausted memory with various messages."""
    if isinstance(error, MemoryError) or "memory" in str(error).lower():
        return ImageError(*_OUT_OF_MEMORY.split(": ", 1))
    return ImageError("decode_error", str(error) or type(error).__name__)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Convert a deep grey image to ``L`` or ``LA``.

    White is 65535 for integers. For floats it is the first of 1, 255 and 65535 that no value exceeds. If values exceed
    all of these, white is the brightest value.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    brightest = float(values.max(initial=0.0))
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((white for white in whites if brightest <= white), brightest)
    grey = Image.fromarray(np.rint(np.clip(values, 0.0, white) * (255.0 / white)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    alpha = np.where(values == float(transparent), 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))
