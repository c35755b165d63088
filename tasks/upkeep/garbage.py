"""Collect: what no kept version refers to, listed, and deleted when told.

Kept is, of every registered name, what has an alias and the newest ``keep_versions``; what their manifests name as
inputs, and theirs in turn; and single files of other folders that a kept version has taken over. So is whatever is
younger than ``grace_s``, and what it refers to, in all domains of the root: it may belong to a run that is not over, or
was killed and will go on. So is what the domain has taken down, which binds whether or not a version was made with it.
What is kept is known by where it lies, however the root is spelled.

A root that was copied together with its registry is not collected: its versions still name the folders of the original,
so every folder of the copy would count as garbage.
"""

import dataclasses
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra import artifacts, logs, storage, uris
from infra.errors import InputError, IntegrityError, KNNDiffusionError, NotFoundError, StageError
from infra.registry import DATABASE_PREFIX, Registry
from infra.settings import Settings
from infra.storage import file_cache
from tasks.references.types import Takedown
from tasks.stage import base_of, stage_task
from tasks.upkeep.takedown import Entries, list_takedowns, read_entries

_KEY = re.compile(r"[0-9a-f]{16}")
_MARKER = re.compile(r"/shards/[^/]+\.json$")
_NO_DOMAINS = ("mlflow", "mlflow.db")
_LISTS = frozenset({"urls"})  # inputs that may be anywhere on the web
DAY_S = 86_400.0
_BLOCKED = "until then nothing is collected, for it may refer to anything"
_READERS = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """Files that no kept version refers to: (uri, bytes), and whether they are gone."""

    domain: str
    files: tuple[tuple[str, int], ...]
    deleted: bool

    @property
    def bytes(self) -> int:
        """What they hold together."""
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
    """List what can go below the domain's folder; delete it unless ``dry_run``. The caller holds the domain's lease.

    Versions are marked before the first deletion, so that what goes was never lost, and a collection that ended early
    goes on when it is run again. Manifests go first and shard markers next: what is half deleted is taken for committed
    by nobody. ``check`` is called before every deletion, and raises when the lease is lost: another may have made a
    champion meanwhile. With image shards, this machine's copies and what was derived of pictures go from its cache,
    before the markers that list them, and what was in use then the next time.

    Raises:
        StageError: nothing of the domain is registered: more likely the wrong registry than a domain of garbage.
        IntegrityError: a kept version's manifest cannot be read or is not there, so what it refers to is not known;
            or a version of the domain is registered outside the root.
    """
    registry = Registry(settings)
    versions = [version for kind in ("database", "generator") for version in registry.versions(kind)]
    base = base_of(settings, domain)
    folders = _folders(base)
    if folders and not any(version["name"] == DATABASE_PREFIX + domain for version in versions):
        raise StageError(
            f"no version of {domain} is registered at {uris.masked(settings.tracking_uri)}, so all of {base} would go; "
            "name the registry that it was registered in, or delete the folder yourself"
        )
    places = {storage.canonical(folder) for folder in folders}
    _require_own_root(domain, versions, places, settings)
    since = time.time() - grace_s
    young = {folder for folder, files in folders.items() if max(file.modified for file in files) > since}
    committed = filter(_is_artifact, young)
    named = _kept(versions, keep_versions, storage.canonical(base))
    if folders and places.isdisjoint(named):
        raise StageError(
            f"no version of {domain} registered at {uris.masked(settings.tracking_uri)} refers to a folder of {base}; "
            "all of it would be deleted: name the registry that it was registered in, or delete the folder yourself"
        )
    takedowns = _widest_takedowns(base, settings.cache_folder)
    kept = reachable([*named, *committed, *takedowns, *_young_elsewhere(settings, domain, since)])
    to_delete: list[storage.StoredObject] = []
    for folder, files in folders.items():
        place = storage.canonical(folder)
        if place not in kept.folders and folder not in young:
            to_delete += _unreferenced(folder, files, kept.files[place])
    to_delete.sort(key=_deletion_order)
    if not dry_run:
        check()
        _mark(registry, versions, to_delete)
        digests = _digests(to_delete) if any(file.uri.endswith(".tar") for file in to_delete) else None
        _forget(digests, settings.cache_folder)
        for file in to_delete:
            check()
            storage.remove(file.uri)
        if digests:
            _forget(digests, settings.cache_folder)  # what was read again meanwhile
        check()
        _remove_empty(folders, {file.uri for file in to_delete})
    garbage = Garbage(domain=domain, files=tuple((file.uri, file.bytes) for file in to_delete), deleted=not dry_run)
    state = "deleted" if garbage.deleted else "would go; nothing was deleted"
    logs.get("stage").info("%-11s %7d files %d bytes of %s  %s", "gc", len(to_delete), garbage.bytes, domain, state)
    return garbage


