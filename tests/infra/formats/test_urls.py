"""The normal form of URLs, alone and in columns."""

import pyarrow as pa
import pytest

from infra.formats.urls import normal_urls
from infra.uris import normal_url

VARIANTS = {
    "https://host.example/a/b.png?q=1": [
        " https://host.example/a/b.png?q=1\t",
        "HTTPS://Host.Example/a/b.png?q=1",
        "https://host.example:443/a/b.png?q=1",
        "https://host.example:/a/b.png?q=1",
        "https://host.example/a/b.png?q=1#top",
        "https://host.example/%61/b%2Epng?q=%31",
        "https://host.example/x/.././a/b.png?q=1",
        "https://host.example/%2e/a/b.png?q=1",
        "https://host.example/a/\nb.png?q=1",
    ],
    "http://host/%C3%A4%20b%2F?q=%C3%BC&x=%25zz": [
        "http://host/ä b%2f?q=ü&x=%zz",
        "http://host:80/%c3%a4%20b%2f?q=%c3%bc&x=%25zz",
    ],
    "http://host/": ["http://host", "http://host?", "http://host/#", "http://host/..", "http://host/a/.."],
    "https://xn--bcher-kva.example/a": ["https://Bücher.example/a", "https://xn--bcher-kva.EXAMPLE/a"],
    "https://user:Word@host/a": ["https://user:Word@HOST/a"],
    "http://[::1]:8123/a": ["http://[::1]:8123/a#b"],
}
DIFFERENT = [
    "http://host/a", "https://host/a", "http://host:8080/a", "http://host/A", "http://host/a/",
    "http://host/a?b", "http://host/a%2Fb", "http://host/a/b", "http://host//a", "http://host/a+b", "http://host/a%20b",
    "http://host/a%2Bb", "http://other/a", "http://user@host/a",
]  # fmt: skip


@pytest.mark.parametrize("normal", VARIANTS)
def test_normal_url_of_every_variant_is_the_same(normal: str) -> None:
    assert {normal_url(variant) for variant in [normal, *VARIANTS[normal]]} == {normal}


def test_normal_url_keeps_different_urls_apart_and_is_idempotent() -> None:
    found = [normal_url(url) for url in DIFFERENT]
    assert len(set(found)) == len(DIFFERENT)
    assert [normal_url(url) for url in found] == found


@pytest.mark.parametrize(
    "text", ["", "data:image/png;base64,AA==", "a/b.png", "http://", "http://h:x/a", "http://[::1/a"]
)
def test_normal_url_of_other_text_only_strips(text: str) -> None:
    assert normal_url(f" {text} ") == text


def test_normal_urls_of_a_column_agree_with_single_urls() -> None:
    listed = [None, "", *DIFFERENT, *VARIANTS, *(variant for variants in VARIANTS.values() for variant in variants)]
    expected = [None if url is None else normal_url(url) for url in listed]
    for column in (pa.array(listed), pa.array(listed, pa.large_string()), pa.chunked_array([listed[:5], listed[5:]])):
        assert normal_urls(column).to_pylist() == expected
