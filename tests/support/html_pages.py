"""Parser of HTML pages for tests."""

import base64
import io
from html.parser import HTMLParser
from typing import Any

from PIL import Image


class Page(HTMLParser):
    """Parsed page: its elements with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def is_harmless(self) -> bool:
        """Return True if the page has no script and no event handler, and links only to http and https."""
        attributes = [(name, value or "") for _, found in self.elements for name, value in found.items()]
        return not self.all("script") and not any(
            name.startswith("on") or (name == "href" and not value.startswith(("http:", "https:")))
            for name, value in attributes
        )

    def images(self) -> list[Image.Image]:
        """Decode every inline image of the page."""
        decoded = []
        for attributes in self.all("img"):
            head, encoded = attributes["src"].split(",", 1)
            assert head in {"data:image/png;base64", "data:image/webp;base64"}
            image = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))
            image.load()
            decoded.append(image)
        return decoded
