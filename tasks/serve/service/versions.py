"""Versions of databases and of the generator in the registry: list and open them."""

import dataclasses
import re
from pathlib import PurePath
from typing import Any, Protocol

from infra.errors import NotFoundError, TransientError
from infra.registry import Registry
from infra.registry_tags import CHAMPION, DATABASE_PREFIX, GENERATOR_NAME, full_name
from infra.settings import Settings
from infra.tracking import is_created
from model.pipeline import KNNDiffusionPipeline
from model.saved_generator import BUNDLED_GENERATOR, BUNDLED_GENERATORS
from tasks.references.trust import open_named
from tasks.references.types import DatabaseVersion
from tasks.serve.load import locate_generator
from tasks.serve.service.generator import OpenModel
from tasks.serve.service.served import OpenDatabase

_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>.+)|/(?P<version>\d+))")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Followed:
    """Target of a reference: a registered name, and the alias that is followed or the version that is fixed.

    ``name`` is None for a folder and for a bundled generator.
    """

    reference: str
    name: str | None
    alias: str | None = None
    version: int | None = None

    @classmethod
    def parse(cls, reference: str, kind: str) -> "Followed":
        """Parse a short name, a ``models:/`` URI or a folder."""
        if match := _URI.fullmatch(reference):
            version = match["version"]
            return cls(
                reference=reference,
                name=match["name"].removeprefix(DATABASE_PREFIX),
                alias=match["alias"],
                version=None if version is None else int(version),
            )
        if "/" in reference or (kind == "generator" and reference in BUNDLED_GENERATORS):
            return cls(reference=reference, name=None)
        return cls(reference=reference, name=reference.removeprefix(DATABASE_PREFIX), alias=CHAMPION)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Registered versions: those of each database by short name, and those of generators.

    A version is a dict with version, aliases, tags and ``created_ms``, as :meth:`infra.registry.Registry.versions`.
    """

    databases: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    generators: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def target(self, kind: str, followed: Followed) -> int | None:
        """Return the version that a reference names now, or None."""
        found = (self.databases if kind == "database" else self.generators).get(followed.name or "", [])
        if followed.alias is None:
            return followed.version
        return next((entry["version"] for entry in found if followed.alias in entry["aliases"]), None)


class Versions(Protocol):
    """Source of versions; see :class:`RegisteredVersions`."""

    def listing(self) -> Listing:
        """Return what is registered. Raises ``TransientError`` if the registry does not answer or is gone."""
        ...

    def open_database(self, followed: Followed, version: int | None, generation: int) -> OpenDatabase:
        """Open and verify a version of a database. Raises ``KNNDiffusionError`` or ``ModelError``."""
        ...

    def open_model(self, followed: Followed, version: int | None, generation: int) -> OpenModel:
        """Open a version of the generator. Raises ``KNNDiffusionError`` or ``ModelError``."""
        ...


class RegisteredVersions:
    """The versions in the registry of the settings, and folders."""

    def __init__(self, settings: Settings, *, device: str = "cpu", trust: bool = False) -> None:
        """Store the settings; ``device`` is that of the networks."""
        self._settings, self._device, self._trust = settings, device, trust
        self._existed = False

    def listing(self) -> Listing:
        """Return what is registered."""
        if not is_created(self._settings):
            if self._existed:
                raise TransientError("the registry has disappeared; restore it")
            return Listing()
        self._existed, registry = True, Registry(self._settings)
        databases: dict[str, list[dict[str, Any]]] = {}
        for entry in registry.versions("database"):
            databases.setdefault(str(entry["name"]).removeprefix(DATABASE_PREFIX), []).append(entry)
        generators = registry.versions("generator")
        return Listing(databases=databases, generators={GENERATOR_NAME: generators} if generators else {})

    def open_database(self, followed: Followed, version: int | None, generation: int) -> OpenDatabase:
        """Open and verify a version of a database."""
        reference = followed.reference
        if followed.name is not None and version is not None:
            reference = f"models:/{full_name(followed.name, 'database')}/{version}"
        found, pulled = open_named(DatabaseVersion, reference, self._settings, trust=self._trust)
        name = followed.name or PurePath(found.uri).parts[-3]
        return OpenDatabase.open(
            found, self._settings.cache_folder, name=name, number=pulled.version, generation=generation
        )

    def open_model(self, followed: Followed, version: int | None, generation: int) -> OpenModel:
        """Open a version of the generator, and its encoder."""
        reference = followed.reference
        if followed.name is not None and version is not None:
            reference = f"models:/{followed.name}/{version}"
        generator, folder, pulled = locate_generator(reference, self._settings, trust=self._trust)
        pipeline = KNNDiffusionPipeline.open(folder)
        generator.require_known(pipeline.identity)
        pipeline.to(self._device)
        pipeline.encoder  # noqa: B018 - loads it now, and checks it
        number = None if pulled is None else pulled.version
        name = PurePath(reference).name if number is None else f"{followed.name}/{number}"
        return OpenModel(name=name, version=number, generation=generation, pipeline=pipeline)


def default_model(listing: Listing) -> str:
    """Return the registered generator, or the bundled one while that has no champion."""
    followed = Followed.parse(GENERATOR_NAME, "generator")
    return BUNDLED_GENERATOR if listing.target("generator", followed) is None else GENERATOR_NAME


def default_databases(listing: Listing) -> list[str]:
    """Return the names of the databases that have a champion. Raises ``NotFoundError`` if there is none."""
    names = [
        name
        for name in sorted(listing.databases)
        if listing.target("database", Followed.parse(name, "database")) is not None
    ]
    if not names:
        raise NotFoundError("no database has a champion; build one with new-domain, or name one to serve")
    return names
