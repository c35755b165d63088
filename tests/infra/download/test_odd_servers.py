"""Downloads from servers that are unusual but not hostile."""

import base64
import re
import ssl
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.fakes import LoopbackServer, Reply
from support.odd_server import BOMB_BYTES, BOMBS, DAMAGED, ENCODED, IMAGE, OddServer

from infra.download.downloader import DownloadPolicy, download_shard
from infra.download.limits import FetchError, Limits
from infra.download.safe_urlopen import guarded
from infra.download.user_agent import default_user_agent

TLS = ssl.create_default_context()  # slow to build: once for all tests
Fetch = Callable[..., bytes]


@pytest.fixture(scope="module")
def server() -> Iterator[OddServer]:
    with OddServer() as running:
        yield running


@pytest.fixture
def fetch(server: OddServer) -> Fetch:
    def fetch_path(path: str, max_body_bytes: int = 1000, **changes: Any) -> bytes:
        limits = Limits(
            allow_hosts=(server.host,),
            max_body_bytes=max_body_bytes,
            deadline_s=5.0,
            timeout_s=2.0,
            max_redirects=3,
            **changes,
        )
        url = path if ":" in path else server.url(path)
        with guarded(limits, tls=TLS), urllib.request.urlopen(url) as response:
            return bytes(response.read())

    return fetch_path


@pytest.mark.parametrize("number", range(len(ENCODED)), ids=list(ENCODED))
def test_urlopen_encoded_body_is_decoded(number: int, fetch: Fetch) -> None:
    assert fetch(f"/encoded/{number}") == IMAGE


@pytest.mark.parametrize("number", range(len(DAMAGED)), ids=list(DAMAGED))
def test_urlopen_undecodable_body_is_connection_error(number: int, fetch: Fetch) -> None:
    with pytest.raises(FetchError, match=r"the body is not valid|Content-Encoding is not supported") as caught:
        fetch(f"/damaged/{number}")
    assert caught.value.error_class == "connection_error"


@pytest.mark.parametrize("number", range(len(BOMBS)), ids=list(BOMBS))
def test_urlopen_small_body_that_decodes_to_a_large_one_is_refused(number: int, fetch: Fetch) -> None:
    limit = BOMB_BYTES // 2
    assert len(list(BOMBS.values())[number]) < limit
    with pytest.raises(FetchError, match=f"body_too_large: more than max_body_bytes={limit}"):
        fetch(f"/bomb/{number}", limit)


def test_urlopen_limit_on_the_decoded_body_is_exact(fetch: Fetch) -> None:
    assert fetch("/encoded/0", len(IMAGE)) == IMAGE
    with pytest.raises(FetchError, match="body_too_large"):
        fetch("/encoded/0", len(IMAGE) - 1)


def test_urlopen_interim_responses_are_skipped(fetch: Fetch) -> None:
    assert fetch("/interim") == IMAGE


def test_urlopen_cookies_are_kept_within_a_redirect_chain(server: OddServer, fetch: Fetch) -> None:
    server.headers.clear()
    assert fetch("/cookie") == IMAGE
    assert [headers.get("Cookie") for headers in server.headers] == [None, "a=1", "a=1; b=2; c=caf\xe9"]
    assert fetch("/image") == IMAGE
    assert server.headers[-1].get("Cookie") is None, "the next URL starts without cookies"


def test_urlopen_cookies_are_not_sent_to_another_host() -> None:
    with LoopbackServer({"/image": Reply(body=IMAGE)}) as other:
        target = f"http://localhost:{other.port}/image"
        replies = {"/": Reply(status=302, headers={"Location": target, "Set-Cookie": "a=1; Path=/"})}
        with LoopbackServer(replies) as server:
            allowed = (server.host, f"localhost:{other.port}")
            limits = Limits(allow_hosts=allowed, max_body_bytes=1000, deadline_s=5.0, timeout_s=2.0, max_redirects=3)
            with guarded(limits, tls=TLS), urllib.request.urlopen(server.url("/")) as response:
                assert response.read() == IMAGE
        assert other.headers[0].get("Cookie") is None


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + base64.b64encode(IMAGE).decode(),
        "DATA:image/png;name=a.png;base64," + base64.b64encode(IMAGE).decode().rstrip("="),
        "data:image/png;base64," + base64.encodebytes(IMAGE).decode().replace("\n", "%0A"),
        "data:," + IMAGE.decode(),
        " data:;charset=utf-8," + "".join(f"%{byte:02x}" for byte in IMAGE),
    ],
    ids=["base64", "without padding", "with line breaks", "plain", "percent-encoded"],
)
def test_urlopen_data_url_is_decoded_within_the_limit(url: str, fetch: Fetch) -> None:
    assert fetch(url, len(IMAGE)) == IMAGE
    with pytest.raises(FetchError, match="body_too_large"):
        fetch(url, len(IMAGE) - 1)


@pytest.mark.parametrize("url", ["data:image/png;base64", "data:image/png;base64,a"])
def test_urlopen_malformed_data_url_is_invalid_url(url: str, fetch: Fetch) -> None:
    with pytest.raises(FetchError, match="invalid_url"):
        fetch(url)


def test_urlopen_sends_the_user_agent_of_this_project_or_the_configured_one(server: OddServer, fetch: Fetch) -> None:
    server.headers.clear()
    fetch("/image")
    fetch("/image", user_agent="birds/1.0 (+mailto:me@example.org)")
    sent = [headers["User-Agent"] for headers in server.headers]
    assert sent == [default_user_agent(), "birds/1.0 (+mailto:me@example.org)"]
    assert re.fullmatch(r"knn-diffusion/[\d.]+ \(\+https://\S+\)", default_user_agent())


def test_download_shard_sends_its_own_user_agent_and_prints_nothing_for_odd_urls(
    server: OddServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.headers.clear()
    urls = [server.url("/image"), "http://exa mple.com/a", "http://[::1/", "http://a\x7fb/", "data:,x"]
    policy = DownloadPolicy(allow_hosts=(server.host,), retries=0, threads=2, user_agent="birds/1.0")
    download_shard(0, pa.table({"url": urls}), tmp_path, policy)
    classes = pq.read_table(tmp_path / "00000.parquet")["error_class"].to_pylist()
    assert classes == ["not_an_image", "invalid_url", "invalid_url", "invalid_url", "not_an_image"]
    assert {headers["User-Agent"] for headers in server.headers} == {"birds/1.0"}
    assert "Exception ignored" not in capfd.readouterr().err


@pytest.mark.parametrize("value", ["", " ", "a\r\nb", "é", "x" * 201, " padded"])
def test_download_policy_invalid_user_agent_raises_value_error(value: str) -> None:
    with pytest.raises(ValueError, match="user_agent is not 1 to 200 printable ASCII characters"):
        DownloadPolicy(user_agent=value)
