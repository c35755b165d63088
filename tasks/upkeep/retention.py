"""Artifacts and files that garbage collection retains.

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
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from infra import artifacts, storage
from infra.errors import InputError, IntegrityError, KNNDiffusionError, NotFoundError
from infra.registry_tags import DATABASE_PREFIX
from infra.settings import Settings
from tasks.references.domain_folder import DomainFolder
from tasks.references.takedown import Entries, list_takedowns, read_entries
from tasks.references.types import Takedown

KEY = re.compile(r"[0-9a-f]{16}")
"""Name of an artifact's folder."""
_NO_DOMAINS = ("mlflow", "mlflow.db")
_LISTS = frozenset({"urls"})  # inputs outside the root, e.g. on the web
_BLOCKED = "garbage collection is blocked until then, because the manifest may reference any file"


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
        if not is_artifact(uri):
            if KEY.fullmatch(uri.rpartition("/")[2]) and storage.list_names(uri):
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


def is_artifact(uri: str) -> bool:
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


def retained_versions(versions: list[dict[str, Any]], keep_versions: int, base: str) -> list[str]:
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
            if is_artifact(uri):
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


def require_own_root(domain: str, versions: list[dict[str, Any]], places: set[str], settings: Settings) -> None:
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


def recent_elsewhere(settings: Settings, domain: str, since: float) -> list[str]:
    """Return recent artifacts of the root's other domains, where a running flow may not have registered them yet."""
    bases = [DomainFolder.of(settings, other).uri for other in domains_of(settings.root) if other != domain]
    kinds = [storage.join(base, kind) for base in bases for kind in storage.list_names(base)]
    folders = [storage.join(kind, key) for kind in kinds for key in storage.list_names(kind) if KEY.fullmatch(key)]

    def is_recent(folder: str) -> bool:
        try:
            return storage.modified(storage.join(folder, artifacts.MANIFEST)) > since
        except NotFoundError:
            return False

    recents = storage.read_all(is_recent, folders)
    return [folder for folder, recent in zip(folders, recents, strict=True) if recent]


def widest_takedowns(folder: DomainFolder) -> list[str]:
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
