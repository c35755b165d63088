import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from itertools import pairwise
from typing import Any
from urllib.error import HTTPError

import pytest
from support.fakes import FakeClock, LoopbackServer, Reply
from support.odd_server import IMAGE, OddServer

from infra.download.limits import FetchError, Limits
from infra.download.pacing import HostPacer, retry_after_s
from infra.download.safe_urlopen import guarded
from tasks.download.config import DownloadConfig

TLS = ssl.create_default_context()  # slow to build: once for all tests


@contextmanager
def guard(server: LoopbackServer, clock: FakeClock, **changes: Any) -> Iterator[None]:
    bounds = {"max_body_bytes": 10_000, "deadline_s": 5.0, "timeout_s": 2.0, "max_redirects": 3}
    limits = Limits(**{"allow_hosts": (server.host,), **bounds, **changes})
    with guarded(limits, tls=TLS, clock=clock, sleep=clock.sleep):
        yield


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url) as response:
        return bytes(response.read())


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *[("120", 120.0), (" 0 ", 0.0), ("9" * 5000, 999_999_999_999.0), ("-1", None), ("1.5", None), ("soon", None)],
        (format_datetime(datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC), usegmt=True), 30.0),
        (format_datetime(datetime(2025, 12, 31, 23, 59, tzinfo=UTC), usegmt=True), 0.0),
        ("Thursday, 01-Jan-26 00:00:10 GMT", 10.0),
        (None, None),
    ],
)
def test_retry_after_s_reads_seconds_and_dates(value: str | None, seconds: float | None) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    assert retry_after_s(value, lambda: now) == seconds


@pytest.mark.parametrize("status", [429, 503])
def test_urlopen_waits_for_retry_after_and_requests_the_url_again(status: int) -> None:
    clock = FakeClock()
    with OddServer() as server, guard(server, clock, deadline_s=1.0):
        assert fetch(server.url(f"/pause/{status}")) == IMAGE
        assert server.requests == [f"/pause/{status}"] * 2
    assert clock.pauses == [2.0], "the pause does not count against the deadline"


def test_urlopen_pause_applies_to_all_urls_of_the_host() -> None:
    clock = FakeClock()
    with OddServer({"/busy": Reply(status=503, headers={"Retry-After": "7"})}) as server, guard(server, clock):
        with pytest.raises(HTTPError, match="503"):
            fetch(server.url("/busy"))
        assert server.requests == ["/busy"] * 4, "three pauses, then the error counts"
        assert fetch(server.url("/image")) == IMAGE
    assert clock.pauses == [7.0] * 4


def test_urlopen_pause_above_the_limit_skips_the_host_until_it_ends() -> None:
    clock = FakeClock()
    with OddServer({"/busy": Reply(status=429, headers={"Retry-After": "3600"})}) as server, guard(server, clock):
        with pytest.raises(HTTPError, match="429"):
            fetch(server.url("/busy"))
        with pytest.raises(FetchError, match=r"http_429: .* requested a pause of 3600 s more"):
            fetch(server.url("/image"))
        assert server.requests == ["/busy"]
        clock.now += 3599
        assert fetch(server.url("/image")) == IMAGE
    assert clock.pauses == [1.0]


def test_urlopen_status_without_retry_after_fails_at_once() -> None:
    clock = FakeClock()
    replies = {"/a": Reply(status=503), "/b": Reply(status=404, headers={"Retry-After": "5"})}
    with OddServer(replies) as server, guard(server, clock):
        for path in replies:
            with pytest.raises(HTTPError):
                fetch(server.url(path))
    assert clock.pauses == []
    assert len(server.requests) == 2


def test_host_pacer_keeps_the_rate_of_each_host() -> None:
    clock = FakeClock()
    pacer = HostPacer(rate=4.0, max_wait_s=60.0, unlimited=["mine:80"], clock=clock, sleep=clock.sleep)
    starts = []
    for _ in range(4):
        pacer.wait("a:80")
        starts.append(clock.now)
        assert pacer.wait("mine:80") == 0.0
    assert [after - before for before, after in pairwise(starts)] == [0.25] * 3
    assert pacer.wait("b:80") == 0.0
    clock.now += 100
    assert pacer.wait("a:80") == 0.0


def test_urlopen_host_rate_applies_except_to_allowed_hosts() -> None:
    clock = FakeClock()
    with OddServer() as server, guard(server, clock, host_rate=2.0):
        for _ in range(3):
            fetch(server.url("/image"))
        assert clock.pauses == []
        for _ in range(3):
            with pytest.raises(FetchError, match="blocked_address"):
                fetch("http://127.0.0.2/")
    assert clock.pauses == [0.5, 0.5]


def test_download_config_workers_share_the_host_rate() -> None:
    config = DownloadConfig(workers=4).with_policy(host_rate=8.0)
    assert config.worker_policy().host_rate == 2.0


ROBOTS = b"""User-agent: *
Disallow: /private
Disallow: /*.gif$
User-agent: img2dataset
Disallow: /for-others
"""


def test_urlopen_robots_txt_is_read_once_and_respected() -> None:
    replies = {f"/{name}": Reply(body=IMAGE) for name in ("private", "for-others", "a.gif", "a.gif?x")}
    replies |= {"/robots.txt": Reply(body=ROBOTS), "/out": Reply.redirect("/private")}
    with OddServer(replies) as server:
        with guard(server, FakeClock(), robots_txt=True):
            assert fetch(server.url("/image")) == fetch(server.url("/a.gif?x")) == IMAGE
            for path in ("/private", "/a.gif", "/for-others", "/out"):
                with pytest.raises(FetchError, match=r"robots_disallowed: .*robots\.txt does not allow it"):
                    fetch(server.url(path))
            assert server.requests == ["/robots.txt", "/image", "/a.gif?x", "/out"]
        with guard(server, FakeClock()):
            assert fetch(server.url("/private")) == IMAGE


@pytest.mark.parametrize(
    ("reply", "allowed"),
    [
        (Reply(status=404), True),
        (Reply(status=403), True),
        (Reply(status=500), False),
        (Reply(body=b"", raw=True), False),
        (Reply.redirect("/rules"), False),
        (Reply.redirect("/robots.txt"), True),
        (Reply(body=b"\xff\xfe<html>"), True),
        (Reply(body=b"User-agent: *\nAllow: /\n" + b"# more\n" * 100_000 + b"Disallow: /\n"), True),
    ],
    ids=["missing", "forbidden", "failing", "closed", "redirected", "too many redirects", "not rules", "long"],
)
def test_urlopen_unusual_robots_txt_follows_rfc_9309(reply: Reply, allowed: bool) -> None:
    rules = Reply(body=b"User-agent: *\nDisallow: /image\n")
    clock = FakeClock()
    with (
        OddServer({"/robots.txt": reply, "/rules": rules}) as server,
        guard(server, clock, robots_txt=True, max_body_bytes=10**6),
    ):
        if allowed:
            assert fetch(server.url("/image")) == IMAGE
        else:
            with pytest.raises(FetchError, match=r"robots\.txt"):
                fetch(server.url("/image"))
            assert "/image" not in server.requests
