"""Image formats that need a library of the extras ``formats`` and ``jxl``: HEIC, JPEG XL and SVG."""

import importlib.util
import io
import re
from xml.etree import ElementTree

from PIL import Image

_EXTRAS = {"HEIC": ("formats", "pillow_heif"), "JPEG XL": ("jxl", "pillow_jxl"), "SVG": ("formats", "resvg_py")}
DECODED = frozenset(_EXTRAS)
"""Formats that are decoded if the extras are installed."""

_SIGNATURES = {
    "HEIC": re.compile(rb".{4}ftyp(hei[cfmsx]|hev[cmsx]|(mif1|msf1)(?!.{,48}avi[fs]))", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", re.DOTALL),
    "Photoshop": re.compile(rb"8BPS"),
    "EPS": re.compile(rb"%!PS-Adobe"),
    "PDF": re.compile(rb"%PDF-"),
}
_PROLOG = re.compile(rb"\s*(<\?.*?\?>|<!--.*?-->|<!DOCTYPE\s+(\w+:)?svg\b[^\[>]*(\[.*?\]\s*)?>)", re.DOTALL)
_SVG_ELEMENT = re.compile(rb"\s*<(\w+:)?svg[\s>/]")
_PROLOG_BYTES = 1 << 16
_EMBEDDED_IMAGE = re.compile(r"data:image/(png|jpe?g|gif|webp)[;,]", re.IGNORECASE)
_NUMBER = re.compile(r"\s*(\d*\.?\d+(e[+-]?\d+)?)\s*(px|pt|pc|mm|cm|in)?\s*", re.IGNORECASE)


def format_of(data: bytes) -> str | None:
    """Return the name of the format of ``data`` if it is one that Pillow itself does not read, else None."""
    if _is_svg(data[:_PROLOG_BYTES]):
        return "SVG"
    return next((name for name, signature in _SIGNATURES.items() if signature.match(data)), None)


def missing_extra(name: str) -> str | None:
    """Return how to get a decoder for the format ``name``, or None if there is nothing to install."""
    extra, module = _EXTRAS.get(name, ("", ""))
    if not extra or importlib.util.find_spec(module) is not None:
        return None
    return f"pip install 'knn-diffusion[{extra}]'"


def register_plugins() -> tuple[str, ...]:
    """Add the installed libraries to Pillow, and return Pillow's names of their formats."""
    names = []
    if missing_extra("HEIC") is None:
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)  # as for AVIF: threads need memory
        names.append("HEIF")
    if missing_extra("JPEG XL") is None:
        import pillow_jxl  # noqa: F401  # registers itself

        names.append("JXL")
    return tuple(names)


def render_svg(data: bytes, side_px: int) -> Image.Image:
    """Render an SVG with a longer side of ``side_px``, without access to files, the network and the system's fonts.

    A renderer reads the files that an SVG names. So the document is parsed and written again without references to
    anything outside of it. Its text is not drawn, because the fonts would differ between machines.

    Raises ``ValueError`` or ``ElementTree.ParseError`` if it is not a valid SVG.
    """
    import resvg_py

    root = ElementTree.fromstring(data)  # noqa: S314  # expat limits the expansion of entities, the caller the memory
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            is_reference = name.rpartition("}")[2].lower() == "href"
            if is_reference and not (value.strip().startswith("#") or _EMBEDDED_IMAGE.match(value.strip())):
                del element.attrib[name]
    is_wide = _aspect(root) >= 1
    png = resvg_py.svg_to_bytes(
        svg_string=ElementTree.tostring(root, encoding="unicode"),
        skip_system_fonts=True,
        width=side_px if is_wide else None,
        height=None if is_wide else side_px,
    )
    image = Image.open(io.BytesIO(png), formats=["PNG"])
    image.load()
    return image


def _is_svg(head: bytes) -> bool:
    """Return True if the first element of an XML document is ``svg``."""
    head = head.removeprefix(b"\xef\xbb\xbf")
    position = 0
    while found := _PROLOG.match(head, position):
        position = found.end()
    return _SVG_ELEMENT.match(head, position) is not None


def _aspect(root: ElementTree.Element) -> float:
    """Return width / height of an SVG, or 1 if it does not say."""
    sizes = [root.get("width", ""), root.get("height", "")]
    if not all(map(_NUMBER.fullmatch, sizes)):
        sizes = re.split(r"[\s,]+", root.get("viewBox", "").strip())[2:]
    numbers = [float(found[1]) for size in sizes if (found := _NUMBER.fullmatch(size))]
    return numbers[0] / numbers[1] if len(numbers) == 2 and numbers[1] > 0 else 1.0
