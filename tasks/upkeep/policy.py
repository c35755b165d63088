"""Rules for the next version of a domain.

Takedowns carry over. A merged or subset database replaces one built from the domain's own downloads only with
``--replace``.
"""

from collections.abc import Iterable

from infra import logs
from infra.errors import InputError, IntegrityError, NotFoundError
from infra.registry import Registry
from infra.registry_tags import CHAMPION, DATABASE_PREFIX
from infra.settings import Settings
from tasks.references.domain_folder import DomainFolder
from tasks.references.lineage import embeddings_of, images_of, takedown_of
from tasks.references.takedown import Entries, all_takedown_entries, read_entries
from tasks.references.types import DatabaseVersion, Takedown
from tasks.upkeep.merge import is_combined
from tasks.upkeep.takedown import commit_takedown


def required_takedown(domain: str, settings: Settings, further: Takedown | None = None) -> Takedown | None:
    """Return everything that was ever taken down in the domain, plus ``further``; None if there is nothing.

    Raises:
        TransientError: the registry is unreachable.
        IntegrityError: a takedown in the domain's folder is damaged, so its entries are unknown.
    """
    own = None
    try:
        champion = _champion(domain, settings)
        own = None if champion is None else takedown_of(champion)
    except (NotFoundError, IntegrityError) as error:
        logs.get("stage").warning(
            "the champion of %s cannot be read, so all takedowns in its folder apply: %s", domain, error
        )
    return merge_with_existing(DomainFolder.of(settings, domain), own, further)


def merge_with_existing(folder: DomainFolder, own: Takedown | None, further: Takedown | None = None) -> Takedown | None:
    """Merge the champion's takedown ``own`` with ``further`` and all takedowns in the domain's folder.

    The champion's takedown alone is not enough: the alias may be missing in another registry, or may have been moved
    back to an older version. Returns ``own`` itself if it contains all entries.

    Raises:
        IntegrityError: a takedown is damaged.
    """
    existing = Entries() if own is None else read_entries(own, folder.cache)
    merged = existing | all_takedown_entries(folder)
    if further is not None:
        merged |= read_entries(further, folder.cache)
    if merged == existing:
        return own
    return commit_takedown(merged, folder, info={"of": folder.uri}).reference


def require_replaceable(domain: str, sources: Iterable[DatabaseVersion], settings: Settings) -> None:
    """Check that a database combined from ``sources`` may replace the domain's champion.

    Raises:
        InputError: the champion is built from the domain's own downloads and is not one of ``sources``.
    """
    try:
        champion = _champion(domain, settings)
        if champion is None or champion in sources or is_combined(images_of(embeddings_of(champion))):
            return
    except (NotFoundError, IntegrityError):
        return  # an unreadable champion may be replaced
    raise InputError(
        f"the champion of {domain} is built from {champion.rows} images of its own downloads and would be replaced; "
        "choose another domain, or pass --replace"
    )


def _champion(domain: str, settings: Settings) -> DatabaseVersion | None:
    """Return the domain's champion, or None. Raises ``NotFoundError`` or ``IntegrityError`` if it is damaged."""
    registry = Registry(settings)
    named = [one for one in registry.versions("database") if one["name"] == DATABASE_PREFIX + domain]
    if not any(CHAMPION in one["aliases"] for one in named):
        return None
    pulled = registry.pull(domain, kind="database")
    return DatabaseVersion.of(pulled.manifest, pulled.folder_uri)
