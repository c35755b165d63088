"""Provenance in PNG files: how an image was generated, as text chunks.

The chunk ``knn-diffusion`` is a JSON object with everything. The others repeat the most useful values for image
viewers. Prompts and captions come from users and from the web. They are stored as data, and printed without control
characters.
"""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from infra.errors import InputError
from infra.text import printable
from tasks.serve.service.responses import Hit

CHUNK = "knn-diffusion"
_MAX_TEXT = 500
"""Maximum characters of a column's value; captions from the web may be as long as a book."""
_MAX_COLUMNS = 24
_MAX_FILE_BYTES = 200_000_000


def encode_png(image: Image.Image, provenance: dict[str, Any]) -> bytes:
    """Encode an image as PNG with its provenance, a JSON-ready object."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(CHUNK, json.dumps(provenance))
    for name, value in _readable(provenance).items():
        chunks.add_itxt(name, printable(value))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_provenance(path: Path) -> dict[str, Any]:
    """Return the provenance of a PNG file. Raises ``InputError`` if it has none, or is not a PNG file."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"file is too large: {path}; give a PNG file that this service generated")
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text may follow the pixels
            text = image.info.get(CHUNK) if isinstance(image, PngImagePlugin.PngImageFile) else None
    except FileNotFoundError:
        raise InputError(f"file does not exist: {path}; check the path") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"file is not a readable PNG: {path} ({error}); give an image of this service") from error
    if text is None:
        raise InputError(f"image has no provenance: {path}; give a PNG file that this service generated")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"provenance is damaged: {path}; download the image again") from error
    if not isinstance(found, dict):
        raise InputError(f"provenance is not an object: {path}; download the image again")
    return found


def hit_provenance(hit: Hit) -> dict[str, Any]:
    """Return a neighbour for the provenance, with its columns shortened."""
    columns = dict(list(hit.columns.items())[:_MAX_COLUMNS])
    return {
        "id": hit.id,
        "score": round(hit.score, 4),
        "url": hit.url,
        "columns": {name: _short(value) for name, value in columns.items()},
    }


def _short(value: Any) -> Any:
    text = value if isinstance(value, str) else json.dumps(value)
    return value if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"


def _readable(provenance: dict[str, Any]) -> dict[str, str]:
    """Return the chunks for image viewers, by keyword."""
    settings = provenance.get("settings", {})
    neighbours = [str(one.get("url") or f"row {one.get('id')}") for one in provenance.get("neighbours", [])]
    values = {
        "Software": "knn-diffusion",
        "prompt": settings.get("prompt"),
        "negative prompt": settings.get("negative_prompt"),
        "seed": provenance.get("seed"),
        "model": provenance.get("model"),
        "database": provenance.get("database", {}).get("name"),
        "neighbours": " ".join(neighbours) or None,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def describe(provenance: dict[str, Any]) -> list[str]:
    """Return the provenance as lines of text. A file may hold anything, so unknown and odd values are shown as JSON."""
    lines = []
    for name, value in provenance.items():
        if name == "neighbours" and isinstance(value, list):
            lines += ["neighbours", *(f"  {_line(one)}" for one in value)]
        elif isinstance(value, dict) and name != "nearest":
            given = {key: one for key, one in value.items() if one is not None}
            lines += [name, *(f"  {key:16} {_text(one)}" for key, one in given.items())]
        else:
            lines.append(f"{name:18} {_line(value)}")
    return [printable(line) for line in lines]


def _line(value: Any) -> str:
    """Return a stored image on one line, or any other value."""
    if not isinstance(value, dict) or not isinstance(value.get("columns", {}), dict):
        return _text(value)
    columns = "  ".join(f"{name}={_text(one)}" for name, one in value.get("columns", {}).items())
    return f"{_text(value.get('score')):8} row {_text(value.get('id'))}  {_text(value.get('url'))}  {columns}".rstrip()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
