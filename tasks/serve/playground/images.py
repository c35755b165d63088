"""Images that the browser sent. They stay in memory, bounded, and the browser names them by random tokens."""

import io
import secrets
import threading
from collections import OrderedDict

from PIL import Image

from infra.errors import NotFoundError

MAX_FILE_BYTES = 20_000_000
_KEPT = 16
_KEPT_OF_CLOSED = 48
_SIDE_PX = 1_024  # larger than any encoder or generator reads; at most 3 MB each


class SentImages:
    """The latest images of each open page, and those of closed pages for a reload or Back. Thread-safe."""

    def __init__(self, kept: int = _KEPT, kept_of_closed: int = _KEPT_OF_CLOSED) -> None:
        """Create an empty store. Each page keeps ``kept`` images; the closed ones share ``kept_of_closed``."""
        self._kept, self._kept_of_closed = kept, kept_of_closed
        self._images: OrderedDict[str, Image.Image] = OrderedDict()
        self._pages: dict[str, str | None] = {}
        self._lock = threading.Lock()

    def add(self, image: Image.Image, page: str) -> str:
        """Keep a reduced copy of an image for a page, and return its token."""
        reduced = image.convert("RGB")
        reduced.thumbnail((_SIDE_PX, _SIDE_PX))
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._images[token] = reduced
            self._move(token, page)
        return token

    def claim(self, token: str, page: str) -> None:
        """Keep an image for a page that was opened with its token."""
        with self._lock:
            if token in self._images:
                self._move(token, page)

    def close(self, page: str) -> None:
        """Keep the images of a page only as those of closed pages."""
        with self._lock:
            for token in [token for token, owner in self._pages.items() if owner == page]:
                self._move(token, None)

    def _move(self, token: str, page: str | None) -> None:
        self._pages[token] = page
        self._images.move_to_end(token)
        own = [one for one in self._images if self._pages[one] == page]
        for one in own[: -(self._kept_of_closed if page is None else self._kept)]:
            del self._images[one], self._pages[one]

    def __contains__(self, token: str) -> bool:
        """Return True if an image is still kept."""
        with self._lock:
            return token in self._images

    def get(self, token: str) -> Image.Image:
        """Return an image. Raises ``NotFoundError`` if it is unknown or expired."""
        with self._lock:
            if token not in self._images:
                raise NotFoundError("the image has expired; add it again")
            self._images.move_to_end(token)
            return self._images[token]

    def webp(self, token: str) -> bytes:
        """Return an image encoded here: the bytes that were sent, e.g. of an SVG, never go back to a browser."""
        out = io.BytesIO()
        self.get(token).save(out, "WEBP", quality=90)
        return out.getvalue()
