"""The flow that removes what no kept version of a domain refers to. It only lists, until it is told otherwise."""

import dataclasses
from collections.abc import Sequence

from prefect import flow

from infra import uris
from infra.errors import KNNDiffusionError, NotFoundError, StageError
from infra.settings import Settings
from infra.storage.lease import lease
from tasks.stage import base_of, require_domain, settings_of
from tasks.upkeep.garbage import DAY_S, Garbage, collect, domains_of


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
        uris.hide_fields(self, "root")
        if self.domain is not None:
            require_domain(self.domain)
        if self.keep_versions < 1 or self.grace_s < 0 or self.wait_s < 0:
            raise ValueError("keep_versions must be at least 1, grace_s and wait_s at least 0")


class NotAllCollectedError(StageError):
    """Some domains were refused. ``collected`` is what was done in the others."""

    def __init__(self, told: str, collected: Sequence[Garbage] = ()) -> None:
        """Say ``told``; the rest is for who lists it."""
        super().__init__(told)
        self.collected = collected


@flow(name="collect-garbage", flow_run_name="collect-garbage-{config.domain}", validate_parameters=True)
def collect_garbage(config: CollectGarbageConfig) -> list[Garbage]:
    """List the files that no kept version refers to, one entry a domain; delete them when ``dry_run`` is off.

    A domain that cannot be collected keeps no other one up; at the end ``NotAllCollectedError`` tells of both.
    """
    settings = settings_of(config.root)
    there = domains_of(settings.root)
    if config.domain is not None and config.domain not in there:
        told = f"{settings.root} holds no domain {config.domain}; there are {', '.join(there) or 'none'}"
        raise NotFoundError(told)
    collected, refused = [], []
    for domain in [config.domain] if config.domain else there:
        try:
            collected.append(_collected(domain, settings, config))
        except KNNDiffusionError as error:
            if config.domain:
                raise
            refused.append(f"{domain}: {error}")
    if refused:
        told = f"{len(refused)} of {len(there)} domains were not collected; {'; '.join(refused)}"
        raise NotAllCollectedError(told, collected)
    return collected


def _collected(domain: str, settings: Settings, config: CollectGarbageConfig) -> Garbage:
    with lease(base_of(settings, domain), holder=f"collect-garbage {domain}", wait_s=config.wait_s) as held:
        return collect(
            domain,
            settings,
            keep_versions=config.keep_versions,
            dry_run=config.dry_run,
            grace_s=config.grace_s,
            check=held.check,
        )
