"""Rules of robots.txt (RFC 9309), read once per site through the guarded opener."""

import threading
from collections.abc import Callable
from urllib.error import HTTPError
from urllib.parse import urlsplit

from infra.download.limits import FetchError
from infra.download.robots_tag import ROBOTS

MAX_BYTES = 500 << 10
"""Bytes of a robots.txt that are read; RFC 9309 requires at least this many."""


class RobotsRules:
    """Rules of the sites that were asked. Thread-safe: threads that need the same site wait for one request."""

    def __init__(self, read: Callable[[str], bytes]) -> None:
        """Set the function that returns the body of a URL; it may raise ``FetchError`` and ``HTTPError``."""
        self._read = read
        self._lock = threading.Lock()
        self._sites: dict[str, tuple[threading.Lock, list[Callable[[str], bool]]]] = {}

    def require_allowed(self, url: str) -> None:
        """Raise ``FetchError`` if the site of ``url`` does not allow this project to request it."""
        parts = urlsplit(url)
        site = f"{parts.scheme}://{parts.netloc}"
        with self._lock:
            lock, rules = self._sites.setdefault(site, (threading.Lock(), []))
        with lock:
            if not rules:
                rules.append(self._rules_of(f"{site}/robots.txt"))
        if not rules[0](url):
            raise FetchError("robots_disallowed", f"{site}/robots.txt does not allow it")

    def _rules_of(self, url: str) -> Callable[[str], bool]:
        """Return the function that says whether a URL of the site is allowed.

        As RFC 9309 requires, a site without a robots.txt allows everything, and one that fails allows nothing.
        """
        from protego import Protego

        try:
            text = self._read(url).decode("utf-8", errors="replace")
        except HTTPError as error:
            is_missing = 400 <= error.code < 500 and error.code != 429
            return lambda _: is_missing
        except FetchError as error:
            if error.error_class == "too_many_redirects":
                return lambda _: True
            cause = error

            def fail(_: str) -> bool:
                raise FetchError(cause.error_class, f"{url}: {cause.detail}")

            return fail
        rules = Protego.parse(text)
        return lambda target: all(rules.can_fetch(target, robot) for robot in sorted(ROBOTS - {"*"}))
