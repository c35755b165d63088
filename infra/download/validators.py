"""Validators of HTTP responses, with which a later request asks only for a changed body (RFC 9110, section 13)."""

from collections.abc import Mapping
from dataclasses import dataclass

MAX_CHARS = 256
"""Longest validator that is stored; longer ones are ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validators:
    """``ETag`` and ``Last-Modified`` of a response, each None if it had none."""

    etag: str | None = None
    last_modified: str | None = None

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> "Validators":
        """Return the validators in response headers."""
        values = {"etag": headers.get("ETag"), "last_modified": headers.get("Last-Modified")}
        return cls(**{name: value for name, value in values.items() if value and len(value) <= MAX_CHARS})

    def request_headers(self) -> dict[str, str]:
        """Return the headers of a request that is answered with 304 if the body has not changed."""
        headers = {"If-None-Match": self.etag, "If-Modified-Since": self.last_modified}
        return {name: value for name, value in headers.items() if value}
