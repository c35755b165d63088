"""Manifests, digests, commit and resume: how a stage's output becomes immutable.

    <root>/<domain>/<kind>/<key>/            one output folder; key = what was asked for
        NNNNN.tar, img_emb/…, …              the files
        shards/NNNNN.json                    written after a shard's files: that shard is committed
        manifest.json                        written last: the whole folder is committed

``key`` digests the inputs and the configuration, so the same request finds the same folder: committed, it is skipped;
half done, it goes on at the first shard without a marker. ``digest`` digests the content, so a run that was killed and
resumed and one that was not can be held against each other.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from infra import storage
from infra.errors import IntegrityError, NotFoundError
from infra.storage import digest_stamps
from infra.storage import file_cache as caching

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_MARKERS_AT_ONCE = 16
_PLACES = frozenset({"uri", "folder"})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """One stored file: its name below the folder, hex sha256, and size in bytes."""

    name: str
    sha256: str
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A committed shard: its files, how many rows they hold, and what the worker counted and timed.

    ``folder`` is where its files are when they belong to an earlier version, from which this one took the shard over.
    """

    name: str
    rows: int
    files: tuple[File, ...]
    info: dict[str, Any]
    folder: str | None = None

    def taken_over(self, folder_uri: str) -> Self:
        """This shard of the folder at ``folder_uri`` as a shard of another version; its files stay where they are."""
        return dataclasses.replace(self, folder=self.folder or folder_uri)

    def file(self, suffix: str) -> File:
        """Its only file of that suffix. Raises ``ValueError`` when there is none, or more."""
        (found,) = (file for file in self.files if file.name.endswith(suffix))
        return found


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a committed folder holds and where it came from.

    ``identity`` is the part of the description that belongs to the content (the encoder, say) and enters the digest;
    ``info`` is what was counted and timed on the way and does not. ``checksum`` is of all of it but places.
    """

    kind: str
    key: str
    rows: int
    shards: tuple[Shard, ...]
    inputs: dict[str, dict[str, str]]
    config: dict[str, Any]
    identity: dict[str, Any]
    info: dict[str, Any]
    digest: str = ""
    created_at: str = ""
    schema_version: int = SCHEMA_VERSION
    checksum: str = ""  # empty in manifests of releases that did not write it

    @property
    def files(self) -> tuple[File, ...]:
        """Every file of the shards, in their order."""
        return tuple(file for shard in self.shards for file in shard.files)

    def content_digest(self) -> str:
        """Digest of kind, rows, files, inputs' digests and identity: independent of time, place and interruptions."""
        return digest_of(
            {
                "kind": self.kind,
                "rows": self.rows,
                "shards": [[shard.name, shard.rows, shard.files] for shard in self.shards],
                "inputs": {name: source["digest"] for name, source in self.inputs.items()},
                "identity": self.identity,
            }
        )

    def to_json(self) -> str:
        """Readable JSON, keys sorted, a shard a line."""
        text = json.dumps(dataclasses.replace(self, shards=()), indent=1, sort_keys=True, default=_plain)
        lines = ",".join(f"\n  {json.dumps(shard, sort_keys=True, default=_plain)}" for shard in self.shards)
        return text.replace('\n "shards": []', f'\n "shards": [{lines}\n ]', 1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Parse and check ``text``, naming ``where`` in the message. Raises ``IntegrityError``."""
        try:
            raw = json.loads(text)
            if raw["schema_version"] != SCHEMA_VERSION:
                raise IntegrityError(
                    f"{where} has schema version {raw['schema_version']}, this release reads {SCHEMA_VERSION}; "
                    "rebuild it, or use the release that wrote it"
                )
            checksum = _checksum(raw)
            raw["shards"] = tuple(_shard(shard) for shard in raw["shards"])
            manifest = cls(**raw)
            changed = manifest.digest != manifest.content_digest() or manifest.checksum not in ("", checksum)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{where} is not a manifest ({error}); delete its folder and run again") from error
        if changed:
            raise IntegrityError(f"{where} was changed after it was committed; delete its folder and run again")
        return manifest


class Stage:
    """A stage's output folder while it is being filled."""

    def __init__(
        self, base: str, kind: str, *, inputs: Mapping[str, Mapping[str, str]], config: Mapping[str, Any]
    ) -> None:
        """Name the folder for this request: ``base/kind/key``.

        Args:
            base: the domain's folder.
            kind: of artifact, and the folder below ``base``.
            inputs: for each input, its ``uri`` and ``digest``; only the digests enter the key.
            config: JSON-ready settings that decide the output (not how fast it is made).
        """
        self.kind = kind
        self.inputs = {name: dict(source) for name, source in inputs.items()}
        self.config = json.loads(canonical_json(config))
        digests = {name: source["digest"] for name, source in self.inputs.items()}
        self.key = digest_of({"kind": kind, "inputs": digests, "config": self.config})[:16]
        self.uri = storage.join(storage.absolute(base), kind, self.key)

    def committed(self) -> Manifest | None:
        """The manifest if this very request was committed before, else None."""
        uri = storage.join(self.uri, MANIFEST)
        return read_manifest(self.uri) if storage.exists(uri) else None

    def done(self) -> dict[str, Shard]:
        """The shards committed so far, by name."""
        folder = storage.join(self.uri, "shards")
        markers = [name for name in storage.names(folder) if name.endswith(".json") and not name.startswith(".")]
        names = [name.removesuffix(".json") for name in markers]
        with ThreadPoolExecutor(_MARKERS_AT_ONCE) as pool:  # from far away, one after another takes minutes
            return dict(zip(names, pool.map(lambda name: read_shard(self.uri, name), names), strict=True))

    def commit(
        self, shards: Iterable[Shard], *, identity: Mapping[str, Any] | None = None, info: Mapping[str, Any]
    ) -> Manifest:
        """Write the manifest, last of all, and return it."""
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
        manifest = dataclasses.replace(manifest, checksum=_checksum(json.loads(manifest.to_json())))
        storage.write_bytes(storage.join(self.uri, MANIFEST), manifest.to_json().encode())
        return manifest


def commit_shard(folder_uri: str, name: str, local: Path, *, rows: int, info: Mapping[str, Any]) -> Shard:
    """Store every file below ``local`` under ``folder_uri``, then the shard's marker. Runs on the worker.

    Files whose name ends in ``_stats.json`` hold timings: they are stored but not digested.
    """
    files = []
    for path in sorted(path for path in local.rglob("*") if path.is_file()):
        relative = path.relative_to(local).as_posix()
        storage.put(path, storage.join(folder_uri, relative))
        if not relative.endswith("_stats.json"):
            files.append(File(name=relative, sha256=storage.sha256(str(path)), bytes=path.stat().st_size))
    shard = Shard(name=name, rows=rows, files=tuple(files), info=json.loads(canonical_json(info)))
    marker = json.dumps(shard, indent=1, sort_keys=True, default=_plain)
    storage.write_bytes(storage.join(folder_uri, "shards", f"{name}.json"), marker.encode())
    return shard


def read_shard(folder_uri: str, name: str) -> Shard:
    """A shard's marker. Raises ``NotFoundError`` and ``IntegrityError``."""
    uri = storage.join(folder_uri, "shards", f"{name}.json")
    try:
        return _shard(json.loads(storage.read_bytes(uri)))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{uri} is damaged ({error}); delete it and run again") from error


def read_manifest(folder_uri: str) -> Manifest:
    """The manifest of a committed folder. Raises ``NotFoundError`` and ``IntegrityError``."""
    uri = storage.join(folder_uri, MANIFEST)
    try:
        return _manifest_of(uri, storage.modified(uri))
    except NotImplementedError:  # a store that does not tell, plain http say
        return Manifest.from_json(storage.read_bytes(uri), uri)
    except NotFoundError:
        if storage.exists(uri):  # raises what else is wrong: the bucket, the credentials
            raise
        raise NotFoundError(
            f"{folder_uri} holds no {MANIFEST}: it is no committed artifact; run the stage that makes it"
        ) from None


def fetch_shard(folder_uri: str, shard: Shard, suffix: str, cache: Path) -> Path:
    """A verified local path of a shard's only file of that suffix, wherever an earlier version keeps it."""
    return fetch_file(shard.folder or folder_uri, shard.file(suffix), cache)


def fetch_file(folder_uri: str, file: File, cache: Path) -> Path:
    """A verified local path of a stored file; remote ones are kept in ``cache`` under their digest.

    An unchanged file that was verified before is not hashed again (see ``infra.storage.digest_stamps``), so the cost
    does not depend on its size. A kept file that was damaged is fetched anew.

    Raises ``IntegrityError`` when the bytes differ from the committed digest.
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
        if storage.exists(uri):  # there, but not for us: that message says more
            raise
        missing = True
    except caching.DamagedError:
        missing = False
    if missing:
        raise IntegrityError(
            f"{uri} is missing though it was committed; restore it, or delete {folder_uri} and run again"
        )
    raise IntegrityError(
        f"{uri} differs from its committed digest {file.sha256[:12]}…; restore it, or delete {folder_uri} and run again"
    )


def digest_of(value: Any) -> str:
    """Hex sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; dataclasses become objects. Raises ``TypeError`` for what JSON lacks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)


@functools.lru_cache(maxsize=16)
def _manifest_of(uri: str, modified: float) -> Manifest:
    """One of thousands of shards takes a while to parse and to check, and a stage asks for a few again and again."""
    return Manifest.from_json(storage.read_bytes(uri), uri)


def _checksum(raw: dict[str, Any]) -> str:
    """Digest of everything in a manifest but where things lie, which may move: a byte that changed on disk shows."""
    return digest_of(_placeless({**raw, "checksum": ""}))


def _placeless(value: Any) -> Any:
    """A JSON value without what says where something is."""
    if isinstance(value, dict):
        return {name: _placeless(inner) for name, inner in value.items() if name not in _PLACES}
    return [_placeless(inner) for inner in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _shard(raw: dict[str, Any]) -> Shard:
    return Shard(**{**raw, "files": tuple(File(**file) for file in raw["files"])})
