"""Validation of untrusted strings, numbers and JSON from a store or a registry.

Each check returns its argument or raises ``ValueError`` with the reason. The caller adds the source to the message.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

MAX_NESTING = 64
"""Maximum levels of lists and objects in JSON that is read; manifests have about five."""
MAX_NAME_LENGTH = 1024
_MAX_COMPONENT_BYTES = 255  # limit for a file name on common file systems
_MAX_URI_LENGTH = 4096
_MAX_COUNT = 2**63
_SHOWN = 80  # characters of a wrong value in a message

# Control characters, line separators, marks that reorder text on a terminal, and lone surrogates.
_UNPRINTABLE = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FILE_NAME = re.compile(rf"(?!\.\.?(?:/|\Z))[^/\\{_UNPRINTABLE}]+(?:/(?!\.\.?(?:/|\Z))[^/\\{_UNPRINTABLE}]+)*")
_URI = re.compile(rf"[^{_UNPRINTABLE}]+")


def digest(value: Any, what: str = "a digest") -> str:
    """Return ``value`` if it is a hex sha256: 64 lower-case hexadecimal digits."""
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value
    raise ValueError(f"{what} must be 64 lower-case hexadecimal digits, not {shown(value)}")


def label(value: Any, what: str) -> str:
    """Return ``value`` if it is one path component of letters, digits, ``.``, ``_`` and ``-``."""
    if isinstance(value, str) and _LABEL.fullmatch(value):
        return value
    raise ValueError(f"{what} must be letters, digits, '.', '_' and '-', not {shown(value)}")


def file_name(value: Any) -> str:
    """Return ``value`` if it is a relative path that remains below the folder it is joined to."""
    if isinstance(value, str) and len(value) <= MAX_NAME_LENGTH and _FILE_NAME.fullmatch(value):
        long = len(value) > _MAX_COMPONENT_BYTES or not value.isascii()
        if not long or all(len(part.encode()) <= _MAX_COMPONENT_BYTES for part in value.split("/")):
            return value
    raise ValueError(f"a file name must be a relative path without '..', not {shown(value)}")


def uri(value: Any, what: str = "a folder") -> str:
    """Return ``value`` if it is a path or an address of printable characters."""
    if isinstance(value, str) and len(value) <= _MAX_URI_LENGTH and _URI.fullmatch(value):
        return value
    raise ValueError(f"{what} must be a path or an address without control characters, not {shown(value)}")


def text(value: Any, what: str, longest: int = MAX_NAME_LENGTH) -> str:
    """Return ``value`` if it is a string of at most ``longest`` characters."""
    if isinstance(value, str) and len(value) <= longest:
        return value
    raise ValueError(f"{what} must be a string of at most {longest} characters, not {shown(value)}")


def count(value: Any, what: str) -> int:
    """Return ``value`` if it is an integer from 0 to 2**63 - 1, and not a bool."""
    if type(value) is int and 0 <= value < _MAX_COUNT:
        return value
    raise ValueError(f"{what} must be an integer from 0 to 2**63 - 1, not {shown(value)}")


def mapping(value: Any, what: str) -> dict[str, Any]:
    """Return ``value`` if it is a dict, which is a parsed JSON object."""
    if isinstance(value, dict):
        return value
    raise ValueError(f"{what} must be an object, not {shown(value)}")


def sequence(value: Any, what: str) -> list[Any]:
    """Return ``value`` if it is a list, which is a parsed JSON array."""
    if isinstance(value, list):
        return value
    raise ValueError(f"{what} must be a list, not {shown(value)}")


def distinct_files(files_by_folder: Iterable[tuple[str | None, str, str]]) -> None:
    """Check that no two names of (folder, file name, digest) clash, ignoring case. Raises ``ValueError``.

    A file in the ``folder`` of an earlier version may belong to several shards, as in a union of overlapping databases.
    """
    files: dict[tuple[str | None, str], tuple[str, str]] = {}
    folders: set[tuple[str | None, str]] = set()
    for folder, name, sha256 in files_by_folder:
        key = (folder, name.casefold())
        before = files.get(key)
        files[key] = (name, sha256)
        if before is not None and (folder is None or before != (name, sha256)):
            raise ValueError(f"the file name {shown(name)} is not unique; names must differ in more than case")
        above = key[1].rpartition("/")[0]
        while above and (folder, above) not in folders:
            folders.add((folder, above))
            above = above.rpartition("/")[0]
    if clash := files.keys() & folders:
        raise ValueError(f"the name {shown(min(name for _, name in clash))} is both a file and a folder")


def parse_json(data: str | bytes, max_bytes: int) -> Any:
    """Parse JSON of at most ``max_bytes`` and ``MAX_NESTING`` levels."""
    if len(data) > max_bytes:
        raise ValueError(f"it has {len(data)} bytes, more than the limit of {max_bytes}")
    try:
        parsed = json.loads(data)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_NESTING} levels") from None
    _check_nesting(parsed)
    return parsed


def shown(value: Any) -> str:
    """Return ``value`` as text for a one-line message, truncated if it is long."""
    # Python cannot format huge integers in decimal, and a container may contain one.
    as_text = ascii(value) if isinstance(value, str | float | bool) or value is None else _described(value)
    return as_text if len(as_text) <= _SHOWN else f"{as_text[:_SHOWN]}…"


def _described(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() <= 256:
        return str(value)
    return f"a value of type {type(value).__name__}"


def _check_nesting(parsed: Any) -> None:
    """Raise ``ValueError`` for too many levels. Iterative, because deep nesting must not exhaust the stack."""
    level: list[Any] = [[parsed]]
    for _ in range(MAX_NESTING + 1):
        deeper: list[Any] = []
        for outer in level:
            inside = outer.values() if type(outer) is dict else outer
            deeper += [inner for inner in inside if type(inner) is dict or type(inner) is list]
        if not deeper:
            return
        level = deeper
    raise ValueError(f"it is nested deeper than {MAX_NESTING} levels")
