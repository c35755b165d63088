"""Garbage collection: list, and optionally delete, files that no retained version references.

Retained are:

- of every registered name, the versions with an alias and the newest ``keep_versions``;
- the inputs that their manifests name, recursively, and single files of other folders that they reuse;
- artifacts of all domains that are younger than ``grace_s``, with everything they reference, because they may belong
  to a run that is not finished or that will be resumed;
- the domain's takedowns, which apply whether or not a version was built with them.

Locations are compared in canonical form. A root that was copied together with its registry is not collected: its
versions still name the folders of the original, so every folder of the copy would count as garbage.
"""

import dataclasses
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra import artifacts, logs, storage, uris
from infra.errors import InputError, IntegrityError, KNNDiffusionError, NotFoundError, StageError
from infra.registry import Registry
from infra.registry_tags import DATABASE_PREFIX
from infra.settings import Settings
from infra.storage import eviction
from tasks.references.domain_folder import DomainFolder
from tasks.references.takedown import Entries, list_takedowns, read_entries
from tasks.references.types import Takedown
from tasks.stage import stage_task

_KEY = re.compile(r"[0-9a-f]{16}")
_MARKER = re.compile(r"/shards/[^/]+\.json$")
_NO_DOMAINS = ("mlflow", "mlflow.db")
_LISTS = frozenset({"urls"})  # inputs outside the root, e.g. on the web
DAY_S = 86_400.0
_BLOCKED = "garbage collection is blocked until then, because the manifest may reference any file"


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
    _require_own_root(domain, versions, places, settings)
    since = time.time() - grace_s
    recent = {folder for folder, files in folders.items() if max(file.modified for file in files) > since}
    committed = filter(_is_artifact, recent)
    named = _retained_versions(versions, keep_versions, storage.canonical(base))
    if folders and places.isdisjoint(named):
        raise StageError(
            f"no version of {domain} registered at {uris.masked(settings.tracking_uri)} refers to a folder of {base}, "
            "so all of it would be deleted; set the registry that contains the domain, or delete the folder yourself"
        )
    takedowns = _widest_takedowns(DomainFolder.of(settings, domain))
    retained = reachable([*named, *committed, *takedowns, *_recent_elsewhere(settings, domain, since)])
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


@dataclasses.dataclass(frozen=True, slots=True)
class Reachable:
    """Folders that are retained whole, and the names of retained files in other folders."""

    folders: set[str]
    files: defaultdict[str, set[str]]


def reachable(roots: Iterable[str]) -> Reachable:
    """Return everything that the artifacts at ``roots`` reference, including themselves."""
    retained = Reachable(set(), defaultdict(set))
    pending = [storage.canonical(uri) for uri in roots]
    while pending:
        uri = pending.pop()
        if uri in retained.folders:
            continue
        if not _is_artifact(uri):
            if _KEY.fullmatch(uri.rpartition("/")[2]) and storage.list_names(uri):
                raise IntegrityError(f"{uri} has no {artifacts.MANIFEST}; restore it; {_BLOCKED}")
            continue
        try:
            manifest = artifacts.read_manifest(uri)
        except IntegrityError as error:
            raise IntegrityError(f"{error}; {_BLOCKED}") from error
        retained.folders.add(uri)
        pending += [storage.canonical(source["uri"]) for name, source in manifest.inputs.items() if name not in _LISTS]
        for shard in manifest.shards:
            if shard.folder is not None:
                retained.files[storage.canonical(shard.folder)].update(file.name for file in shard.files)
        for file in manifest.info.get("seen", ()):
            _retain_seen(retained, file)
    return retained


def _is_artifact(uri: str) -> bool:
    """Return True if ``uri`` has a manifest. False for a path below a weights file and for a missing folder."""
    try:
        return storage.exists(storage.join(uri, artifacts.MANIFEST))
    except InputError:
        return False


def _retain_seen(retained: Reachable, entry: dict[str, Any]) -> None:
    """Retain a file of ``info["seen"]``. After a union, its folder is a subfolder of an artifact."""
    folder, name = storage.canonical(entry["folder"]), entry["file"]["name"]
    above, _, last = folder.rpartition("/")
    retained.files[folder].add(name)
    retained.files[above].add(f"{last}/{name}")


