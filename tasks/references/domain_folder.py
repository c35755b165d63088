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
    """Where the stages of a domain write their artifacts, and where they cache what they read.

    Attributes:
        uri: Folder of the domain, ``<root>/<domain>``. An artifact goes to ``<uri>/<kind>/<key>``.
        cache: Local folder of the file cache. Default: that of the environment's settings.
    """

    uri: str
    cache: Path = dataclasses.field(default_factory=_default_cache)

    @classmethod
    def of(cls, settings: Settings, domain: str) -> Self:
        """Return the folder of ``domain`` below the root of ``settings``."""
        return cls(uri=storage.join(storage.absolute(settings.root), domain), cache=settings.cache_folder)
