"""Immutable stage outputs: manifests, digests, commit and resume.

    <root>/<domain>/<kind>/<key>/            one output folder; key = digest of the request
        NNNNN.tar, img_emb/…, …              the files
        shards/NNNNN.json                    written after a shard's files: commits the shard
        manifest.json                        written last: commits the whole folder

``key`` digests the inputs and the configuration, so the same request finds the same folder. A committed folder is
skipped; an incomplete one resumes at the first shard without a marker. ``digest`` digests the content, so an
interrupted and resumed run can be compared with an uninterrupted one.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import IntegrityError, NotFoundError
from infra.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_MARKER_BYTES,
    File,
    Manifest,
    Shard,
    canonical_json,
    checksum_of,
    digest_of,
    marker_json,
    parse_shard,
)
from infra.storage import digest_stamps
from infra.storage import file_cache as caching

__all__ = [
    "MANIFEST",
    "ArtifactBuilder",
    "File",
    "Manifest",
    "Shard",
    "canonical_json",
    "commit_shard",
    "digest_of",
    "fetch_file",
    "fetch_shard",
    "read_manifest",
    "read_shard",
]  # fmt: skip

MANIFEST = "manifest.json"
_PARALLEL_READS = 16


class ArtifactBuilder:
    """Builder of the output folder of a stage."""

    def __init__(
        self, base: str, kind: str, *, inputs: Mapping[str, Mapping[str, str]], config: Mapping[str, Any]
    ) -> None:
        """Compute the folder of this request: ``base/kind/key``.

        Args:
            base: Folder of the domain.
            kind: Kind of artifact, and name of the folder below ``base``.
            inputs: ``uri`` and ``digest`` of each input. Only the digests enter the key.
            config: JSON-ready settings that determine the output, but not those that only affect speed.
        """
        self.kind = kind
        self.inputs = {name: dict(source) for name, source in inputs.items()}
        self.config = json.loads(canonical_json(config))
        digests = {name: source["digest"] for name, source in self.inputs.items()}
        self.key = digest_of({"kind": kind, "inputs": digests, "config": self.config})[:16]
        self.uri = storage.join(storage.absolute(base), kind, self.key)

    def committed_manifest(self) -> Manifest | None:
        """Return the manifest if this request is already committed, else None."""
        uri = storage.join(self.uri, MANIFEST)
        return read_manifest(self.uri) if storage.exists(uri) else None

    def committed_shards(self) -> dict[str, Shard]:
        """Return the committed shards by name."""
        folder = storage.join(self.uri, "shards")
        markers = [name for name in storage.list_names(folder) if name.endswith(".json") and not name.startswith(".")]
        names = [name.removesuffix(".json") for name in markers]
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:  # sequential reads of a remote store take minutes
            return dict(zip(names, pool.map(lambda name: read_shard(self.uri, name), names), strict=True))

    def reopen(self, names: Iterable[str]) -> None:
        """Remove the markers of the named shards, so that they are rebuilt. Their files and the manifest remain."""
        for name in names:
            storage.remove(storage.join(self.uri, "shards", f"{name}.json"))

    def commit(
        self, shards: Iterable[Shard], *, identity: Mapping[str, Any] | None = None, info: Mapping[str, Any]
    ) -> Manifest:
        """Write the manifest, which commits the folder, and return it."""
        ordered = tuple(sorted(shards, key=lambda shard: shard.name))
        manifest = Manifest(
            kind=self.kind,
            key=self.key,
            rows=sum(shard.rows for shard in ordered),
            shards=ordered,
            inputs=self.inputs,
            config=self.config,
            identity=json.loads(canonical_json(identity or {})),
            info=json.loads(canonical_json(info)),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        manifest = dataclasses.replace(manifest, digest=manifest.content_digest())
        manifest = dataclasses.replace(manifest, checksum=checksum_of(json.loads(manifest.to_json())))
        manifest.check()
        storage.write_bytes(storage.join(self.uri, MANIFEST), manifest.to_json().encode())
        return manifest


def commit_shard(folder_uri: str, name: str, local: Path, *, rows: int, info: Mapping[str, Any]) -> Shard:
    """Store every file below ``local`` under ``folder_uri``, then the shard's marker. Runs on the worker.

    Files named ``*_stats.json`` contain timings. They are stored, but they are not part of the digest.
    """
    files = []
    for path in sorted(path for path in local.rglob("*") if path.is_file()):
        relative = path.relative_to(local).as_posix()
        storage.put(path, storage.join(folder_uri, relative))
        if not relative.endswith("_stats.json"):
            files.append(File(name=relative, sha256=storage.sha256(str(path)), bytes=path.stat().st_size))
    shard = Shard(name=name, rows=rows, files=tuple(files), info=json.loads(canonical_json(info)))
    storage.write_bytes(storage.join(folder_uri, "shards", f"{name}.json"), marker_json(shard).encode())
    return shard


def read_shard(folder_uri: str, name: str) -> Shard:
    """Read a shard's marker. Raises ``NotFoundError`` and ``IntegrityError``."""
    uri = storage.join(folder_uri, "shards", f"{name}.json")
    try:
        return parse_shard(storage.read_bytes(uri, MAX_MARKER_BYTES), name)
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{uri} is damaged ({error}); delete it and run again") from error


