"""The flows that make a database of others without downloading or embedding: the union of several, a part of one."""

import dataclasses

from prefect import flow

from infra import compute, uris
from infra.errors import StageError
from infra.settings import Settings
from infra.storage.lease import Lease, lease
from model.errors import ModelError
from tasks.index.task import IndexConfig, IndexOverrides, index
from tasks.references.trust import open_named
from tasks.references.types import DatabaseVersion, StageResult, config_from_manifest
from tasks.register import RegistrationResult, register_database
from tasks.stage import base_of, require_domain, settings_of
from tasks.upkeep.filter_expression import parse_where
from tasks.upkeep.merge import CombinedInputs, merge, subset
from tasks.upkeep.policy import require_replaceable, required_takedown
from tasks.upkeep.takedown import rolled_back_on


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MergeDatabasesConfig:
    """Which databases make up the new domain, each by short name, models:/… or folder."""

    domain: str
    databases: tuple[str, ...]
    root: str | None = None
    index: IndexConfig | None = None  # None: the first one's
    index_changes: IndexOverrides = dataclasses.field(default_factory=IndexOverrides)  # over ``index``
    replace: bool = False  # a champion of the domain that holds pictures of its own
    trust: bool = False  # treat folders outside of the root like those below it; see SECURITY.md
    wait_s: float = 0.0  # for another writer of the domain to end, before this one is refused

    def __post_init__(self) -> None:
        """Refuse a union of one."""
        uris.hide_fields(self, "databases", "root")
        require_domain(self.domain)
        if len(self.databases) < 2:
            raise ValueError("databases names two or more, whose union is wanted")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SubsetDatabaseConfig:
    """Which rows of a database make up the new domain."""

    domain: str
    database: str
    where: str  # such as: width >= 64 and url like "%cat%"
    root: str | None = None
    index: IndexConfig | None = None  # None: the database's own
    index_changes: IndexOverrides = dataclasses.field(default_factory=IndexOverrides)  # over ``index``
    replace: bool = False
    trust: bool = False
    wait_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a filter that cannot be read."""
        uris.hide_fields(self, "database", "root")
        require_domain(self.domain)
        parse_where(self.where)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NewDatabase:
    """The database of the new domain, and its name in the registry."""

    combined: CombinedInputs
    database: StageResult[DatabaseVersion]
    registered: RegistrationResult


@flow(name="merge-databases", flow_run_name="merge-databases-{config.domain}", validate_parameters=True)
def merge_databases(config: MergeDatabasesConfig) -> NewDatabase:
    """Register the union of several databases as a domain's champion. What any of them has taken down stays hidden."""
    settings = settings_of(config.root)
    base = base_of(settings, config.domain)
    databases = {name: open_named(DatabaseVersion, name, settings, trust=config.trust)[0] for name in config.databases}
    with (
        lease(base, holder=f"merge-databases {config.domain}", wait_s=config.wait_s) as held,
        compute.cluster(settings.ray_address, settings.cpus),
    ):
        if not config.replace:
            require_replaceable(config.domain, databases.values(), settings)
        with rolled_back_on(base, (ModelError, StageError)):
            combined = merge(databases, base, cache=settings.cache_folder)
            index_config = config.index or _config_of(databases[config.databases[0]])
            built = _indexed(config.domain, combined, config.index_changes.over(index_config), settings)
        return _registered(config.domain, combined, built, settings, held)


@flow(name="subset-database", flow_run_name="subset-database-{config.domain}", validate_parameters=True)
def subset_database(config: SubsetDatabaseConfig) -> NewDatabase:
    """Register the rows of a database that a filter takes as a domain's champion."""
    settings = settings_of(config.root)
    base = base_of(settings, config.domain)
    database = open_named(DatabaseVersion, config.database, settings, trust=config.trust)[0]
    with (
        lease(base, holder=f"subset-database {config.domain}", wait_s=config.wait_s) as held,
        compute.cluster(settings.ray_address, settings.cpus),
    ):
        if not config.replace:
            require_replaceable(config.domain, [database], settings)
        with rolled_back_on(base, (ModelError, StageError)):
            combined = subset(database, config.where, base, cache=settings.cache_folder)
            index_config = config.index or _config_of(database)
            built = _indexed(config.domain, combined, config.index_changes.over(index_config), settings)
        return _registered(config.domain, combined, built, settings, held)


def _indexed(
    domain: str, combined: CombinedInputs, config: IndexConfig, settings: Settings
) -> StageResult[DatabaseVersion]:
    """The version; what was taken down in the domain before stays hidden, too."""
    base, cache = base_of(settings, domain), settings.cache_folder
    takedown = required_takedown(domain, settings, cache, combined.takedown)
    return index(combined.embeddings.reference, base, config, cache=cache, takedown=takedown)


def _registered(
    domain: str, combined: CombinedInputs, built: StageResult[DatabaseVersion], settings: Settings, held: Lease
) -> NewDatabase:
    held.check()
    registered = register_database(domain, built.reference, settings, None)
    return NewDatabase(combined=combined, database=built, registered=registered)


def _config_of(database: DatabaseVersion) -> IndexConfig:
    return config_from_manifest(IndexConfig, database.manifest().config)
