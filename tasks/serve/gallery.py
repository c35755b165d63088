"""Gallery: search results as one self-contained HTML page, without server, network or scripts.

Names and URLs in a database come from the web and are untrusted. The template escapes them, and only http and https
URLs become links.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from infra.download.images import shrink_to_fit, to_rgb
from infra.errors import InputError
from infra.text import printable
from tasks import pages
from tasks.references.images import fetch_images
from tasks.serve.load import SearchResult

MAX_IMAGES = 500
"""Maximum images on a page. Their thumbnails have 2 to 5 MB usually, and 40 MB at worst (noise)."""
THUMBNAIL_PX = 192
MAX_LINK_LENGTH = 2048
"""Maximum characters of a linked URL. Longer ones are shown as text, since browsers and servers truncate them."""
MAX_TEXT_LENGTH = 120
MAX_COLUMNS = 12
"""Maximum columns of the URL list that a card shows."""


def write_gallery(path: Path, query: str | Image.Image, found: SearchResult, cache: Path, *, name: str = "") -> None:
    """Write the page of a search to ``path``. The images are read from the database's image shards.

    Args:
        path: File to write.
        query: Text or image of the search.
        found: Result of the search.
        cache: Folder for copies of remote shards.
        name: Label of the query image. Default: "an image".

    Raises:
        InputError: There are more images than a page may have.
        IntegrityError: An image shard is missing or damaged.
    """
    most_shown(len(found.rows))
    images = fetch_images(found.version, [row["id"] for row in found.rows], cache)
    page = gallery(query, found, images, name=name)
    # Text from the command line may contain lone surrogates, which UTF-8 cannot encode.
    path.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))


def most_shown(count: int) -> None:
    """Raise ``InputError`` if ``count`` images are too many for a page."""
    if count > MAX_IMAGES:
        raise InputError(f"too many images for a page: {count}, the maximum is {MAX_IMAGES}; give a smaller --k")


def gallery(query: str | Image.Image, found: SearchResult, images: Sequence[Image.Image], *, name: str = "") -> str:
    """Return the page: the query, then a thumbnail, score, key and link of each row found."""
    return pages.render(
        "gallery.html.j2",
        heading=_short(query if isinstance(query, str) else name or "an image"),
        query_image=None if isinstance(query, str) else _thumbnail(query),
        name=found.name,
        rows=f"{found.version.rows:,}",
        hits=[_hit(row, image) for row, image in zip(found.rows, images, strict=True)],
    )


def _hit(row: dict[str, Any], image: Image.Image) -> dict[str, Any]:
    """Return the values of a row for the template."""
    url = str(row["url"] or "")
    return {
        **row,
        "url": url,
        "linked": len(url) <= MAX_LINK_LENGTH and _is_web(url),
        "link_text": printable(_short(url)),
        "alt": _short(_file_name(url)) or f"image {row['key']}",
        "thumbnail": _thumbnail(image),
        "columns": {printable(_short(name)): printable(_short(_text(value))) for name, value in _shown(row).items()},
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return the user's columns that fit on a card."""
    return dict(list(row.get("columns", {}).items())[:MAX_COLUMNS])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _thumbnail(image: Image.Image) -> str:
    return pages.image_url(shrink_to_fit(to_rgb(image), THUMBNAIL_PX), "WEBP", quality=85)


def _is_web(url: str) -> bool:
    try:
        return urlsplit(url).scheme in {"http", "https"}
    except ValueError:  # e.g. an unclosed bracket of an IPv6 address
        return False


def _file_name(url: str) -> str:
    """Return the last part of a URL's path, unquoted; it often describes the image."""
    path = urlsplit(url).path if _is_web(url) else ""
    return unquote(path.rstrip("/").rsplit("/", 1)[-1])


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT_LENGTH else f"{text[: MAX_TEXT_LENGTH - 1]}…"
