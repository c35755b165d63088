"""Rate limit per host, and the pauses that servers request with ``Retry-After``."""

import math
import threading
import time
from collections.abc import Callable, Collection
from email.utils import parsedate_to_datetime

from infra.download.limits import FetchError

PAUSE_STATUSES = frozenset({429, 503})
"""Statuses whose ``Retry-After`` is a request to pause."""


class HostPacer:
    """Times at which the next request to each host may start. Thread-safe."""

    def __init__(
        self,
        *,
        rate: float,
        max_wait_s: float,
        unlimited: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Set the limits.

        Args:
            rate: Requests per second to each host; 0 is unlimited.
            max_wait_s: Longest pause that is waited for; a host that requests a longer one is skipped until it ends.
            unlimited: ``host:port`` entries without a rate limit.
            clock: Clock in seconds.
            sleep: Function that sleeps for a number of seconds.
        """
        self._interval_s = 1 / rate if rate > 0 else 0.0
        self._max_wait_s = max_wait_s
        self._unlimited = frozenset(unlimited)
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next: dict[str, float] = {}  # by host: earliest time of the next request
        self._paused: dict[str, tuple[float, int]] = {}  # by host: end of the requested pause, and its status

    def wait(self, host: str) -> float:
        """Wait until a request to ``host:port`` may start, and return the seconds waited.

        Raises ``FetchError`` with the class ``http_429`` or ``http_503`` if the host requested too long a pause.
        """
        with self._lock:
            now = self._clock()
            paused_until, status = self._paused.get(host, (-math.inf, 0))
            if paused_until - now > self._max_wait_s:
                raise FetchError(f"http_{status}", f"{host} requested a pause of {paused_until - now:.0f} s more")
            start = max(now, self._next.get(host, now), paused_until)
            if self._interval_s and host not in self._unlimited:
                self._next[host] = start + self._interval_s
        if start > now:
            self._sleep(start - now)
        return start - now

    def pause(self, host: str, seconds: float, status: int) -> bool:
        """Pause all requests to ``host:port``; return True if the pause is short enough to wait for."""
        with self._lock:
            end = self._clock() + seconds
            if end > self._paused.get(host, (-math.inf, 0))[0]:
                self._paused[host] = (end, status)
        return seconds <= self._max_wait_s


def retry_after_s(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Return the seconds that a ``Retry-After`` header requests, or None without a valid header.

    Args:
        value: Value of the header: seconds, or an HTTP date.
        now: Clock in seconds since the epoch.
    """
    if value is None:
        return None
    value = value.strip()
    if value.isdecimal() and value.isascii():
        return float(value[:12])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now())
    except (ValueError, TypeError, OverflowError):
        return None
