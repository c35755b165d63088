"""Standing: what binds whatever is registered in a domain next.

What was taken down stays down, and pictures that were downloaded for the domain are not put out of sight unasked.
"""

import functools
import operator
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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

_READERS = 16


def standing_takedown(domain: str, settings: Settings, cache: Path, further: Takedown | None = None) -> Takedown | None:
    """What may not be shown in the domain: all that was ever taken down in it, and ``further``; None where nothing was.

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
    return ever_taken_down(base_of(settings, domain), cache, own, further)


def ever_taken_down(base: str, cache: Path, own: Takedown | None, further: Takedown | None = None) -> Takedown | None:
    """``own``, the champion's, with ``further`` and all takedowns below ``base``; ``own`` itself where it has them all.

    What a champion hides is not enough: the alias may be missing in another registry, or have been moved back to a
    version of before. Raises ``IntegrityError`` where one is damaged.
    """
    every = list(dict.fromkeys(one for one in (own, further, *_below(base)) if one is not None))
    with ThreadPoolExecutor(_READERS) as pool:
        held = dict(zip(every, pool.map(lambda one: entries_of(one, cache), every), strict=True))
    together = functools.reduce(operator.or_, held.values(), Entries())
    if own is not None and held[own] == together:
        return own
    return commit_takedown(together, base, info={"of": base}).reference if len(together) else None


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


def _below(base: str) -> list[Takedown]:
    """Every committed takedown below the domain's folder."""
    folders = [storage.join(base, Takedown.kind, name) for name in storage.names(storage.join(base, Takedown.kind))]

    def opened(folder: str) -> Takedown | None:
        return Takedown.open(folder) if storage.exists(storage.join(folder, artifacts.MANIFEST)) else None

    with ThreadPoolExecutor(_READERS) as pool:
        return [one for one in pool.map(opened, folders) if one is not None]
