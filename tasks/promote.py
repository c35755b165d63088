"""Promotion: measure the gates of a registered version, decide, move the alias ``champion``, and record the decision.

Callers hold the lease of the registered model (:func:`promotion_folder`), because MLflow moves an alias
unconditionally.
"""

import dataclasses
import getpass
import socket

from infra import logs
from infra.errors import InputError, NotFoundError
from infra.promotions import CANDIDATE, PENDING, Decision, GateResult, Promotions
from infra.registry import RegisteredVersion, Registry
from infra.registry_tags import CHAMPION, DATABASE_PREFIX, GENERATOR_NAME
from infra.settings import Settings
from tasks.promotion.config import AT_ONCE, DatabaseGates, GeneratorGates
from tasks.promotion.database_gates import measure_database, only_hides
from tasks.promotion.measure import champion_database, measure, open_version
from tasks.promotion.presentation import decision_page
from tasks.references.domain_folder import DomainFolder
from tasks.references.lineage import takedown_of
from tasks.references.takedown import Entries, all_takedown_entries, read_entries
from tasks.references.types import DatabaseVersion, Generator


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PromotionRequest:
    """A version to promote.

    Attributes:
        name: Registered model: ``knn-database.<domain>`` or ``knn-diffusion``.
        version: Number of the version.
        database: Gates of a database. Default: those of its domain when it was registered, or the defaults.
        generator: Gates of a generator.
        approval: Require the tag ``approval=approved`` of the version. Default: False.
        force: Promote even if gates fail. Default: False.
        reason: Reason to record; required with ``force``.
        requester: Who asked. Default: user and host of this process.
    """

    name: str
    version: int
    database: DatabaseGates | None = None
    generator: GeneratorGates = dataclasses.field(default_factory=GeneratorGates)
    approval: bool = False
    force: bool = False
    reason: str = ""
    requester: str = dataclasses.field(default_factory=lambda: requester())

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.force and not self.reason.strip():
            raise InputError("the reason for the forced promotion is missing; add a reason (--reason TEXT)")


def promote(request: PromotionRequest, settings: Settings) -> Decision:
    """Move ``champion`` to the version if its gates pass. The champion is then no longer pinned.

    Raises:
        NotFoundError: there is no such version.
    """
    store = Promotions(settings)
    before = store.champion(request.name)
    gates = measure(request.name, request.version, before, request.database, request.generator, settings)
    failed = [gate for gate in gates if not gate.passed]
    outcome = "promoted"
    if failed and not request.force:
        outcome = "refused"
    elif request.approval and not request.force and not store.is_approved(request.name, request.version):
        outcome = PENDING
    if outcome == "promoted":
        store.move(request.name, request.version)
    return _record(request, outcome, before, gates, store)


def promote_registered(
    registered: RegisteredVersion,
    settings: Settings,
    scores: dict[str, float] | None = None,
    gates_of_domain: DatabaseGates | None = None,
) -> Decision | None:
    """Promote a version that was registered just now, if its gates pass and the champion is not pinned.

    Without ``gates_of_domain``, the absolute gates are those that registration has required already. A database that
    only hides more rows than the champion replaces it: a takedown takes effect in any case. A new champion in place of
    a pinned one is pinned too. Returns None if the version is the champion already.
    """
    store = Promotions(settings)
    before, name = store.champion(registered.name), registered.name
    if before == registered.version:
        store.move(name, registered.version, pin=store.pin(name))
        return None
    pin = store.pin(name)
    request = PromotionRequest(name=name, version=registered.version, reason=pin or "")
    gates: tuple[GateResult, ...] = ()
    hides = False
    if name == GENERATOR_NAME:
        from tasks.promotion.generator_gates import neighbour_gate

        gates = (neighbour_gate(scores or {}, request.generator.neighbour_loss or 0.0),)
    else:
        version = open_version(DatabaseVersion, name, registered.version, settings)
        champion = champion_database(name, before, settings)
        hides = only_hides(version, champion, settings.cache_folder)
        limits = AT_ONCE if hides or gates_of_domain is None else gates_of_domain
        gates = measure_database(version, champion, limits, settings.cache_folder)
    outcome = "promoted"
    if any(not gate.passed for gate in gates):
        outcome = "refused"
    elif pin is not None and not hides:
        outcome = "pinned"
    if outcome == "promoted":
        Registry(settings).warn_if_older(name, CHAMPION, str(registered.version))
        store.move(name, registered.version, pin=pin)
    return _record(request, outcome, before, gates, store)


