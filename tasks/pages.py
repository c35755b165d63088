"""Self-contained HTML pages from the templates in ``tasks/templates``.

The templates escape every value. Images are data URLs, and the content security policy of the base template forbids
scripts and all requests.
"""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image


def render(template: str, **values: Any) -> str:
    """Return the page of a template, e.g. ``report.html.j2``. A missing value raises ``UndefinedError``."""
    return _ENVIRONMENT.get_template(template).render(values)


def image_url(image: Image.Image, file_format: str = "PNG", **options: Any) -> str:
    """Encode an image as a data URL. ``options`` are those of Pillow's encoder."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return data_url(buffer.getvalue(), file_format)


def preview(figure: Path, width: int = 1100) -> str:
    """Return the figure scaled to ``width`` px as a JPEG data URI, small enough for a database row."""
    with Image.open(figure) as image:
        smaller = image.convert("RGB").resize((width, round(image.height * width / image.width)))
    return image_url(smaller, "JPEG", quality=80)


def data_url(encoded: bytes, file_format: str = "PNG") -> str:
    """Return the data URL of an encoded image."""
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(encoded).decode()}"


_ENVIRONMENT = Environment(
    loader=PackageLoader("tasks"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["image_url"] = image_url
