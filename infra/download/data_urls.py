"""Content of ``data:`` URLs (RFC 2397), which carry an image in the URL itself."""

import binascii
import io
import urllib.response
from base64 import b64decode
from email.message import Message
from urllib.parse import unquote_to_bytes

from infra.download.limits import FetchError


def is_data_url(url: str) -> bool:
    """Return True if ``url`` has the scheme ``data``."""
    return url.lstrip()[:5].lower() == "data:"


def open_data_url(url: str, max_body_bytes: int) -> urllib.response.addinfourl:
    """Return the content of a ``data:`` URL as a response. Raises ``FetchError`` if it is malformed or too large."""
    header, comma, content = url.strip()[5:].partition(",")
    if not comma:
        raise FetchError("invalid_url", "the data: URL has no comma before its content")
    parameters = [parameter.strip().lower() for parameter in header.split(";")]
    is_base64 = "base64" in parameters[1:]
    if len(content) > 3 * max_body_bytes + 4:  # the longest form of a byte: %XX
        raise FetchError("body_too_large", f"more than max_body_bytes={max_body_bytes}")
    body = unquote_to_bytes(content)
    if is_base64:
        try:
            body = b64decode(b"".join(body.split()) + b"==", validate=False)
        except binascii.Error as error:
            raise FetchError("invalid_url", f"the content of the data: URL is not base64: {error}") from error
    if len(body) > max_body_bytes:
        raise FetchError("body_too_large", f"more than max_body_bytes={max_body_bytes}")
    headers = Message()
    headers["Content-Type"] = parameters[0] or "text/plain"
    return urllib.response.addinfourl(io.BytesIO(body), headers, "data:", 200)
