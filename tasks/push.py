"""Registration of folders that ``pull`` made: the reverse of :mod:`tasks.pull`.

The files are copied below the root, where databases of the domain are. The manifests come last, so an interrupted push
resumes. The version is only a candidate: its promotion measures the gates.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from infra import artifacts, storage
from infra.errors import InputError, IntegrityError, NotFoundError
from infra.registry_tags import DATABASE_PREFIX, champion_uri
from infra.settings import Settings
from infra.storage.lease import lease
from tasks.pull import EMBEDDINGS, PARTS, TAKEDOWN
from tasks.references.domain_folder import DomainFolder
from tasks.references.domain_name import require_domain
from tasks.references.types import DatabaseVersion, Generator
from tasks.register import RegistrationResult, register_database, register_generator

_AGAIN = "run pull again, which resumes"


def kind_of(folder: Path) -> str:
    """Return the kind of artifact in a folder: database or generator. Raises ``NotFoundError`` if there is none."""
    kind = _read(folder).kind
    if kind not in (DatabaseVersion.kind, Generator.kind):
        raise NotFoundError(f"{folder} holds {kind}; give a folder that pull made of a database or a generator")
    return kind


def push_database(folder: Path, domain: str, settings: Settings, *, trust: bool = False) -> RegistrationResult:
    """Copy a database with its embeddings and takedowns below the root, and register it as a candidate.

    A registered version is trusted like code: its manifest names folders to read and an encoder to load. So a folder
    outside of the root needs ``trust``.

    Raises:
        InputError: the folder needs ``trust``.
        NotFoundError: the folder, or a part of it, has no manifest.
        IntegrityError: a file is missing or differs from its digest. Nothing has been registered.
    """
    require_domain(domain)
    _require_trusted(folder, settings, trust)
    target = DomainFolder.of(settings, domain).uri
    manifest = _read(folder)
    parts = {name: folder / name for name in (EMBEDDINGS, TAKEDOWN) if name in manifest.inputs}
    for place in (*parts.values(), folder):
        _require_complete(place)
    with lease(target, holder=f"push {domain}"):
        inputs = {name: dict(source) for name, source in manifest.inputs.items()}
        for name, place in parts.items():
            inputs[name]["uri"] = _copy(place, _read(place), target)
        uri = _copy(folder, dataclasses.replace(manifest, inputs=inputs), target)
        return register_database(domain, DatabaseVersion.open(uri), settings, promote=False)


def push_generator(
    folder: Path, database: str | None, settings: Settings, *, trust: bool = False
) -> RegistrationResult:
    """Copy a generator below the root, and register it as a candidate. ``database`` is the domain of its default one.

    Raises as :func:`push_database`, and ``InputError`` if neither ``database`` nor the manifest names a domain.
    """
    _require_trusted(folder, settings, trust)
    _require_complete(folder)
    manifest = _read(folder)
    domain = database or _domain_in(manifest)
    if domain is None:
        raise InputError(f"the default database of {folder} is unknown; give its domain (--database NAME)")
    require_domain(domain)
    target = DomainFolder.of(settings, domain).uri
    with lease(target, holder=f"push {domain}"):
        uri = _copy(folder, manifest, target)
        return register_generator(
            Generator.open(uri), champion_uri(DATABASE_PREFIX + domain), {}, settings, promote=False
        )


def _require_trusted(folder: Path, settings: Settings, trust: bool) -> None:
    """Raise ``InputError`` for a folder outside of the root, unless the user trusts it."""
    if not trust and not storage.is_below(str(folder.absolute()), settings.root):
        raise InputError(
            f"{folder} is outside of the root, and a registered version is trusted like code; "
            "if you trust it, use --trust (trust=True)"
        )


def _read(folder: Path) -> artifacts.Manifest:
    if not (folder / artifacts.MANIFEST).is_file():
        raise NotFoundError(f"{folder} has no {artifacts.MANIFEST}: it is not from pull, or incomplete; {_AGAIN}")
    return artifacts.read_manifest(str(folder.absolute()))


def _require_complete(folder: Path) -> None:
    """Raise ``IntegrityError`` unless every file of the manifest is there and has its digest."""
    for path, file in _files(folder, _read(folder)):
        if not path.is_file():
            raise IntegrityError(f"{path} is missing; {_AGAIN}")
        if path.stat().st_size != file.bytes or storage.sha256(str(path)) != file.sha256:
            raise IntegrityError(f"{path} differs from its digest {file.sha256[:12]}…; {_AGAIN}")


def _files(folder: Path, manifest: artifacts.Manifest) -> Iterator[tuple[Path, artifacts.File]]:
    """Yield each file with its path. The folder may have been moved since the pull."""
    for shard in manifest.shards:
        place = folder if shard.folder is None else folder / PARTS / PurePosixPath(shard.folder).name
        for file in shard.files:
            yield place / file.name, file


def _copy(folder: Path, manifest: artifacts.Manifest, target: str) -> str:
    """Copy the files and then the manifest to ``<target>/<kind>/<key>``, and return that folder.

    A folder that is committed there already is not changed.
    """
    uri = storage.join(target, manifest.kind, manifest.key)
    if storage.exists(storage.join(uri, artifacts.MANIFEST)):
        if artifacts.read_manifest(uri).digest != manifest.digest:
            raise IntegrityError(f"{uri} holds other files than {folder}; push to another name")
        return uri
    for path, file in _files(folder, manifest):
        place = storage.join(uri, file.name)
        if not (storage.exists(place) and storage.size(place) == file.bytes and storage.sha256(place) == file.sha256):
            storage.put(path, place)
    shards = tuple(dataclasses.replace(shard, folder=None) for shard in manifest.shards)
    text = dataclasses.replace(manifest, shards=shards).to_json()
    storage.write_bytes(storage.join(uri, artifacts.MANIFEST), text.encode())
    return uri


def _domain_in(manifest: artifacts.Manifest) -> str | None:
    """Return the domain of the database that a generator was trained on, from the location in its manifest."""
    try:
        return str(manifest.inputs["database"]["uri"]).rsplit("/", 3)[-3]
    except (KeyError, IndexError):
        return None
