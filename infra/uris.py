"""URIs: pure functions on their strings, and the secrets that some of them hold.

A URI may hold a password (``https://user:password@host/list.csv``) or a signed query (``?X-Amz-Signature=…``).
:func:`hide` replaces both by ``***`` where a URI enters: the hidden form is what configs, manifests, Prefect's
parameters, MLflow and messages get. The secret stays in the memory of this process, and :func:`reveal` puts it back
where the URI is opened. Workers get the secrets of the process that starts them (:func:`secrets`).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

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
"""A shorter secret is masked in URIs alone: it could be part of any word."""
_secrets: dict[str, str] = {}  # hidden form -> URI, of whole URIs and of their beginnings up to the path
_words: set[str] = set()  # the secrets themselves


def join(uri: str, *parts: str) -> str:
    """``uri`` with ``parts`` below it, whatever its scheme."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """``uri`` made independent of the working directory: references must mean the same on every worker."""
    if is_local(uri):
        return str(Path(local_path(uri)).absolute())
    scheme, _, path = uri.partition("://")
    return f"{scheme}://{re.sub('/+', '/', path).rstrip('/')}" if is_s3(uri) else uri.rstrip("/")


def canonical(uri: str) -> str:
    """The one spelling of a place that several spell differently: links and ``..`` of a local path resolved."""
    return str(local_path(uri).resolve()) if is_local(uri) else absolute(uri)


def is_below(uri: str, folder: str) -> bool:
    """Return True if ``uri`` is ``folder`` or is in it, with links and ``..`` of local paths resolved.

    A chain of file systems (``::``) and a remote URI with ``..`` count as outside: where they lead is up to the scheme.
    """
    place, above = canonical(uri), canonical(folder).rstrip("/")
    if "::" in uri or (not is_local(uri) and ".." in place.split("/")):
        return False
    return place == above or place.startswith(above + "/")


def is_local(uri: str) -> bool:
    """Return True if ``uri`` names a file of this machine."""
    return "://" not in uri or uri.startswith("file://")


def is_s3(uri: str) -> bool:
    """Return True if ``uri`` names an object in S3 or a store that speaks its protocol."""
    return uri.startswith("s3://")


def local_path(uri: str) -> Path:
    """The path behind a local URI. Raises ``ValueError`` for a remote one."""
    if not is_local(uri):
        raise ValueError(f"{masked(uri)} is remote; download it with storage.fetch first")
    return Path(uri.removeprefix("file://")).expanduser()


def masked(text: str) -> str:
    """Return a URI, or a message that quotes some, with passwords and secret query parameters replaced by ``***``.

    Long secrets that :func:`hide` has seen are replaced wherever they occur.
    """
    shown = _without_secrets(text)
    for word in sorted(_words, key=len, reverse=True):
        shown = shown.replace(word, HIDDEN)
    return shown


def hide(uri: str) -> str:
    """Return ``uri`` without its secrets, which :func:`reveal` finds again in this process. Hidden ones stay hidden."""
    if is_local(uri):
        return uri
    hidden = _without_secrets(uri)
    if hidden != uri:
        learn({hidden: uri})
        if (place := _authority(hidden)) != _authority(uri):
            learn({place: _authority(uri)})
    return hidden


def hide_fields(config: Any, *names: str) -> None:
    """:func:`hide` the named fields, texts or tuples of texts, of a frozen dataclass that is being made."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str):
            object.__setattr__(config, name, hide(value))
        elif value is not None:
            object.__setattr__(config, name, tuple(hide(one) for one in value))


def reveal(uri: str) -> str:
    """Return ``uri`` with the secrets that :func:`hide` has taken from it, or from one of the same user and host.

    Raises ``InputError`` when this process does not know them.
    """
    if is_local(uri) or not _STILL_HIDDEN.search(uri):
        return uri
    place = _authority(uri)
    revealed = _secrets.get(uri) or _secrets.get(place, place) + uri.removeprefix(place)
    if _STILL_HIDDEN.search(revealed):
        raise InputError(f"the password or signature of {uri} is not stored; give the URI again, with it")
    return revealed


def secrets() -> dict[str, str]:
    """Return what :func:`learn` takes on a worker. It must never be stored."""
    return dict(_secrets)


def learn(known: Mapping[str, str]) -> None:
    """Take over secrets: hidden form -> URI."""
    _secrets.update(known)
    for hidden, uri in known.items():
        pattern = "([^&;#\\s]+)".join(re.escape(part) for part in hidden.split(HIDDEN))
        if found := re.fullmatch(pattern, uri):
            words = {form for word in found.groups() for form in (word, unquote(word))}
            _words.update(word for word in words if len(word) >= _SHORTEST)


def _without_secrets(text: str) -> str:
    return _PASSWORD.sub(rf"\1{HIDDEN}\2", _SECRET_FIELD.sub(rf"\1{HIDDEN}", text))


def _authority(uri: str) -> str:
    """The beginning of a URI up to its path."""
    scheme, mark, rest = uri.partition("://")
    return scheme + mark + re.split("[/?#]", rest, maxsplit=1)[0]
