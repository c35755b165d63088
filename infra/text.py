"""Sanitising of untrusted text for output: URLs, captions, messages of servers and libraries."""

import re

from infra.uris import masked

_UNSAFE = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # control characters: a terminal executes them
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional marks: they reorder the text that follows
    "\u2028\u2029"  # line and paragraph separators
    "\ud800-\udfff"  # lone surrogates, which UTF-8 cannot encode
    "]"
)


def printable(text: str) -> str:
    r"""Return ``text`` with characters that could forge or garble output escaped, e.g. as ``\x1b``."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def sanitised(text: str) -> str:
    """Return ``text`` for a log or error line: printable, and without passwords in URIs."""
    return printable(masked(text))
