"""Standing: what binds whatever is registered in a domain next.

What was taken down stays down, and pictures that were downloaded for the domain are not put out of sight unasked.
"""

from collections.abc import Iterable
from pathlib import Path

from infra import logs
from infra.errors import InputError, IntegrityError, NotFoundError
from infra.registry import CHAMPION, DATABASE_PREFIX, Registry
from infra.settings import Settings
from tasks.references.lineage import embeddings_of, images_of, takedown_of
from tasks.references.types import DatabaseVersion, Takedown
from tasks.stage import base_of
from tasks.upkeep.merge import is_combined
from tasks.upkeep.takedown import Entries, all_takedown_entries, commit_takedown, read_entries


def required_takedown(domain: str, settings: Settings, cache: Path, further: Takedown | None = None) -> Takedown | None:
    """What may not be shown in the domain: all that was ever taken down in it, and ``further``; None if nothing.

    Raises:
        TransientError: the registry does not answer.
        IntegrityError: a takedown in the domain's folder is damaged; nobody knows what it named.
    """
    own = None
    try:
        champion = _champion(domain, settings)
        own = None if champion is None else takedown_of(champion)
    except (NotFoundError, IntegrityError) as error:
        logs.get("stage").warning("the champion of %s cannot be read, all takedowns below it hold: %s", domain, error)
    return merge_with_existing(base_of(settings, domain), cache, own, further)


def merge_with_existing(
    base: str, cache: Path, own: Takedown | None, further: Takedown | None = None
) -> Takedown | None:
    """``own``, the champion's, with ``further`` and all takedowns below ``base``; ``own`` itself where it has them all.

    What a champion hides is not enough: the alias may be missing in another registry, or have been moved back to a
    version of before. Raises ``IntegrityError`` where a takedown is damaged.
    """
    held = Entries() if own is None else read_entries(own, cache)
    together = held | all_takedown_entries(base, cache)
    if further is not None:
        together |= read_entries(further, cache)
    if together == held:
        return own
    return commit_takedown(together, base, info={"of": base}).reference


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
