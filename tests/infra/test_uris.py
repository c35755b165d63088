"""Tests of URIs and of the secrets that they contain."""

import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest

from infra import storage, uris
from infra.errors import InputError

SIGNED = "https://host/list.csv?X-Amz-Date=20260101&X-Amz-Signature=0123456789abcdef&X-Amz-Expires=60"
GUARDED = "postgresql://keeper:hunter2@db.internal:5432/mlflow"


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(uris, "_secrets", {})
    monkeypatch.setattr(uris, "_words", set())
    yield


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (GUARDED, "postgresql://keeper:***@db.internal:5432/mlflow"),
        ("https://u:p@host/path?query=1#part", "https://u:***@host/path?query=1#part"),
        ("postgresql+psycopg2://u:p%40ss@host/db", "postgresql+psycopg2://u:***@host/db"),
        ("postgresql://u:p@ss:w@host/db", "postgresql://u:***@host/db"),
        ("https://same:same@same/same:same@", "https://same:***@same/same:same@"),
        ("https://u:p@[::1]:5000/", "https://u:***@[::1]:5000/"),
        ("https://h/a?sig=x&b=1", "https://h/a?sig=***&b=1"),
        ("https://h/a?b=1&X-Amz-Credential=A%2FB&Signature=s", "https://h/a?b=1&X-Amz-Credential=***&Signature=***"),
        ("https://h/a?AWSAccessKeyId=A&token=t", "https://h/a?AWSAccessKeyId=***&token=***"),
        ("https://h/a?access_token=t&key=k", "https://h/a?access_token=***&key=***"),
    ],
)
def test_hide_replaces_secrets_and_reveal_restores_them(uri: str, shown: str) -> None:
    assert uris.masked(uri) == shown
    assert uris.hide(uri) == shown
    assert uris.hide(shown) == shown
    assert uris.reveal(shown) == uri


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:////data/mlflow.db",
        "https://host:5000/a@b",
        "https://user@host/",
        "/data/a:b@c",
        "/data/list?key=1.csv",
        "models:/a@champion",
        "https://host/a?design=1&monkey=2",
    ],
)
def test_hide_of_a_uri_without_secrets_returns_it(uri: str) -> None:
    assert uris.hide(uri) == uri
    assert uris.secrets() == {}


def test_reveal_of_a_uri_below_a_hidden_uri_restores_the_password() -> None:
    root = uris.hide("ftp://keeper:secret@host/root")
    assert (
        uris.reveal(uris.join(root, "shapes", "manifest.json")) == "ftp://keeper:secret@host/root/shapes/manifest.json"
    )


def test_reveal_without_the_secret_raises_input_error() -> None:
    with pytest.raises(InputError, match=r"^the password or signature of https://u:\*\*\*@host/a is not stored; give"):
        uris.reveal("https://u:***@host/a")


def test_masked_replaces_a_long_secret_anywhere_in_a_message() -> None:
    hidden = uris.hide("https://u:long%40password@host/list.csv")
    message = f"401 for long@password, long%40password, {hidden}: denied"
    assert uris.masked(message) == "401 for ***, ***, https://u:***@host/list.csv: denied"


def test_learn_in_another_process_reveals_and_masks_secrets() -> None:
    hidden = uris.hide(SIGNED)
    code = (
        "import pickle, sys; from infra import uris; uris.learn(pickle.loads(sys.stdin.buffer.read())); "
        f"print(uris.reveal({hidden!r}), uris.masked('0123456789abcdef'))"
    )
    data = pickle.dumps(uris.secrets())
    output = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True).stdout.decode()
    assert output.split() == [SIGNED, "***"]


@pytest.mark.parametrize(
    "uri",
    [
        "http://u:correct-horse@127.0.0.1:1/list.csv",
        "http://127.0.0.1:1/list.csv?sig=correct-horse",
        "nonsense://u:correct-horse@host/list.csv",
    ],
)
def test_storage_errors_do_not_contain_secrets(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.storage.errors.RETRY_DELAYS_S", ())
    for given in (uri, uris.hide(uri)):
        with pytest.raises(Exception) as caught:
            storage.read_bytes(given)
        assert "correct-horse" not in str(caught.value)
        assert "***" in str(caught.value)
        assert caught.value.__cause__ is None, "a traceback would show the URI of the cause"
