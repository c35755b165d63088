"""Flows that build a database from others, without downloads or embedding: the union of several, or a subset."""

import dataclasses
from typing import Annotated, ClassVar

from prefect import flow

from flows.deployed_run import deployable
from flows.form import DOMAIN, Form
from infra import compute, uris
from infra.errors import ConfigError, StageError
from infra.settings import Settings
from infra.storage.lease import Lease, lease
from model.errors import ModelError
from tasks.index.config import IndexConfig, IndexOverrides
from tasks.index.task import index
from tasks.references.domain_folder import DomainFolder
from tasks.references.domain_name import require_domain
from tasks.references.filter_expression import referenced_columns
from tasks.references.trust import open_named
from tasks.references.types import DatabaseVersion, StageResult, config_from_manifest
from tasks.register import RegistrationResult, register_database
from tasks.stage import settings_of
from tasks.upkeep.merge import CombinedInputs, merge
from tasks.upkeep.policy import require_replaceable, required_takedown
from tasks.upkeep.subset import subset
from tasks.upkeep.takedown import rolled_back_on


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MergeDatabasesConfig(Form):
    """Databases to merge into a domain.

    Attributes:
        domain: Domain of the new database.
        databases: Two or more databases, each by short name, ``models:/…`` URI or folder.
        root: Folder or ``s3://…`` URI of the artifacts. Default: the root of the settings.
        index: Index settings. Default: those of the first database.
        index_changes: Single settings that override ``index``.
        replace: Replace the champion of the domain even if it was built from its own downloads. Default: False.
        trust: Treat folders outside of the root like those below it; see SECURITY.md. Default: False.
        wait_s: Seconds to wait for another writer of the domain before failing. Default: 0.
    """

    COMMON: ClassVar = ("domain", "databases", "replace", "root")

    domain: Annotated[str, DOMAIN]
    databases: tuple[str, ...]
    root: str | None = None
    index: IndexConfig | None = None
    index_changes: IndexOverrides = dataclasses.field(default_factory=IndexOverrides)
    replace: bool = False
    trust: bool = False
    wait_s: float = 0.0

    def __post_init__(self) -> None:
        """Validate the fields."""
        uris.hide_fields(self, "databases", "root")
        require_domain(self.domain)
        if len(self.databases) < 2:
            raise ConfigError(f"databases has too few entries: {len(self.databases)}; give two or more")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SubsetDatabaseConfig(Form):
    """Rows of a database to copy into a domain.

    Attributes:
        domain: Domain of the new database.
        database: Source database: short name, ``models:/…`` URI or folder.
        where: Filter on url, key, sha256, width, height and columns of the URL list, e.g.
            ``width >= 64 and url like "%cat%"``.
        root: Folder or ``s3://…`` URI of the artifacts. Default: the root of the settings.
        index: Index settings. Default: those of the source database.
        index_changes: Single settings that override ``index``.
        replace: Replace the champion of the domain even if it was built from its own downloads. Default: False.
        trust: Treat folders outside of the root like those below it; see SECURITY.md. Default: False.
        wait_s: Seconds to wait for another writer of the domain before failing. Default: 0.
    """

    COMMON: ClassVar = ("domain", "database", "where", "replace", "root")

    domain: Annotated[str, DOMAIN]
    database: str
    where: str
    root: str | None = None
    index: IndexConfig | None = None
    index_changes: IndexOverrides = dataclasses.field(default_factory=IndexOverrides)
    replace: bool = False
    trust: bool = False
    wait_s: float = 0.0

    def __post_init__(self) -> None:
        """Validate the fields and parse the filter."""
        uris.hide_fields(self, "database", "root")
        require_domain(self.domain)
        referenced_columns(self.where)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NewDatabase:
    """Combined inputs, database and registered version of the new domain."""

    combined: CombinedInputs
    database: StageResult[DatabaseVersion]
    registered: RegistrationResult


@flow(name="merge-databases", flow_run_name="merge-databases-{config.domain}", validate_parameters=True)
@deployable
def merge_databases(config: MergeDatabasesConfig) -> NewDatabase:
    """Register the union of several databases as champion of a domain. What any of them has taken down stays hidden."""
    settings = settings_of(config.root)
    folder = DomainFolder.of(settings, config.domain)
    databases = {name: open_named(DatabaseVersion, name, settings, trust=config.trust)[0] for name in config.databases}
    with (
        lease(folder.uri, holder=f"merge-databases {config.domain}", wait_s=config.wait_s) as domain_lease,
        compute.cluster(settings.ray_address, settings.cpus),
    ):
        if not config.replace:
            require_replaceable(config.domain, databases.values(), settings)
        with rolled_back_on(folder, (ModelError, StageError)):
            combined = merge(databases, folder)
            index_config = config.index or _config_of(databases[config.databases[0]])
            built = _index(config.domain, combined, config.index_changes.over(index_config), settings)
        return _register(config.domain, combined, built, settings, domain_lease)


@flow(name="subset-database", flow_run_name="subset-database-{config.domain}", validate_parameters=True)
@deployable
def subset_database(config: SubsetDatabaseConfig) -> NewDatabase:
    """Register the rows of a database that match a filter as champion of a domain."""
    settings = settings_of(config.root)
    folder = DomainFolder.of(settings, config.domain)
    database = open_named(DatabaseVersion, config.database, settings, trust=config.trust)[0]
    with (
        lease(folder.uri, holder=f"subset-database {config.domain}", wait_s=config.wait_s) as domain_lease,
        compute.cluster(settings.ray_address, settings.cpus),
    ):
        if not config.replace:
            require_replaceable(config.domain, [database], settings)
        with rolled_back_on(folder, (ModelError, StageError)):
            combined = subset(database, config.where, folder)
            index_config = config.index or _config_of(database)
            built = _index(config.domain, combined, config.index_changes.over(index_config), settings)
        return _register(config.domain, combined, built, settings, domain_lease)


def _index(
    domain: str, combined: CombinedInputs, config: IndexConfig, settings: Settings
) -> StageResult[DatabaseVersion]:
    """Index the combined embeddings. Takedowns of the domain's earlier versions apply too."""
    folder = DomainFolder.of(settings, domain)
    takedown = required_takedown(domain, settings, combined.takedown)
    return index(combined.embeddings.reference, folder, config, takedown=takedown)


def _register(
    domain: str, combined: CombinedInputs, built: StageResult[DatabaseVersion], settings: Settings, domain_lease: Lease
) -> NewDatabase:
    domain_lease.check()
    registered = register_database(domain, built.reference, settings, None)
    return NewDatabase(combined=combined, database=built, registered=registered)


def _config_of(database: DatabaseVersion) -> IndexConfig:
    return config_from_manifest(IndexConfig, database.manifest().config)
