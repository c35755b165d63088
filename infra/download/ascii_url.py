"""URLs in the form of a request: in ASCII, with a valid host, and without credentials or a fragment."""

import re
import string
from urllib.parse import quote, urlsplit, urlunsplit

from infra.download.limits import FetchError

DEFAULT_PORTS = {"http": 80, "https": 443}
_INVALID_IN_HOST = re.compile(r"[\x00-\x20\x7f#%/:<>?@\[\\\]^|]")


def ascii_url(url: str) -> str:
    """Return ``url`` in ASCII, without its fragment. The host is encoded with IDNA, path and query with percent signs.

    Raises:
        FetchError: The scheme is not http or https, the host is missing or invalid, or the URL contains credentials.
        ValueError: The URL is malformed, e.g. its port is not a number.
    """
    parts = urlsplit(url.strip())
    if parts.scheme not in DEFAULT_PORTS:
        raise FetchError("blocked_scheme", f"scheme is not allowed: {parts.scheme or '(none)'}; use http or https")
    if not parts.hostname or "@" in parts.netloc:
        raise FetchError("invalid_url", "the URL has no host" if not parts.hostname else "the URL contains credentials")
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode("ascii")
    if _INVALID_IN_HOST.search(host) and not parts.netloc.startswith("["):
        raise FetchError("invalid_url", f"the host contains an invalid character: {host!r}")
    netloc = (f"[{host}]" if ":" in host else host) + (f":{parts.port}" if parts.port is not None else "")
    path, query = (quote(part, safe=string.punctuation) for part in (parts.path or "/", parts.query))
    return urlunsplit((parts.scheme, netloc, path, query, ""))


def endpoint_of(url: str) -> str:
    """Return ``host:port`` of a URL from :func:`ascii_url`, as listed in ``Limits.allow_hosts``."""
    parts = urlsplit(url)
    host = str(parts.hostname)
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
