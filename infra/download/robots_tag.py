"""Parser of the ``X-Robots-Tag`` header, with which a site forbids indexing or training on a response.

A header consists of rules separated by commas. ``robot: rule`` applies the rule, and those after it in the same header,
to that robot only. Some rules have a value after a colon, and the value of ``unavailable_after`` may contain commas.
"""

import re
from collections.abc import Iterable

FORBIDDING = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Rules that forbid taking an image; ``none`` means ``noindex, nofollow``."""

ROBOTS = frozenset({"img2dataset", "knn-diffusion", "*"})
"""Robot names that apply to this project."""

_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_ROBOT = re.compile(r"[^\s:]+")  # a date after a comma, as in "Tue, 25 Jun 2030 15:00:00 PST", has spaces


def forbidding_rule(headers: Iterable[str]) -> str | None:
    """Return the first rule in ``headers`` that forbids this project to use the image, or None."""
    for header in headers:
        applies = True
        for item in header.lower().split(","):
            name, colon, rest = item.strip().partition(":")
            name, rules = name.strip(), item
            if name in _WITH_VALUE:
                continue
            if colon and _ROBOT.fullmatch(name) and name not in FORBIDDING:
                applies, rules = name in ROBOTS, rest
            found = FORBIDDING.intersection(re.split(r"[\s;:]+", rules))
            if applies and found:
                return min(found)
    return None
