"""URI strings and the secrets that they may contain.

A URI may contain a password (``https://user:password@host/list.csv``) or a signed query (``?X-Amz-Signature=…``).
:func:`hide` replaces both with ``***`` when a URI is received. Configs, manifests, Prefect's parameters, MLflow and
messages get only the hidden form. The secret remains in the memory of this process, and :func:`reveal` restores it
when the URI is opened. Workers get the secrets of the process that starts them (:func:`secrets`).
"""

import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from infra.errors import InputError

HIDDEN = "***"

_PASSWORD = re.compile(rf"(://[^/\s:@]*:)(?!{re.escape(HIDDEN)}@)[^/\s]+(@)")
_SECRET_FIELD = re.compile(
    r"([?&;#](?:password|passwd|pwd|secret|sig|signature|token|access_token|key|api_key|apikey|awsaccesskeyid"
    r"|x-(?:amz|goog)-(?:signature|credential|security-token))=)"
    rf"(?!{re.escape(HIDDEN)})[^&;#\s]+",
    re.IGNORECASE,
)
_STILL_HIDDEN = re.compile(rf":{re.escape(HIDDEN)}@|[?&;#][^=]+={re.escape(HIDDEN)}")
_SHORTEST = 8
"""Minimum length of a secret that is masked in any text. Shorter ones, which could be part of a word, are masked in
URIs only."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_ESCAPE = re.compile("%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset(string.ascii_letters + string.digits + "-._~")
_KEPT = "!#$%&'()*+,/:;=?@[]"  # reserved characters, and the % of an escape
_secrets: dict[str, str] = {}  # hidden form -> URI, for whole URIs and for their parts before the path
_words: set[str] = set()  # the secrets themselves


def normal_url(url: str) -> str:
    """Return the normal form of an image's URL. All spellings of one URL have the same normal form.

    URLs are requested, stored, remembered and matched in this form. It follows section 6.2 of RFC 3986:

    - blanks around the URL, and tabs and newlines in it, are removed;
    - scheme and host are in lower case, and the host of an international domain is in Punycode;
    - the default port, the fragment, an empty query and the segments ``.`` and ``..`` are removed;
    - an empty path becomes ``/``;
    - letters, digits and ``-._~`` are not percent-encoded, reserved characters stay as they are, all other characters
      are percent-encoded UTF-8, and hexadecimal digits are in upper case.

    Text that is not an HTTP URL is only stripped. The function is idempotent.
    """
    text = url.strip()
    try:
        parts = urlsplit(text)
        scheme, host, port = parts.scheme.lower(), parts.hostname or "", parts.port
    except ValueError:  # an invalid port or address
        return text
    if scheme not in _DEFAULT_PORTS or not host:
        return text
    user = parts.netloc.rpartition("@")[0]
    place = f"{user}@" if user else ""
    place += f"[{host}]" if ":" in host else _ascii_host(host)
    if port not in (None, _DEFAULT_PORTS[scheme]):
        place += f":{port}"
    path = _without_dots(_escaped(parts.path)) or "/"
    query = _escaped(parts.query)
    return SplitResult(scheme, place, path, query, "").geturl()


def join(uri: str, *parts: str) -> str:
    """Join ``parts`` to ``uri``, which may have any scheme."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """Make ``uri`` independent of the working directory, so that it means the same on every worker."""
    if is_local(uri):
        return str(Path(local_path(uri)).absolute())
    scheme, _, path = uri.partition("://")
    return f"{scheme}://{re.sub('/+', '/', path).rstrip('/')}" if is_s3(uri) else uri.rstrip("/")


def canonical(uri: str) -> str:
    """Return the canonical form of a location: links and ``..`` of a local path are resolved."""
    return str(local_path(uri).resolve()) if is_local(uri) else absolute(uri)


def is_below(uri: str, folder: str) -> bool:
    """Return True if ``uri`` is ``folder`` or below it, with links and ``..`` of local paths resolved.

    Chained file systems (``::``) and remote URIs with ``..`` count as outside, because their target depends on the
    scheme.
    """
    location, parent = canonical(uri), canonical(folder).rstrip("/")
    if "::" in uri or (not is_local(uri) and ".." in location.split("/")):
        return False
    return location == parent or location.startswith(parent + "/")


def is_local(uri: str) -> bool:
    """Return True if ``uri`` is a path or a ``file://`` URI."""
    return "://" not in uri or uri.startswith("file://")


