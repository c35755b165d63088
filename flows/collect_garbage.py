"""The flow that removes what no kept version of a domain refers to. It only lists, until it is told otherwise."""

import dataclasses

from prefect import flow

from infra import storage
from infra.lease import lease
from tasks.collect import DAY_S, Garbage, collect_task
from tasks.stage import base_of, require_domain, settings_of

_NO_DOMAINS = ("mlflow", "mlflow.db")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CollectGarbageConfig:
    """Which domain, and what is kept of it beside all that has an alias."""

    domain: str | None = None  # None: every domain below the root
    root: str | None = None
    keep_versions: int = 2  # newest versions of each registered name
    dry_run: bool = True  # list, delete nothing
    grace_s: float = DAY_S  # what is younger stays: a run may be filling it
    wait_s: float = 0.0  # for another writer of a domain to end, before this one is refused

    def __post_init__(self) -> None:
        """Refuse to keep nothing."""
        if self.domain is not None:
            require_domain(self.domain)
        if self.keep_versions < 1 or self.grace_s < 0 or self.wait_s < 0:
            raise ValueError("keep_versions must be at least 1, grace_s and wait_s at least 0")


@flow(name="collect-garbage", flow_run_name="collect-garbage-{config.domain}", validate_parameters=True)
def collect_garbage(config: CollectGarbageConfig) -> list[Garbage]:
    """List the files that no kept version refers to, one entry a domain; delete them when ``dry_run`` is off."""
    settings = settings_of(config.root)
    domains = [config.domain] if config.domain else _domains(settings.root)
    collected = []
    for domain in domains:
        with lease(base_of(settings, domain), holder=f"collect-garbage {domain}", wait_s=config.wait_s) as held:
            asked = (config.keep_versions, config.dry_run, config.grace_s)
            collected.append(collect_task(domain, settings, *asked, held.check))
    return collected


def _domains(root: str) -> list[str]:
    """The folders below the root that hold image shards or databases."""
    names = [name for name in storage.names(root) if name not in _NO_DOMAINS]
    return [name for name in names if {"images", "database"} & set(storage.names(storage.join(root, name)))]
