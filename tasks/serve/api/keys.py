"""API keys: read from the environment or a file, compared in constant time."""

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from infra.errors import ConfigError

VARIABLE = "KNN_DIFFUSION_API_KEYS"
"""Environment variable with keys, separated by commas or white space."""
MIN_CHARACTERS = 16


class Keys:
    """Accepted API keys. Only their digests are kept, so that neither a log nor a traceback shows a key."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Store the digests of ``keys``. Raises ``ConfigError`` if a key is too short to be a secret."""
        given = list(dict.fromkeys(keys))
        if any(len(key) < MIN_CHARACTERS for key in given):
            raise ConfigError(f"an API key is shorter than {MIN_CHARACTERS} characters; use `openssl rand -hex 32`")
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in given)

    @classmethod
    def read(cls, path: Path | None = None) -> "Keys":
        """Read the keys of the environment, and of a file with one key per line and comments after ``#``."""
        keys = os.environ.get(VARIABLE, "").replace(",", " ").split()
        if path is not None:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"the file of API keys cannot be read: {path}; give one key per line") from error
            found = [key for line in lines if (key := line.partition("#")[0].strip())]
            if not found:
                raise ConfigError(f"the file of API keys is empty: {path}; give one key per line")
            keys += found
        return cls(keys)

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._digests)

    def __repr__(self) -> str:
        """Return the number of keys, and none of them."""
        return f"Keys({len(self)})"

    def accept(self, given: bytes) -> bool:
        """Return True if ``given`` is one of the keys. The time depends neither on the key nor on its place."""
        digest = hashlib.sha256(given).digest()
        return sum(hmac.compare_digest(digest, one) for one in self._digests) > 0  # any() would stop at the first


def presented_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the key of a request: ``X-API-Key``, a bearer token, or the password of a browser's dialog."""
    found = {name: value for name, value in headers if name in (b"x-api-key", b"authorization")}
    if b"x-api-key" in found:
        return found[b"x-api-key"].strip()
    scheme, _, value = found.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            return None
    return None