@dataclasses.dataclass(frozen=True, slots=True)
class Reachable:
    """Folders kept as they are, and of other folders the names of files that are kept."""

    folders: set[str]
    files: defaultdict[str, set[str]]


def reachable(roots: Iterable[str]) -> Reachable:
    """What the versions at ``roots`` refer to, themselves included."""
    kept = Reachable(set(), defaultdict(set))
    waiting = [storage.canonical(uri) for uri in roots]
    while waiting:
        uri = waiting.pop()
        if uri in kept.folders:
            continue
        if not _is_artifact(uri):
            if _KEY.fullmatch(uri.rpartition("/")[2]) and storage.list_names(uri):
                raise IntegrityError(f"{uri} has lost its {artifacts.MANIFEST}; restore it; {_BLOCKED}")
            continue
        try:
            manifest = artifacts.read_manifest(uri)
        except IntegrityError as error:
            raise IntegrityError(f"{error}; {_BLOCKED}") from error
        kept.folders.add(uri)
        waiting += [storage.canonical(source["uri"]) for name, source in manifest.inputs.items() if name not in _LISTS]
        for shard in manifest.shards:
            if shard.folder is not None:
                kept.files[storage.canonical(shard.folder)].update(file.name for file in shard.files)
        for file in manifest.info.get("seen", ()):
            _keep_seen(kept, file)
    return kept


def _is_artifact(uri: str) -> bool:
    """Whether a manifest is there: not below a file of weights, nor where a version's folder is gone."""
    try:
        return storage.exists(storage.join(uri, artifacts.MANIFEST))
    except InputError:
        return False


def _keep_seen(kept: Reachable, entry: dict[str, Any]) -> None:
    """A file of ``info["seen"]``; after a union its folder lies below an artifact's."""
    folder, name = storage.canonical(entry["folder"]), entry["file"]["name"]
    above, _, last = folder.rpartition("/")
    kept.files[folder].add(name)
    kept.files[above].add(f"{last}/{name}")


def _kept(versions: list[dict[str, Any]], keep_versions: int, base: str) -> list[str]:
    """The folders of versions that have an alias or are among the newest of their name.

    Raises ``IntegrityError`` where one was lost, not collected; but for other domains that are gone altogether.
    """
    named: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for version in versions:
        named[version["name"]].append(version)
    own = DATABASE_PREFIX + base.rpartition("/")[2]
    kept = []
    for name, several in named.items():
        newest = {version["version"] for version in sorted(several, key=lambda v: -v["version"])[:keep_versions]}
        for version in several:
            if not version.get("uri") or not (version["aliases"] or version["version"] in newest):
                continue
            uri = storage.canonical(version["uri"])
            if _is_artifact(uri):
                kept.append(uri)
                continue
            collected = version.get("collected") and not version["aliases"]  # whoever gave it one knew it to be there
            if not collected and (name == own or uri.startswith(base + "/") or storage.exists(uri)):
                raise IntegrityError(
                    f"{name} version {version['version']} was registered at {uri}, where no {artifacts.MANIFEST} is; "
                    f"restore it, name the root that it lies in, or delete it in the registry; {_BLOCKED}"
                )
    return kept


def _require_own_root(domain: str, versions: list[dict[str, Any]], places: set[str], settings: Settings) -> None:
    """Raise ``IntegrityError`` if a version of the domain that was not collected is registered outside the root.

    ``places`` are the canonical folders of the domain: a link below the root may lead out of it.
    """
    base = storage.canonical(base_of(settings, domain))
    for version in versions:
        uri = storage.canonical(version.get("uri") or base)
        own = version["name"] == DATABASE_PREFIX + domain or f"/{uri}".rsplit("/", 3)[-3:-2] == [domain]
        collected = version.get("collected") and not version["aliases"]
        if own and not collected and uri not in places and not f"{uri}/".startswith(f"{base}/"):
            raise IntegrityError(
                f"{version['name']} version {version['version']} was registered at {uri}, outside of the root "
                f"{storage.canonical(settings.root)}; collect its own root (--root {uri.rsplit('/', 3)[0]}), or delete "
                f"the version in the registry if this root replaces that one; {_BLOCKED}"
            )


def domains_of(root: str) -> list[str]:
    """The folders below the root that hold image shards or databases."""
    names = [name for name in storage.list_names(root) if name not in _NO_DOMAINS]
    return [name for name in names if {"images", "database"} & set(storage.list_names(storage.join(root, name)))]


