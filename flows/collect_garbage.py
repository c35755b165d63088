"""Flow that deletes files that no retained version of a domain references. By default it only lists them."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar

from annotated_types import Ge
from prefect import flow

from flows.deployed_run import deployable
from flows.form import Form
from infra import uris
from infra.errors import ConfigError, KNNDiffusionError, NotFoundError, StageError
from infra.settings import Settings
from infra.storage.lease import lease
from tasks.references.domain_folder import DomainFolder
from tasks.references.domain_name import require_domain
from tasks.stage import settings_of
from tasks.upkeep.garbage import DAY_S, Garbage, collect
from tasks.upkeep.retention import domains_of


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CollectGarbageConfig(Form):
    """Domains to collect, and what to retain in addition to all versions with an alias.

    Attributes:
        domain: Domain name. Default: every domain below the root.
        root: Folder or ``s3://…`` URI of the artifacts. Default: the root of the settings.
        keep_versions: Number of newest versions of each registered name to retain, at least 1. Default: 2.
        dry_run: List the files without deleting them. Default: True.
        grace_s: Age in seconds below which files are kept, because a run may still be writing them. Default: one day.
        wait_s: Seconds to wait for another writer of a domain before failing. Default: 0.
    """

    COMMON: ClassVar = ("domain", "dry_run", "keep_versions", "root")

    domain: str | None = None
    root: str | None = None
    keep_versions: Annotated[int, Ge(1)] = 2
    dry_run: bool = True
    grace_s: Annotated[float, Ge(0)] = DAY_S
    wait_s: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        """Validate the fields."""
        uris.hide_fields(self, "root")
        if self.domain is not None:
            require_domain(self.domain)
        if self.keep_versions < 1 or self.grace_s < 0 or self.wait_s < 0:
            numbers = f"{self.keep_versions}, {self.grace_s}, {self.wait_s}"
            raise ConfigError(f"keep_versions, grace_s or wait_s is out of range: {numbers}; give at least 1, 0 and 0")


class NotAllCollectedError(StageError):
    """Raised when some domains could not be collected. ``collected`` has the reports of the others."""

    def __init__(self, message: str, collected: Sequence[Garbage] = ()) -> None:
        """Store the error message and the reports of the domains that were collected."""
        super().__init__(message)
        self.collected = collected


@flow(name="collect-garbage", flow_run_name="collect-garbage-{config.domain}", validate_parameters=True)
@deployable
def collect_garbage(config: CollectGarbageConfig) -> list[Garbage]:
    """List the files that no retained version references, one entry per domain; delete them unless ``dry_run``.

    A domain that fails does not block the others.

    Raises:
        NotFoundError: The domain does not exist below the root.
        NotAllCollectedError: At least one domain failed. Raised after all domains were processed.
    """
    settings = settings_of(config.root)
    domains = domains_of(settings.root)
    if config.domain is not None and config.domain not in domains:
        names = ", ".join(domains) or "none"
        raise NotFoundError(f"domain does not exist in {settings.root}: {config.domain}; use one of: {names}")
    collected, failed = [], []
    for domain in [config.domain] if config.domain else domains:
        try:
            collected.append(_collect(domain, settings, config))
        except KNNDiffusionError as error:
            if config.domain:
                raise
            failed.append(f"{domain}: {error}")
    if failed:
        message = f"{len(failed)} of {len(domains)} domains were not collected; {'; '.join(failed)}"
        raise NotAllCollectedError(message, collected)
    return collected


def _collect(domain: str, settings: Settings, config: CollectGarbageConfig) -> Garbage:
    with lease(
        DomainFolder.of(settings, domain).uri, holder=f"collect-garbage {domain}", wait_s=config.wait_s
    ) as domain_lease:
        return collect(
            domain,
            settings,
            keep_versions=config.keep_versions,
            dry_run=config.dry_run,
            grace_s=config.grace_s,
            check=domain_lease.check,
        )
