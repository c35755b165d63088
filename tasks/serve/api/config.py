"""Configuration of the HTTP API: who may call it, and how large and how slow a request may be."""

import dataclasses
import ipaddress
from collections.abc import Iterable

from infra.errors import ConfigError
from tasks.serve.api.keys import VARIABLE, Keys, presented_key


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ApiConfig:
    """Access and limits of the HTTP API."""

    host: str = "127.0.0.1"  # interface that the server binds; another one than loopback requires keys
    keys: Keys = dataclasses.field(default_factory=Keys)  # accepted API keys; none: every request is accepted
    allow_anonymous: bool = False  # accept requests without a key on every interface
    max_body_bytes: int = 32 * 2**20  # longest body; a longer one is answered with 413
    max_bodies_bytes: int = 512 * 2**20  # bodies of all requests in progress; a further one is answered with 429
    body_timeout_s: float = 30.0  # time for a client to send a body; a slower one is answered with 408
    drain_s: float = 30.0  # time for accepted requests to finish after SIGTERM
    max_requests: int = 1_000  # requests at the same time, probes excluded; a further one is answered with 429

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` if strangers could reach the service, or if a limit is not positive."""
        if not (self.is_loopback or self.keys or self.allow_anonymous):
            raise ConfigError(
                f"--host is reachable by others: {self.host}; set {VARIABLE} or --keys-file, or add --allow-anonymous"
            )
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ConfigError(f"max_bodies_bytes is too small: {self.max_bodies_bytes}; give at least max_body_bytes")
        if min(self.max_body_bytes, self.body_timeout_s, self.drain_s, self.max_requests) <= 0:
            raise ConfigError("a limit of the API is not positive; give a number above 0")

    def accepts(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Return True if a request with ``headers`` has an accepted key, or needs none."""
        if not self.keys:
            return True
        given = presented_key(headers)
        return given is not None and self.keys.accept(given)

    @property
    def is_loopback(self) -> bool:
        """True if only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> frozenset[str] | None:
        """Accepted names in the Host header; None accepts every name.

        On loopback without keys, a web page could otherwise point a name of its own at this machine (DNS rebinding).
        """
        if self.keys or not self.is_loopback:
            return None
        return frozenset({"localhost", "127.0.0.1", "[::1]", self.host.lower()})
