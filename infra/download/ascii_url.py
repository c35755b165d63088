"""URLs as they are sent: ASCII only, with a valid host, without credentials and fragment."""

import re
import string
from urllib.parse import quote, urlsplit, urlunsplit

from infra.download.limits import FetchError

DEFAULT_PORTS = {"http": 80, "https": 443}
_NOT_IN_NAMES = re.compile(r"[\x00-\x20\x7f#%/:<>?@\[\\\]^|]")


def ascii_url(url: str) -> str:
    """Return ``url`` in ASCII without its fragment: IDNA host, the rest percent-encoded. Raises ``FetchError``."""
    parts = urlsplit(url.strip())
    if parts.scheme not in DEFAULT_PORTS:
        raise FetchError("blocked_scheme", f"scheme {parts.scheme or '(none)'} is not allowed; use http or https")
    if not parts.hostname or "@" in parts.netloc:
        raise FetchError("invalid_url", "the URL has no host" if not parts.hostname else "the URL contains credentials")
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode("ascii")
    if _NOT_IN_NAMES.search(host) and not parts.netloc.startswith("["):
        raise FetchError("invalid_url", f"the host contains a character that no host can have: {host!r}")
    netloc = (f"[{host}]" if ":" in host else host) + (f":{parts.port}" if parts.port is not None else "")
    path, query = (quote(part, safe=string.punctuation) for part in (parts.path or "/", parts.query))
    return urlunsplit((parts.scheme, netloc, path, query, ""))


def endpoint_of(url: str) -> str:
    """Return ``host:port`` of a URL from :func:`ascii_url`, the form of ``Limits.allow_hosts``."""
    parts = urlsplit(url)
    host = str(parts.hostname)
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
