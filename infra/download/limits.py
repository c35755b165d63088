"""Limits on the download of one URL, the deadline that enforces them, and the error that reports a violation."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from infra.errors import KNNDiffusionError


class FetchError(KNNDiffusionError):
    """Raised when a URL cannot be fetched. ``error_class`` is stable; ``str()`` is ``error_class: detail``."""

    def __init__(self, error_class: str, detail: str) -> None:
        """Set the snake_case ``error_class``; ``detail`` says what happened and how to fix it."""
        super().__init__(error_class, detail)
        self.error_class = error_class
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.error_class}: {self.detail}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Hosts, sizes and times that the URL guard allows."""

    allow_hosts: tuple[str, ...]  # "host:port" entries, in lower case, whose addresses need not be public
    max_body_bytes: int
    deadline_s: float  # for one URL, including its redirects and its body
    timeout_s: float  # for one socket operation, unless the caller of urlopen gives a timeout
    max_redirects: int
    respect_robots_tag: bool = True  # reject responses, including redirects, whose X-Robots-Tag forbids the use
    user_agent: str | None = None  # None: this project's, see infra.download.user_agent
    host_rate: float = 10.0  # requests per second to one host that is not in allow_hosts; 0: unlimited
    max_pause_s: float = 60.0  # longest Retry-After that is waited for
    robots_txt: bool = False  # request only what the robots.txt of its site allows


class Deadline:
    """Deadline of one URL. Each socket operation gets the smaller of its own timeout and the time left."""

    def __init__(self, deadline_s: float, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start now by ``clock``: ``deadline_s`` seconds in total, ``timeout_s`` for one operation."""
        self.timeout_s = timeout_s
        self._deadline_s = deadline_s
        self._clock = clock
        self._end = clock() + deadline_s

    def extend(self, seconds: float) -> None:
        """Move the deadline, by the time in which the URL could do nothing but wait."""
        self._end += seconds

    def allowance_s(self) -> float:
        """Return the seconds that the next operation may take. Raises ``FetchError`` if the deadline has passed."""
        left = self._end - self._clock()
        if left <= 0:
            raise FetchError("deadline_exceeded", f"not complete after deadline_s={self._deadline_s:g}")
        return min(left, self.timeout_s)
