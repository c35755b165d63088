"""Text from outside, made safe to print: URLs, captions, messages of servers and libraries."""

import re

from infra.uris import masked

_UNSAFE = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # control characters: a terminal obeys them
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional marks: what follows is shown in another order
    "\u2028\u2029"  # separators of lines and paragraphs
    "\ud800-\udfff"  # lone surrogates, which UTF-8 cannot encode
    "]"
)


def printable(text: str) -> str:
    r"""Return ``text`` with what could forge or garble a line of output written as an escape, such as ``\x1b``."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def sanitised(text: str) -> str:
    """Return ``text`` for a log or an error line: printable, its URIs without passwords."""
    return printable(masked(text))