def rollback(
    name: str, version: int | None, settings: Settings, *, reason: str = "", by: str | None = None
) -> Decision:
    """Move ``champion`` back to ``version``, or to the champion before the current one, and pin it.

    Raises:
        NotFoundError: there is no earlier champion, or no such version.
        InputError: the version shows images that were taken down since.
    """
    store = Promotions(settings)
    before = store.champion(name)
    target = version if version is not None else _previous(store, name, before)
    if name.startswith(DATABASE_PREFIX):
        _require_takedowns(name, target, settings)
    else:
        Registry(settings).pull(f"models:/{name}/{target}", kind=Generator.kind)
    request = PromotionRequest(name=name, version=target, reason=reason, requester=by or requester())
    store.move(name, target, pin=f"rolled back from version {before} by {request.requester}")
    return _record(request, "rolled-back", before, (), store)


def registered_name(short: str) -> str:
    """Return the name of the registered model that a domain or a full name refers to."""
    return short if short == GENERATOR_NAME or short.startswith(DATABASE_PREFIX) else DATABASE_PREFIX + short


def candidate_of(name: str, settings: Settings) -> int:
    """Return the version with the alias ``candidate``. Raises ``NotFoundError``."""
    found = Promotions(settings).version_of(name, CANDIDATE)
    if found is None:
        raise NotFoundError(f"{name} has no candidate; give the version to promote (--version N)")
    return found


def promotion_folder(name: str, settings: Settings) -> str:
    """Return the folder whose lease protects the aliases of a registered model."""
    return _folder(name, settings).uri


def _folder(name: str, settings: Settings) -> DomainFolder:
    return DomainFolder.of(settings, name.removeprefix(DATABASE_PREFIX))


def requester() -> str:
    """Return user and host of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user id without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def _previous(store: Promotions, name: str, champion: int | None) -> int:
    """Return the champion before the current one, from the recorded decisions."""
    for decision in store.history(name):
        if decision["after"] == champion and decision["before"] not in (None, champion):
            return int(decision["before"])
    raise NotFoundError(f"{name} has no recorded earlier champion; give the version to restore (--to N)")


def _require_takedowns(name: str, version: int, settings: Settings) -> None:
    """Raise ``InputError`` if the version does not hide everything that was taken down in the domain."""
    database = open_version(DatabaseVersion, name, version, settings)
    takedown = takedown_of(database)
    hidden = Entries() if takedown is None else read_entries(takedown, settings.cache_folder)
    missing = all_takedown_entries(_folder(name, settings)) - hidden
    if len(missing):
        raise InputError(
            f"version {version} of {name} would restore images that were taken down since ({len(missing)} entries); "
            "choose a version that hides them, or rebuild the index from it"
        )


def _record(
    request: PromotionRequest, outcome: str, before: int | None, gates: tuple[GateResult, ...], store: Promotions
) -> Decision:
    after = request.version if outcome in ("promoted", "rolled-back") else before
    decision = Decision(
        name=request.name,
        version=request.version,
        outcome=outcome,
        before=before,
        after=after,
        requester=request.requester,
        gates=gates,
        force=request.force,
        reason=request.reason,
    )
    failed = "; ".join(str(gate) for gate in gates if not gate.passed)
    why = f" ({failed or request.reason})" if failed or request.reason else ""
    log = logs.get("stage").info if decision.moved else logs.get("stage").warning
    log("%-11s %s version %d: %s%s", "promote", request.name, request.version, outcome, why)
    return store.record(decision, decision_page(decision))
