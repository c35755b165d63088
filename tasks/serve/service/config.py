"""Configuration of the service, apart from HTTP."""

import dataclasses
import math

from infra import uris
from infra.errors import ConfigError

_COUNTS = ("image_queue", "search_queue", "search_batch", "kept_jobs")
_SECONDS = ("poll_s", "batch_wait_s", "max_wait_s")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig:
    """Models and databases to serve, and the limits of the queues.

    Attributes:
        model: Generator: short name, ``models:/`` URI, folder or bundled name. A short name or an alias is followed
            when it moves. Default: ``knn-diffusion``, or the bundled generator while that has no champion.
        databases: Short names (their champion), ``models:/`` URIs or folders; the first is the default of a request.
            Default: all registered databases of the generator's encoder that have a champion.
        device: Device of the networks: cpu, cuda, cuda:0 or mps. Default: cpu.
        trust: Treat folders outside of the root like those below it; see SECURITY.md. Default: False.
        image_queue: Maximum number of waiting generations and edits. Default: 64.
        search_queue: Maximum number of waiting searches. Default: 1024.
        image_batch: Maximum number of images in a batch, candidates included; a larger request is a batch of its own.
            Default: 8 on a CPU, 64 on a GPU.
        search_batch: Maximum number of searches in a batch. Default: 64.
        batch_wait_s: Seconds to wait for further images before a batch that is not full. Default: 0.005.
        max_wait_s: Seconds in the queue after which a request is rejected. Default: 300.
        poll_s: Seconds between two looks at the registry and at the takedowns. Default: 15.
        kept_jobs: How many jobs of each kind (search, generate, edit) are kept for look-up. Default: 250.
    """

    model: str | None = None
    databases: tuple[str, ...] = ()
    device: str = "cpu"
    trust: bool = False
    image_queue: int = 64
    search_queue: int = 1024
    image_batch: int | None = None
    search_batch: int = 64
    batch_wait_s: float = 0.005
    max_wait_s: float = 300.0
    poll_s: float = 15.0
    kept_jobs: int = 250

    def __post_init__(self) -> None:
        """Validate the fields."""
        object.__setattr__(self, "databases", tuple(uris.hide(one) for one in self.databases))
        for name in (*_COUNTS, *(() if self.image_batch is None else ("image_batch",))):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is out of range: {getattr(self, name)}; give at least 1")
        for name in _SECONDS:
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is out of range: {getattr(self, name)}; give a finite number, at least 0")
        if self.poll_s == 0:
            raise ConfigError("poll_s is out of range: 0; give a number of seconds above 0")
        if repeated := {name for name in self.databases if self.databases.count(name) > 1}:
            raise ConfigError(f"database is given twice: {min(repeated)}; give each once")

    @property
    def images_at_once(self) -> int:
        """Maximum number of images in a batch."""
        return self.image_batch or (8 if self.device == "cpu" else 64)
