"""Standing: what a domain's champion binds whatever is registered there next to.

What was taken down stays down, and pictures that were downloaded for the domain are not put out of sight unasked.
"""

from collections.abc import Iterable
from pathlib import Path

from infra import artifacts, logs, storage
from infra.errors import InputError, IntegrityError, NotFoundError
from infra.registry import CHAMPION, DATABASE_PREFIX, Registry
from infra.settings import Settings
from tasks.combine import is_combined
from tasks.contracts import DatabaseVersion, Takedown
from tasks.lineage import embeddings_of, images_of, takedown_of
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
    try:
        champion = _champion(domain, settings)
        if champion is None:
            return further
        takedown = takedown_of(champion)
        before = [] if takedown is None else [takedown]
    except (NotFoundError, IntegrityError) as error:
        logs.get("stage").warning("the champion of %s cannot be read, all takedowns below it hold: %s", domain, error)
        before = _ever(base)
    lists = [*before, *([] if further is None else [further])]
    together = Entries()
    for takedown in lists:
        together |= entries_of(takedown, cache)
    return commit_takedown(together, base, info={"of": domain}).reference if len(together) else None


def require_replaceable(domain: str, sources: Iterable[DatabaseVersion], settings: Settings) -> None:
    """Refuse to put a database made of others in the place of one that was not, unless it is one of ``sources``.

    Raises:
        InputError: the domain's champion holds pictures of its own.
    """
    try:
        champion = _champion(domain, settings)
        if champion is None or champion in sources or is_combined(images_of(embeddings_of(champion))):
            return
    except (NotFoundError, IntegrityError):
        return  # nothing is lost where nothing can be read
    raise InputError(
        f"{domain} is a database of {champion.rows} pictures of its own, which would no longer be its champion; "
        "name another domain, or say --replace"
    )


def _champion(domain: str, settings: Settings) -> DatabaseVersion | None:
    """The domain's champion, if it has one. Raises ``NotFoundError`` and ``IntegrityError`` where it is damaged."""
    registry = Registry(settings)
    named = [one for one in registry.versions("database") if one["name"] == DATABASE_PREFIX + domain]
    if not any(CHAMPION in one["aliases"] for one in named):
        return None
    pulled = registry.pull(domain, kind="database")
    return DatabaseVersion.of(pulled.manifest, pulled.folder_uri)


def _ever(base: str) -> list[Takedown]:
    folders = [storage.join(base, Takedown.kind, name) for name in storage.names(storage.join(base, Takedown.kind))]
    return [Takedown.open(one) for one in folders if storage.exists(storage.join(one, artifacts.MANIFEST))]
