"""Copies of databases and generators in one folder that needs neither network nor registry.

    FOLDER/manifest.json          the manifest of the artifact, written last
    FOLDER/…                      its files
    FOLDER/parts/<digest>/…       files that it shares with earlier versions
    FOLDER/embeddings/…           of a database: the embeddings that it indexes, in the same layout
    FOLDER/takedown/…             of a database: the list of images taken down, if there is one

The digest of a manifest covers no locations, so the copy has the digest of the original.
"""

import dataclasses
import hashlib
import shutil
from pathlib import Path

from infra import artifacts, storage
from infra.errors import IntegrityError
from infra.registry import PulledVersion, Registry
from infra.settings import Settings
from tasks.references.lineage import embeddings_of, takedown_of
from tasks.references.types import DatabaseVersion

EMBEDDINGS = "embeddings"
TAKEDOWN = "takedown"
PARTS = "parts"


def pull_database(reference: str, folder: Path, settings: Settings) -> artifacts.Manifest:
    """Copy a database and its embeddings to ``folder``. Files that are there already and intact are not copied again.

    Raises:
        NotFoundError: there is no such database.
        IntegrityError: a file differs from its digest.
    """
    pulled = Registry(settings).pull(reference, kind=DatabaseVersion.kind)
    version = DatabaseVersion.of(pulled.manifest, pulled.folder_uri)
    rows = embeddings_of(version)
    to = folder.absolute()
    _copy(rows.manifest(), rows.uri, to / EMBEDDINGS, settings.cache_folder)
    inputs = {name: dict(source) for name, source in pulled.manifest.inputs.items()}
    inputs[EMBEDDINGS]["uri"] = str(to / EMBEDDINGS)
    if (takedown := takedown_of(version)) is not None:
        _copy(takedown.manifest(), takedown.uri, to / TAKEDOWN, settings.cache_folder)
        inputs[TAKEDOWN]["uri"] = str(to / TAKEDOWN)
    manifest = dataclasses.replace(pulled.manifest, inputs=inputs)
    return _copy(manifest, pulled.folder_uri, to, settings.cache_folder)


def pull_generator(reference: str, folder: Path, settings: Settings) -> artifacts.Manifest:
    """Copy a generator to ``folder``, as :func:`pull_database`."""
    pulled = Registry(settings).pull(reference, kind="generator")
    return _copy(pulled.manifest, _files_folder(pulled), folder.absolute(), settings.cache_folder)


def _files_folder(pulled: PulledVersion) -> str:
    return pulled.folder_uri if pulled.local is None else str(pulled.local / "artifacts")


def _copy(manifest: artifacts.Manifest, source: str, to: Path, cache: Path) -> artifacts.Manifest:
    """Copy every file of a manifest, verified, and then the manifest with the new locations."""
    shards = []
    for shard in manifest.shards:
        place = to if shard.folder is None else to / PARTS / hashlib.sha256(shard.folder.encode()).hexdigest()[:16]
        for file in shard.files:
            _copy_file(shard.folder or source, file, place / file.name, cache)
        shards.append(dataclasses.replace(shard, folder=None if shard.folder is None else str(place)))
    copied = dataclasses.replace(manifest, shards=tuple(shards))
    storage.write_bytes(str(to / artifacts.MANIFEST), copied.to_json().encode())
    return copied


def _copy_file(source: str, file: artifacts.File, target: Path, cache: Path) -> None:
    """Copy a file unless an intact copy exists. The name appears only once the copy is complete and verified."""
    if target.exists() and target.stat().st_size == file.bytes and storage.sha256(str(target)) == file.sha256:
        return
    verified = artifacts.fetch_file(source, file, cache)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    shutil.copyfile(verified, partial)
    if storage.sha256(str(partial)) != file.sha256:
        partial.unlink()
        raise IntegrityError(f"the copy {target} differs from its digest {file.sha256[:12]}…; check the disk and retry")
    partial.replace(target)
