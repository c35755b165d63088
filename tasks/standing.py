"""Standing takedowns: what a domain has promised not to show binds whatever is registered there next."""

from pathlib import Path

from infra import artifacts, logs, storage
from infra.errors import IntegrityError, NotFoundError
from infra.registry import CHAMPION, DATABASE_PREFIX, Registry
from infra.settings import Settings
from tasks.contracts import DatabaseVersion, Takedown
from tasks.lineage import takedown_of
from tasks.stage import base_of
from tasks.takedown import Entries, commit_takedown, entries_of


def standing_takedown(domain: str, settings: Settings, cache: Path, further: Takedown | None = None) -> Takedown | None:
    """What the domain's champion may not show, and ``further``; None where nothing was ever taken down.

    Where the champion cannot be read any more, it is all that was ever taken down in the domain's folder: a damaged
    version must not bring a picture back.

    Raises:
        StageError: the registry does not answer.
    """
    base = base_of(settings, domain)
    registered = Registry(settings).versions("database")
    if not any(one["name"] == DATABASE_PREFIX + domain and CHAMPION in one["aliases"] for one in registered):
        return further
    try:
        pulled = Registry(settings).pull(domain, kind="database")
        champion = takedown_of(DatabaseVersion.of(pulled.manifest, pulled.folder_uri))
        before = [] if champion is None else [champion]
    except (NotFoundError, IntegrityError) as error:
        logs.get("stage").warning("the champion of %s cannot be read, all takedowns below it hold: %s", domain, error)
        before = _ever(base)
    lists = [*before, *([] if further is None else [further])]
    together = Entries()
    for takedown in lists:
        together |= entries_of(takedown, cache)
    return commit_takedown(together, base, info={"of": domain}).reference if len(together) else None


def _ever(base: str) -> list[Takedown]:
    folders = [storage.join(base, Takedown.kind, name) for name in storage.names(storage.join(base, Takedown.kind))]
    return [Takedown.open(one) for one in folders if storage.exists(storage.join(one, artifacts.MANIFEST))]
