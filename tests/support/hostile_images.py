"""Images that are small to send and expensive to decode, generated rather than stored."""

import io
from typing import Any

from PIL import Image


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def many_scans(scans: int, side: int = 16) -> bytes:
    """Return a progressive JPEG that repeats its last scan up to ``scans`` scans. libjpeg decodes them all."""
    whole = encoded(Image.new("L", (side, side), 90), "JPEG", progressive=True)
    last, count = whole.rindex(b"\xff\xda"), whole.count(b"\xff\xda")
    return whole[:last] + whole[last:-2] * (scans - count + 1) + whole[-2:]


def large_canvas(form: str, side: int) -> bytes:
    """Return an image of one colour: a few kB in any format."""
    options: dict[str, dict[str, Any]] = {
        "AVIF": {"quality": 1, "speed": 10},
        "JPEG": {"quality": 1, "progressive": True},
        "JPEG2000": {"quality_mode": "rates", "quality_layers": [1000]},
        "PNG": {},
        "TIFF": {"compression": "tiff_lzw"},
        "WEBP": {"quality": 1, "method": 0},
    }
    return encoded(Image.new("RGB", (side, side), (200, 30, 40)), form, **options[form])