def read_manifest(folder_uri: str) -> Manifest:
    """Read the manifest of a committed folder. Raises ``NotFoundError`` and ``IntegrityError``."""
    uri = storage.join(folder_uri, MANIFEST)
    try:
        return _manifest_of(uri, storage.modified(uri))
    except NotImplementedError:  # the store has no modification times, e.g. plain HTTP
        return Manifest.from_json(storage.read_bytes(uri, MAX_MANIFEST_BYTES), uri)
    except NotFoundError:
        if storage.exists(uri):  # raises the underlying error, such as a wrong bucket or credentials
            raise
        raise NotFoundError(
            f"{folder_uri} has no {MANIFEST}: it is not a committed artifact; run the stage that makes it"
        ) from None


def fetch_shard(folder_uri: str, shard: Shard, suffix: str, cache: Path) -> Path:
    """Return a verified local path of the shard's only file with ``suffix``, which an earlier version may store."""
    return fetch_file(shard.folder or folder_uri, shard.file(suffix), cache)


def fetch_file(folder_uri: str, file: File, cache: Path) -> Path:
    """Return a verified local path of a stored file; remote files are cached in ``cache`` by digest.

    An unchanged file that was verified before is not hashed again (see ``infra.storage.digest_stamps``), so the cost
    does not depend on its size. A damaged cached file is fetched again.

    Raises ``IntegrityError`` if the bytes differ from the committed digest.
    """
    uri = storage.join(folder_uri, file.name)
    try:
        if not storage.is_local(uri):
            return caching.fetch(uri, file.sha256, file.bytes, cache)
        path = storage.local_path(uri)
        if digest_stamps.is_verified(path, file.sha256, file.bytes, cache):
            return path
        missing = not path.exists()
    except NotFoundError:
        if storage.exists(uri):  # it exists but cannot be read: the original message has the reason
            raise
        missing = True
    except caching.DigestMismatchError:
        missing = False
    if missing:
        raise IntegrityError(
            f"{uri} is missing though it was committed; restore it, or delete {folder_uri} and run again"
        )
    raise IntegrityError(
        f"{uri} differs from its committed digest {file.sha256[:12]}…; restore it, or delete {folder_uri} and run again"
    )


@functools.lru_cache(maxsize=16)
def _manifest_of(uri: str, modified: float) -> Manifest:
    """Parse a manifest. Cached: a stage reads the same manifest often, and the check of thousands of shards is slow."""
    return Manifest.from_json(storage.read_bytes(uri, MAX_MANIFEST_BYTES), uri)
