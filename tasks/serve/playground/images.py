"""Images that the browser sent. They stay in memory, bounded, and the browser names them by random tokens."""

import io
import secrets
import threading
from collections import OrderedDict

from PIL import Image

from infra.errors import NotFoundError

MAX_FILE_BYTES = 20_000_000
_KEPT = 48
_SIDE_PX = 1_024  # larger than any encoder or generator reads; at most 150 MB for all


class SentImages:
    """The latest images of all visitors, at most ``kept`` of them. Thread-safe."""

    def __init__(self, kept: int = _KEPT) -> None:
        """Create an empty store."""
        self._kept = kept
        self._images: OrderedDict[str, Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, image: Image.Image) -> str:
        """Keep a reduced copy of an image, and return its token."""
        reduced = image.convert("RGB")
        reduced.thumbnail((_SIDE_PX, _SIDE_PX))
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._images[token] = reduced
            while len(self._images) > self._kept:
                self._images.popitem(last=False)
        return token

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
