"""Gallery: search results as one self-contained HTML page, without server, network or scripts.

Names and URLs in a database come from the web and are untrusted. They are escaped, only http and https become links,
and the page's content security policy forbids scripts and all requests.
"""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from infra.download.images import shrink_to_fit, to_rgb
from infra.errors import InputError
from infra.text import printable
from tasks.references.images import fetch_images
from tasks.serve.load import SearchResult

MOST = 500
"""Maximum images on a page: at most 40 MB of thumbnails (noise), usually 2 to 5 MB."""
THUMBNAIL_PX = 192
LONGEST_LINK = 2048
"""Maximum characters of a linked URL. Longer ones are shown as text, since browsers and servers cut them."""
LONGEST_TEXT = 120

_CSS = """
:root { color-scheme: light dark; --text: #191c21; --faint: #5c636d; --page: #fff; --edge: #d9dde2; --link: #0b57d0 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e7e9ec; --faint: #a2a9b3; --page: #15171b; --edge: #363b43; --link: #8ab4f8 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1180px;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; overflow-wrap: anywhere } a { color: var(--link) }
header { display: flex; gap: 1.2rem; align-items: center; margin-bottom: 1.6rem } header img { width: 128px }
p, figcaption { color: var(--faint); margin: 0; overflow-wrap: anywhere }
ol { list-style: none; padding: 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr));
  gap: 1.2rem }
figure { margin: 0 } figcaption { font-size: 12.5px } figcaption b { color: var(--text); font-size: 15px }
li img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; border: 1px solid var(--edge);
  border-radius: 6px; box-sizing: border-box }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_gallery(path: Path, query: str | Image.Image, found: SearchResult, cache: Path, *, name: str = "") -> None:
    """Write the page of a search to ``path``. The images are read from the database's image shards.

    Args:
        path: the file to write.
        query: the text or image of the search.
        found: the search result.
        cache: folder for copies of remote shards.
        name: label of the query image; default "an image".

    Raises:
        InputError: there are more images than fit on a page.
        IntegrityError: an image shard is missing or damaged.
    """
    most_shown(len(found.rows))
    images = fetch_images(found.version, [row["id"] for row in found.rows], cache)
    page = gallery(query, found, images, name=name)
    # Text from the command line may contain lone surrogates, which UTF-8 cannot encode.
    path.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))


def most_shown(count: int) -> None:
    """Raise ``InputError`` if ``count`` images are too many for a page."""
    if count > MOST:
        raise InputError(f"too many images for a page: {count}, the maximum is {MOST}; give a smaller --k")


def gallery(query: str | Image.Image, found: SearchResult, images: Sequence[Image.Image], *, name: str = "") -> str:
    """Return the page: the query, then a thumbnail, score, key and link of each row found."""
    heading = html.escape(_short(query if isinstance(query, str) else name or "an image"))
    above = "" if isinstance(query, str) else f'<img src="{_inlined(query)}" alt="the query: {heading}">'
    figures = "\n".join(_figure(row, image) for row, image in zip(found.rows, images, strict=True))
    count, rows = len(found.rows), found.version.rows
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading} · {html.escape(found.name)}</title>
<style>{_CSS}</style>
</head>
<body>
<header>{above}<div>
<h1>{heading}</h1>
<p>The {count} nearest of {rows:,} images in {html.escape(found.name)}, with their cosine to the query.</p>
</div></header>
<main><ol>
{figures}
</ol></main>
</body>
</html>
"""


def _figure(row: dict[str, Any], image: Image.Image) -> str:
    url, key = str(row["url"] or ""), html.escape(str(row["key"]))
    link_text, linked = html.escape(printable(_short(url))), len(url) <= LONGEST_LINK and _is_web(url)
    link = f'<a href="{html.escape(url)}" rel="noopener noreferrer">{link_text}</a>' if linked else link_text
    alt = html.escape(_short(_file_name(url)) or f"image {row['key']}")
    caption = f"<b>{row['score']:.3f}</b> · no. {row['rank']}<br>key {key} · row {row['id']}<br>{link}"
    thumbnail = f'<img src="{_inlined(image)}" alt="{alt}">'
    return f"<li><figure>{thumbnail}<figcaption>{caption}</figcaption></figure></li>"


def _inlined(image: Image.Image) -> str:
    """Return a thumbnail of the image as a data URL."""
    buffer = io.BytesIO()
    shrink_to_fit(to_rgb(image), THUMBNAIL_PX).save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


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
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"
