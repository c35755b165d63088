"""Gallery: what a search found as one HTML page that needs nothing else, neither a server nor a network nor scripts.

Whatever stands in a database came from the web: names and URLs are escaped, only http and https become links, and the
page's own policy forbids scripts and every request.
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
"""Pictures on a page: with thumbnails of this size it stays below 40 MB, be they noise, and is 2 to 5 MB as a rule."""
THUMBNAIL_PX = 192
LONGEST_LINK = 2048
"""Characters of a URL from which on it is told, but no link; browsers and servers cut longer ones."""
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
    """Write the page of a search to ``path``, its pictures read from the database's image shards.

    Args:
        path: the file to write.
        query: what was sought.
        found: what was found.
        cache: where remote shards are kept.
        name: of the query's picture, told beside it.

    Raises:
        InputError: more pictures than a page shows.
        IntegrityError: an image shard is missing, or differs from what was committed.
    """
    most_shown(len(found.rows))
    pictures = fetch_images(found.version, [row["id"] for row in found.rows], cache)
    page = gallery(query, found, pictures, name=name)
    # A text from the command line may hold halves of characters, which UTF-8 has not.
    path.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))


def most_shown(count: int) -> None:
    """Raise ``InputError`` when ``count`` pictures are too many for a page."""
    if count > MOST:
        raise InputError(f"a page shows at most {MOST} pictures, {count} were asked for; give a smaller --k")


def gallery(query: str | Image.Image, found: SearchResult, pictures: Sequence[Image.Image], *, name: str = "") -> str:
    """The page: the query on top, then a thumbnail, score, key and link for each row found, with its picture."""
    told = html.escape(_short(query if isinstance(query, str) else name or "a picture"))
    above = "" if isinstance(query, str) else f'<img src="{_inlined(query)}" alt="the query: {told}">'
    shown = "\n".join(_figure(row, picture) for row, picture in zip(found.rows, pictures, strict=True))
    count, rows = len(found.rows), found.version.rows
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{told} · {html.escape(found.name)}</title>
<style>{_CSS}</style>
</head>
<body>
<header>{above}<div>
<h1>{told}</h1>
<p>The {count} nearest of {rows:,} pictures in {html.escape(found.name)}, with their cosine to the query.</p>
</div></header>
<main><ol>
{shown}
</ol></main>
</body>
</html>
"""


def _figure(row: dict[str, Any], picture: Image.Image) -> str:
    url, key = str(row["url"] or ""), html.escape(str(row["key"]))
    address, linked = html.escape(printable(_short(url))), len(url) <= LONGEST_LINK and _is_web(url)
    link = f'<a href="{html.escape(url)}" rel="noopener noreferrer">{address}</a>' if linked else address
    alt = html.escape(_short(_file_name(url)) or f"picture {row['key']}")
    words = f"<b>{row['score']:.3f}</b> · no. {row['rank']}<br>key {key} · row {row['id']}<br>{link}"
    shown = f'<img src="{_inlined(picture)}" alt="{alt}">'
    return f"<li><figure>{shown}<figcaption>{words}</figcaption></figure></li>"


def _inlined(picture: Image.Image) -> str:
    """A thumbnail of the picture as a data URL."""
    buffer = io.BytesIO()
    shrink_to_fit(to_rgb(picture), THUMBNAIL_PX).save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _is_web(url: str) -> bool:
    try:
        return urlsplit(url).scheme in {"http", "https"}
    except ValueError:  # a bracket of an IPv6 address that is never closed
        return False


def _file_name(url: str) -> str:
    """The last part of a URL's path, readable: what it says of the picture."""
    path = urlsplit(url).path if _is_web(url) else ""
    return unquote(path.rstrip("/").rsplit("/", 1)[-1])


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"
