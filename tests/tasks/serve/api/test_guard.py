"""Access: API keys, and requests that a web page of another site causes."""

import base64
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import WebSocketDisconnect
from support.fake_engine import FakeEngine
from support.served_app import client

from infra.errors import ConfigError
from tasks.serve.api.config import ApiConfig
from tasks.serve.api.keys import VARIABLE, Keys
from tasks.serve.playground.page import same_origin

FIRST, SECOND = "first-key-0123456789", "second-key-0123456789"
SEARCH: dict[str, Any] = {"json": {"text": "a"}}


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"])
def test_loopback_names_are_accepted(host: str) -> None:
    with client() as calls:
        assert calls.get("/v1/info", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.", ""])
def test_other_host_is_refused_on_loopback_without_keys(host: str) -> None:
    with client() as calls:
        response = calls.get("/v1/info", headers={"Host": host})
        assert (response.status_code, response.json()["code"]) == (421, "foreign_host")


def test_other_host_is_accepted_with_keys_or_behind_another_interface() -> None:
    host = {"Host": "service.example"}
    with client(keys=Keys([FIRST])) as calls:
        assert calls.get("/v1/info", headers=host | {"X-API-Key": FIRST}).status_code == 200
    with client(host="0.0.0.0", allow_anonymous=True) as calls:  # noqa: S104
        assert calls.get("/v1/info", headers=host).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "https://localhost.evil.example", "http://["]
)
def test_request_of_a_foreign_page_is_refused(origin: str) -> None:
    with client() as calls:
        headers = {"Origin": origin}
        for refused in (
            calls.post("/v1/search", headers=headers, **SEARCH),
            calls.post("/v1/databases/birds/swap", headers=headers),
            calls.delete("/v1/jobs/a", headers=headers),
        ):
            assert (refused.status_code, refused.json()["code"]) == (403, "foreign_origin")
        assert calls.get("/v1/info", headers=headers).status_code == 200
        with pytest.raises(WebSocketDisconnect), calls.websocket_connect("/any", headers=headers):
            pass


@pytest.mark.parametrize(
    ("origin", "expected"),
    [("http://localhost:8000", True), ("http://evil.example", False), ("null", False), ("http://[", False)],
)
def test_same_origin_of_the_websocket_of_the_page(origin: str, expected: bool) -> None:
    assert same_origin(origin, {"HTTP_HOST": "localhost:8000"}) is expected


def test_request_of_the_own_page_is_accepted() -> None:
    with client() as calls:
        headers = {"Host": "localhost:8000", "Origin": "http://localhost:8000"}
        assert calls.post("/v1/search", headers=headers, **SEARCH).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {FIRST}"},
        {"Authorization": f"bearer {SECOND}"},
        {"X-API-Key": SECOND},
        {"Authorization": "Basic " + base64.b64encode(f"any:{FIRST}".encode()).decode()},
    ],
)
def test_each_key_is_accepted_in_each_header(headers: dict[str, str]) -> None:
    with client(keys=Keys([FIRST, SECOND])) as calls:
        assert calls.post("/v1/search", headers=headers, **SEARCH).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {FIRST[:-1]}"},
        {"Authorization": FIRST},
        {"Authorization": "Basic !"},
        {"Authorization": "Bearer "},
        {"X-API-Key": FIRST + "x"},
        {"X-API-Key": b"\xff\x00\xe9"},
        {"X-API-Key": "unknown", "Authorization": "Bearer unknown"},
    ],
)
def test_request_without_an_accepted_key_is_refused(headers: dict[str, Any]) -> None:
    with client(keys=Keys([FIRST, SECOND])) as calls:
        for path in ("/v1/info", "/metrics", "/openapi.json", "/", "/v1/jobs/a"):
            response = calls.get(path, headers=headers)
            assert (response.status_code, response.json()["code"]) == (401, "invalid_api_key")
            assert response.headers["WWW-Authenticate"] == "Bearer"
        assert calls.get("/v1/models", headers=headers).json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(WebSocketDisconnect), calls.websocket_connect("/any", headers=headers):
            pass
        assert calls.get("/livez").status_code == calls.get("/readyz").status_code == 200


def test_readyz_names_problems_only_to_clients_with_a_key() -> None:
    engine = FakeEngine()
    with client(engine, keys=Keys([FIRST])) as calls:
        engine.report("birds does not open")
        assert calls.get("/readyz").json() == {"ready": True}
        assert calls.get("/readyz", headers={"X-API-Key": SECOND}).json() == {"ready": True}
        assert calls.get("/readyz", headers={"X-API-Key": FIRST}).json()["problems"] == ["birds does not open"]


def test_browser_is_asked_for_a_password() -> None:
    with client(keys=Keys([FIRST])) as calls:
        response = calls.get("/", headers={"Accept": "text/html,*/*"})
        assert response.headers["WWW-Authenticate"].startswith("Basic ")


def test_keys_are_read_from_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the page\n{SECOND}  # until May\n\n")
    monkeypatch.setenv(VARIABLE, f"{FIRST}, another-key-0123456789")
    keys = Keys.read(file)
    assert len(keys) == 3
    assert keys.accept(FIRST.encode())
    assert keys.accept(SECOND.encode())
    assert not keys.accept(b"")
    assert FIRST not in repr(keys)
    assert FIRST not in repr(ApiConfig(keys=keys))


@pytest.mark.parametrize("content", ["", "# none\n", "short\n", None])
def test_unusable_key_file_is_refused(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="API key"):
        Keys.read(file)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "service.example", ""])  # noqa: S104
def test_other_interface_requires_keys_or_a_flag(host: str) -> None:
    with pytest.raises(ConfigError, match="--allow-anonymous"):
        ApiConfig(host=host)
    assert ApiConfig(host=host, keys=Keys([FIRST])).hosts is None
    assert ApiConfig(host=host, allow_anonymous=True).hosts is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1", "[::1]"])
def test_loopback_requires_no_key(host: str) -> None:
    assert ApiConfig(host=host).is_loopback