def is_s3(uri: str) -> bool:
    """Return True if ``uri`` names an object in S3 or an S3-compatible store."""
    return uri.startswith("s3://")


def local_path(uri: str) -> Path:
    """Return the path of a local URI. Raises ``ValueError`` for a remote URI."""
    if not is_local(uri):
        raise ValueError(f"{masked(uri)} is remote; download it with storage.fetch first")
    return Path(uri.removeprefix("file://")).expanduser()


def masked(text: str) -> str:
    """Replace passwords and secret query parameters with ``***`` in a URI, or in a message that quotes URIs.

    Long secrets that :func:`hide` has processed are replaced wherever they occur.
    """
    shown = _without_secrets(text)
    for word in sorted(_words, key=len, reverse=True):
        shown = shown.replace(word, HIDDEN)
    return shown


def hide(uri: str) -> str:
    """Return ``uri`` without its secrets, which :func:`reveal` restores in this process. Idempotent."""
    if is_local(uri):
        return uri
    hidden = _without_secrets(uri)
    if hidden != uri:
        learn({hidden: uri})
        if (authority := _authority(hidden)) != _authority(uri):
            learn({authority: _authority(uri)})
    return hidden


def hide_fields(config: Any, *names: str) -> None:
    """Apply :func:`hide` to fields of a frozen dataclass in its ``__post_init__``: strings or tuples of strings."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str):
            object.__setattr__(config, name, hide(value))
        elif value is not None:
            object.__setattr__(config, name, tuple(hide(one) for one in value))


def reveal(uri: str) -> str:
    """Restore the secrets that :func:`hide` removed from ``uri``, or from a URI with the same user and host.

    Raises ``InputError`` if this process does not know them.
    """
    if is_local(uri) or not _STILL_HIDDEN.search(uri):
        return uri
    authority = _authority(uri)
    revealed = _secrets.get(uri) or _secrets.get(authority, authority) + uri.removeprefix(authority)
    if _STILL_HIDDEN.search(revealed):
        raise InputError(f"the password or signature of {uri} is not stored; give the URI again with its secret")
    return revealed


def secrets() -> dict[str, str]:
    """Return the known secrets, for :func:`learn` on a worker. Never store the result."""
    return dict(_secrets)


def learn(known: Mapping[str, str]) -> None:
    """Add secrets, e.g. those of another process, as a mapping from the hidden form of a URI to the URI."""
    _secrets.update(known)
    for hidden, uri in known.items():
        pattern = "([^&;#\\s]+)".join(re.escape(part) for part in hidden.split(HIDDEN))
        if found := re.fullmatch(pattern, uri):
            words = {form for word in found.groups() for form in (word, unquote(word))}
            _words.update(word for word in words if len(word) >= _SHORTEST)


def _without_secrets(text: str) -> str:
    return _PASSWORD.sub(rf"\1{HIDDEN}\2", _SECRET_FIELD.sub(rf"\1{HIDDEN}", text))


def _authority(uri: str) -> str:
    """Return the part of a URI before its path."""
    scheme, mark, rest = uri.partition("://")
    return scheme + mark + re.split("[/?#]", rest, maxsplit=1)[0]


def _ascii_host(host: str) -> str:
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:
        return host


def _escaped(text: str) -> str:
    """Return a part of a URL with one spelling for each character."""
    plain = _ESCAPE.sub(_normal_escape, text)
    return quote(re.sub("%(?![0-9A-F]{2})", "%25", plain), safe=_KEPT, errors="surrogatepass")


def _normal_escape(found: re.Match[str]) -> str:
    character = chr(int(found[1], 16))
    return character if character in _UNRESERVED else found[0].upper()


def _without_dots(path: str) -> str:
    """Remove the segments ``.`` and ``..`` of a path that starts with a slash."""
    if "/." not in path:
        return path
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)
