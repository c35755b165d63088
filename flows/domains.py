"""Domains that are rebuilt on a schedule, read from ``domains.yaml``."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from infra.errors import ConfigError, InputError
from tasks.index.config import IndexOverrides
from tasks.promotion.config import DatabaseGates
from tasks.references.domain_name import require_domain

TARGET_RECALL = "target_recall"
"""Gate that a rebuild checks before it registers a version. The others decide on the promotion of the version."""
GATES = frozenset({TARGET_RECALL, *(field.name for field in dataclasses.fields(DatabaseGates))})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """A domain and when it is rebuilt.

    Attributes:
        name: Domain name: lower-case letters, digits, hyphens.
        urls: URL list, local or remote. Default: no new URLs, only takedowns.
        schedule: Cron expression. Default: no schedule.
        timezone: Time zone of the schedule. Default: UTC.
        active: Start runs by the schedule. Default: True.
        encoder: open_clip model. Default: the encoder of the champion. Another one embeds all images again.
        gates: Limits of ``target_recall``, and of :class:`tasks.promotion.config.DatabaseGates`; null disables one.
            With one of the latter, the others have their defaults. Default: the target recall of the champion.
    """

    name: str
    urls: str | None = None
    schedule: str | None = None
    timezone: str = "UTC"
    active: bool = True
    encoder: str | None = None
    gates: Mapping[str, float | None] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validate the fields."""
        require_domain(self.name)
        if unknown := self.gates.keys() - GATES:
            raise ConfigError(f"gate is unknown: {min(unknown)}; use {', '.join(sorted(GATES))}")
        IndexOverrides(target_recall=self.gates.get(TARGET_RECALL))  # both raise for a limit out of range
        _ = self.promotion_gates

    def rebuild_parameters(self) -> dict[str, Any]:
        """Return the ``config`` of this domain's ``rebuild-index`` run."""
        config: dict[str, Any] = {"domain": self.name, "urls": self.urls}
        if self.encoder is not None:
            config["embed"] = {"encoder": self.encoder}
        if self.gates.get(TARGET_RECALL) is not None:
            config["index_changes"] = {TARGET_RECALL: self.gates[TARGET_RECALL]}
        if self.promotion_gates is not None:
            config["gates"] = dataclasses.asdict(self.promotion_gates)
        return config

    def promotion_parameters(self) -> dict[str, Any]:
        """Return the ``config`` of this domain's ``promote-version`` run."""
        gates = self.promotion_gates
        return {"name": self.name, "database": None if gates is None else dataclasses.asdict(gates)}

    @property
    def promotion_gates(self) -> DatabaseGates | None:
        """Gates of a promotion, or None if the entry has none."""
        limits = {name: limit for name, limit in self.gates.items() if name != TARGET_RECALL}
        return DatabaseGates(**limits) if limits else None


def read_domains(file: Path) -> tuple[Domain, ...]:
    """Return the domains of a file; none if there is no file. Raises ``InputError`` if it is invalid."""
    if not file.exists():
        return ()
    try:
        entries = (yaml.safe_load(file.read_text()) or {}).get("domains") or []
        domains = tuple(Domain(**entry) for entry in entries)
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{file} is invalid: {' '.join(str(error).split())}; see docs/how-to/operate.md") from error
    names = [domain.name for domain in domains]
    if len(set(names)) < len(names):
        raise InputError(f"{file} has a domain twice; give each domain one entry")
    return domains