def _retained_versions(versions: list[dict[str, Any]], keep_versions: int, base: str) -> list[str]:
    """Return the folders of versions that have an alias or are among the newest ``keep_versions`` of their name.

    Raises ``IntegrityError`` if a manifest is missing although the version was not collected. Other domains whose
    folder is missing are ignored.
    """
    named: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for version in versions:
        named[version["name"]].append(version)
    domain_name = DATABASE_PREFIX + base.rpartition("/")[2]
    retained = []
    for name, same_name in named.items():
        newest = {version["version"] for version in sorted(same_name, key=lambda v: -v["version"])[:keep_versions]}
        for version in same_name:
            if not version.get("uri") or not (version["aliases"] or version["version"] in newest):
                continue
            uri = storage.canonical(version["uri"])
            if _is_artifact(uri):
                retained.append(uri)
                continue
            # An alias proves that the files existed again after the collection.
            collected = version.get("collected") and not version["aliases"]
            if not collected and (name == domain_name or uri.startswith(base + "/") or storage.exists(uri)):
                raise IntegrityError(
                    f"{name} version {version['version']} was registered at {uri}, which has no {artifacts.MANIFEST}; "
                    f"restore it, set the root that contains it, or delete the version in the registry; {_BLOCKED}"
                )
    return retained


def _require_own_root(domain: str, versions: list[dict[str, Any]], places: set[str], settings: Settings) -> None:
    """Raise ``IntegrityError`` if a version of the domain that was not collected is registered outside the root.

    ``places`` are the canonical folders of the domain, since a link in the root may point outside it.
    """
    base = storage.canonical(DomainFolder.of(settings, domain).uri)
    for version in versions:
        uri = storage.canonical(version.get("uri") or base)
        own = version["name"] == DATABASE_PREFIX + domain or f"/{uri}".rsplit("/", 3)[-3:-2] == [domain]
        collected = version.get("collected") and not version["aliases"]
        if own and not collected and uri not in places and not f"{uri}/".startswith(f"{base}/"):
            raise IntegrityError(
                f"{version['name']} version {version['version']} was registered at {uri}, outside the root "
                f"{storage.canonical(settings.root)}; collect its own root (--root {uri.rsplit('/', 3)[0]}), or delete "
                f"the version in the registry if this root replaces that one; {_BLOCKED}"
            )


def domains_of(root: str) -> list[str]:
    """Return the names of the folders in the root that contain image shards or databases."""
    names = [name for name in storage.list_names(root) if name not in _NO_DOMAINS]
    return [name for name in names if {"images", "database"} & set(storage.list_names(storage.join(root, name)))]


def _recent_elsewhere(settings: Settings, domain: str, since: float) -> list[str]:
    """Return recent artifacts of the root's other domains, where a running flow may not have registered them yet."""
    bases = [DomainFolder.of(settings, other).uri for other in domains_of(settings.root) if other != domain]
    kinds = [storage.join(base, kind) for base in bases for kind in storage.list_names(base)]
    folders = [storage.join(kind, key) for kind in kinds for key in storage.list_names(kind) if _KEY.fullmatch(key)]

    def is_recent(folder: str) -> bool:
        try:
            return storage.modified(storage.join(folder, artifacts.MANIFEST)) > since
        except NotFoundError:
            return False

    recents = storage.read_all(is_recent, folders)
    return [folder for folder, recent in zip(folders, recents, strict=True) if recent]


def _folders(base: str) -> dict[str, list[storage.StoredObject]]:
    """Map every artifact folder ``base/kind/key``, committed or not, to its files."""
    found: defaultdict[str, list[storage.StoredObject]] = defaultdict(list)
    for file in storage.walk(base):
        kind, _, rest = file.uri.removeprefix(base).lstrip("/").partition("/")
        key, slash, _ = rest.partition("/")
        if slash and _KEY.fullmatch(key):
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


def _widest_takedowns(folder: DomainFolder) -> list[str]:
    """Return the domain's takedowns that are not contained in another one; all of them if one is unreadable.

    Takedowns are cumulative, so the others are redundant.
    """
    uris = list_takedowns(folder)
    try:
        listed = [(read_entries(Takedown.open(uri), folder.cache), uri) for uri in uris]
    except KNNDiffusionError:
        return uris
    widest: list[tuple[Entries, str]] = []
    for entries, uri in sorted(listed, key=lambda pair: -len(pair[0])):
        if all(len(entries - wider) for wider, _ in widest):
            widest.append((entries, uri))
    return [uri for _, uri in widest]


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
