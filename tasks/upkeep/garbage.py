"""Garbage collection: list, and optionally delete, files that no retained version references.

See :mod:`tasks.upkeep.retention` for what is retained.
"""

import dataclasses
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra import artifacts, logs, storage, uris
from infra.errors import StageError
from infra.registry import Registry
from infra.registry_tags import DATABASE_PREFIX
from infra.settings import Settings
from infra.storage import eviction
from tasks.references.domain_folder import DomainFolder
from tasks.stage import stage_task
from tasks.upkeep.retention import (
    KEY,
    is_artifact,
    reachable,
    recent_elsewhere,
    require_own_root,
    retained_versions,
    widest_takedowns,
)

_MARKER = re.compile(r"/shards/[^/]+\.json$")
DAY_S = 86_400.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """Files (uri, size in bytes) that no retained version references, and whether they were deleted."""

    domain: str
    files: tuple[tuple[str, int], ...]
    deleted: bool

    @property
    def bytes(self) -> int:
        """Total size in bytes."""
        return sum(size for _, size in self.files)


@stage_task(name="collect")
def collect(
    domain: str,
    settings: Settings,
    *,
    keep_versions: int = 2,
    dry_run: bool = True,
    grace_s: float = DAY_S,
    check: Callable[[], None] = lambda: None,
) -> Garbage:
    """List garbage in the domain's folder, and delete it unless ``dry_run``. The caller must hold the domain's lease.

    Versions are marked as collected before the first deletion, so that deleted versions do not count as lost, and an
    interrupted collection resumes when it is run again. Manifests are deleted first and shard markers next, so that a
    partly deleted artifact never counts as committed. ``check`` is called before every deletion. It raises if the
    lease is lost, because another process may have registered a champion. If image shards are deleted, their copies
    and derived files are first purged from the local cache; files in use are purged the next time.

    Raises:
        StageError: no version of the domain is registered, which suggests the wrong registry.
        IntegrityError: the manifest of a retained version is missing or unreadable, so its references are unknown;
            or a version of the domain is registered outside the root.
    """
    registry = Registry(settings)
    versions = [version for kind in ("database", "generator") for version in registry.versions(kind)]
    base = DomainFolder.of(settings, domain).uri
    folders = _folders(base)
    if folders and not any(version["name"] == DATABASE_PREFIX + domain for version in versions):
        raise StageError(
            f"no version of {domain} is registered at {uris.masked(settings.tracking_uri)}, so all of {base} would be "
            "deleted; set the registry that contains the domain, or delete the folder yourself"
        )
    places = {storage.canonical(folder) for folder in folders}
    require_own_root(domain, versions, places, settings)
    since = time.time() - grace_s
    recent = {folder for folder, files in folders.items() if max(file.modified for file in files) > since}
    committed = filter(is_artifact, recent)
    named = retained_versions(versions, keep_versions, storage.canonical(base))
    if folders and places.isdisjoint(named):
        raise StageError(
            f"no version of {domain} registered at {uris.masked(settings.tracking_uri)} refers to a folder of {base}, "
            "so all of it would be deleted; set the registry that contains the domain, or delete the folder yourself"
        )
    takedowns = widest_takedowns(DomainFolder.of(settings, domain))
    retained = reachable([*named, *committed, *takedowns, *recent_elsewhere(settings, domain, since)])
    to_delete: list[storage.StoredObject] = []
    for folder, files in folders.items():
        place = storage.canonical(folder)
        if place not in retained.folders and folder not in recent:
            to_delete += _unreferenced(folder, files, retained.files[place])
    to_delete.sort(key=_deletion_order)
    if not dry_run:
        check()
        _mark(registry, versions, to_delete)
        digests = _digests(to_delete) if any(file.uri.endswith(".tar") for file in to_delete) else None
        _purge_cache(digests, settings.cache_folder)
        for file in to_delete:
            check()
            storage.remove(file.uri)
        if digests:
            _purge_cache(digests, settings.cache_folder)  # files that were cached again during the deletion
        check()
        _remove_empty(folders, {file.uri for file in to_delete})
    garbage = Garbage(domain=domain, files=tuple((file.uri, file.bytes) for file in to_delete), deleted=not dry_run)
    state = "deleted" if garbage.deleted else "listed; nothing was deleted"
    logs.get("stage").info("%-11s %7d files %d bytes of %s  %s", "gc", len(to_delete), garbage.bytes, domain, state)
    return garbage


