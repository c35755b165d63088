"""Folder of a domain."""

import dataclasses
from pathlib import Path
from typing import Self

from infra import storage
from infra.settings import Settings


def _default_cache() -> Path:
    return Settings().cache_folder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DomainFolder:
    """Folder of a domain's artifacts, and the local cache of files that its stages read.

    Attributes:
        uri: Folder of the domain, ``<root>/<domain>``. An artifact goes to ``<uri>/<kind>/<key>``.
        cache: Local folder of the file cache. Default: the cache of the settings from the environment.
    """

    uri: str
    cache: Path = dataclasses.field(default_factory=_default_cache)

    @classmethod
    def of(cls, settings: Settings, domain: str) -> Self:
        """Return the folder of ``domain`` below the root of ``settings``."""
        return cls(uri=storage.join(storage.absolute(settings.root), domain), cache=settings.cache_folder)