def _young_elsewhere(settings: Settings, domain: str, since: float) -> list[str]:
    """Artifacts of the root's other domains that were committed lately: a run there may not have registered yet."""
    bases = [base_of(settings, other) for other in domains_of(settings.root) if other != domain]
    kinds = [storage.join(base, kind) for base in bases for kind in storage.list_names(base)]
    folders = [storage.join(kind, key) for kind in kinds for key in storage.list_names(kind) if _KEY.fullmatch(key)]

    def is_young(folder: str) -> bool:
        try:
            return storage.modified(storage.join(folder, artifacts.MANIFEST)) > since
        except NotFoundError:
            return False

    with ThreadPoolExecutor(_READERS) as pool:
        return [folder for folder, young in zip(folders, pool.map(is_young, folders), strict=True) if young]


def _folders(base: str) -> dict[str, list[storage.StoredObject]]:
    """Every artifact folder ``base/kind/key``, committed or not, and its files."""
    found: defaultdict[str, list[storage.StoredObject]] = defaultdict(list)
    for file in storage.walk(base):
        kind, _, rest = file.uri.removeprefix(base).lstrip("/").partition("/")
        key, slash, _ = rest.partition("/")
        if slash and _KEY.fullmatch(key):
            found[storage.join(base, kind, key)].append(file)
    return dict(found)


def _unreferenced(folder: str, files: list[storage.StoredObject], kept: set[str]) -> list[storage.StoredObject]:
    """The files of a folder but those ``kept``, by name, and the markers of shards that are kept whole.

    Without its marker a shard would be made again, over files that a version relies on.
    """
    if artifacts.MANIFEST in kept:
        return []  # a kept version keeps its folder: figures and timings lie beside what the manifest lists
    going = []
    for file in files:
        name = file.uri.removeprefix(folder).lstrip("/")
        if name in kept or (kept and _is_marker(name) and _names(file.uri) <= kept):
            continue
        going.append(file)
    return going


def _digests(going: list[storage.StoredObject]) -> set[str]:
    """The sha256 of remote files that go, under which caches keep them: by their markers, which go with them."""
    markers = [file.uri for file in going if _MARKER.search(file.uri) and not storage.is_local(file.uri)]
    with ThreadPoolExecutor(_READERS) as pool:
        return {str(file["sha256"]) for files in pool.map(_listed, markers) for file in files}


def _forget(digests: set[str] | None, folder: Path) -> None:
    """Have the cache forget pictures of these digests, if any go, and what it owes.

    One that may not be written keeps nothing else from going.
    """
    try:
        if digests is not None or file_cache.has_pending_purges(folder):
            file_cache.purge(digests or (), folder, derived=digests is not None)
    except OSError as error:
        told = "%-11s %s cannot forget what goes (%s): copies of it may stay there; delete that folder"
        logs.get("stage").warning(told, "gc", folder, error.strerror)


def _widest_takedowns(base: str, folder: Path) -> list[str]:
    """The domain's lists that no other holds whole: lists add up, and what they name together binds.

    Where one cannot be read, all of them.
    """
    uris = list_takedowns(base)
    try:
        listed = [(read_entries(Takedown.open(uri), folder), uri) for uri in uris]
    except KNNDiffusionError:
        return uris
    kept: list[tuple[Entries, str]] = []
    for entries, uri in sorted(listed, key=lambda one: -len(one[0])):
        if all(len(entries - wider) for wider, _ in kept):
            kept.append((entries, uri))
    return [uri for _, uri in kept]


def _names(marker_uri: str) -> set[str]:
    """The files that a shard's marker lists; one that cannot be read lists what nobody keeps."""
    return {file["name"] for file in _listed(marker_uri)} or {marker_uri}


def _listed(marker_uri: str) -> list[dict[str, Any]]:
    try:
        return list(json.loads(storage.read_bytes(marker_uri))["files"])
    except (ValueError, KeyError, TypeError):
        return []


def _is_marker(name: str) -> bool:
    return _MARKER.fullmatch(f"/{name}") is not None


def _deletion_order(file: storage.StoredObject) -> tuple[int, float, str]:
    """When a file goes: manifests first, the youngest before those that it refers to, and markers next."""
    if file.uri.endswith("/" + artifacts.MANIFEST):
        return 0, -file.modified, file.uri
    return 1 if _MARKER.search(file.uri) else 2, 0.0, file.uri


def _remove_empty(folders: dict[str, list[storage.StoredObject]], gone: set[str]) -> None:
    """Folders that lost all of their files."""
    for folder, files in folders.items():
        if all(file.uri in gone for file in files):
            storage.remove(folder)


def _mark(registry: Registry, versions: list[dict[str, Any]], gone: list[storage.StoredObject]) -> None:
    """Say in the registry which versions cannot be pulled any more, once all of ``gone`` is."""
    uris = {storage.canonical(file.uri) for file in gone if file.uri.endswith(artifacts.MANIFEST)}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    for version in versions:
        uri = version.get("uri")
        if uri and storage.join(storage.canonical(uri), artifacts.MANIFEST) in uris:
            registry.tag(version["name"], version["version"], "collected", when)