def _folders(base: str) -> dict[str, list[storage.StoredObject]]:
    """Map every artifact folder ``base/kind/key``, committed or not, to its files."""
    found: defaultdict[str, list[storage.StoredObject]] = defaultdict(list)
    for file in storage.walk(base):
        kind, _, rest = file.uri.removeprefix(base).lstrip("/").partition("/")
        key, slash, _ = rest.partition("/")
        if slash and KEY.fullmatch(key):
            found[storage.join(base, kind, key)].append(file)
    return dict(found)


def _unreferenced(folder: str, files: list[storage.StoredObject], retained: set[str]) -> list[storage.StoredObject]:
    """Return the files of a folder except those ``retained`` (by name) and the markers of fully retained shards.

    Without its marker, a shard would be built again over files that a version references.
    """
    if artifacts.MANIFEST in retained:
        return []  # a retained folder also contains figures and timings that the manifest does not list
    garbage = []
    for file in files:
        name = file.uri.removeprefix(folder).lstrip("/")
        if name in retained or (retained and _is_marker(name) and _marker_names(file.uri) <= retained):
            continue
        garbage.append(file)
    return garbage


def _digests(garbage: list[storage.StoredObject]) -> set[str]:
    """Read the sha256 of remote files to delete from their shard markers; caches store files by these digests."""
    markers = [file.uri for file in garbage if _MARKER.search(file.uri) and not storage.is_local(file.uri)]
    return {str(file["sha256"]) for files in storage.read_all(_marker_files, markers) for file in files}


def _purge_cache(digests: set[str] | None, folder: Path) -> None:
    """Purge these digests, and any pending purges, from the local cache.

    An error is logged and does not stop the collection.
    """
    try:
        if digests is not None or eviction.has_pending_purges(folder):
            eviction.purge(digests or (), folder, derived=digests is not None)
    except OSError as error:
        message = "%-11s cannot purge deleted files from the cache %s: %s; delete that folder, which may contain copies"
        logs.get("stage").warning(message, "gc", folder, error.strerror)


def _marker_names(marker_uri: str) -> set[str]:
    """Names of the files in a shard's marker. For an unreadable marker, a name that is never retained."""
    return {file["name"] for file in _marker_files(marker_uri)} or {marker_uri}


def _marker_files(marker_uri: str) -> list[dict[str, Any]]:
    try:
        return list(json.loads(storage.read_bytes(marker_uri))["files"])
    except (ValueError, KeyError, TypeError):
        return []


def _is_marker(name: str) -> bool:
    return _MARKER.fullmatch(f"/{name}") is not None


def _deletion_order(file: storage.StoredObject) -> tuple[int, float, str]:
    """Sort key: manifests (newest first, so that referrers precede their inputs), then markers, then other files."""
    if file.uri.endswith("/" + artifacts.MANIFEST):
        return 0, -file.modified, file.uri
    return 1 if _MARKER.search(file.uri) else 2, 0.0, file.uri


def _remove_empty(folders: dict[str, list[storage.StoredObject]], gone: set[str]) -> None:
    """Remove folders whose files were all deleted."""
    for folder, files in folders.items():
        if all(file.uri in gone for file in files):
            storage.remove(folder)


def _mark(registry: Registry, versions: list[dict[str, Any]], gone: list[storage.StoredObject]) -> None:
    """Tag the registry versions whose manifest is among the files ``gone`` as collected."""
    uris = {storage.canonical(file.uri) for file in gone if file.uri.endswith(artifacts.MANIFEST)}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    for version in versions:
        uri = version.get("uri")
        if uri and storage.join(storage.canonical(uri), artifacts.MANIFEST) in uris:
            registry.tag(version["name"], version["version"], "collected", when)
