"""Manifest records: the files of a committed folder, validated when they are parsed.

A manifest may come from a folder or a registry of another user. The name of a ``File`` never leads out of its folder,
and its digest is well-formed. Code may therefore join both to a local path without further checks.
"""

import dataclasses
import hashlib
import json
from typing import Any, Self

from infra import validation
from infra.errors import IntegrityError

SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 256 << 20
"""Maximum size in bytes of a manifest that is read; a manifest of 100,000 shards has about 70 MB."""
MAX_MARKER_BYTES = 16 << 20
"""Maximum size in bytes of a shard marker that is read."""
_LOCATION_FIELDS = frozenset({"uri", "folder"})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """Stored file: its name relative to the folder, hex sha256 and size in bytes."""

    name: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a name outside the folder, a malformed digest or an invalid size."""
        validation.file_name(self.name)
        validation.digest(self.sha256, "the sha256 of a file")
        validation.count(self.bytes, "the size of a file")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Committed shard.

    Attributes:
        name: Name of the shard.
        rows: Number of rows.
        files: Its files.
        info: Counts and timings of the worker.
        folder: Folder of the earlier version that stores the files, if the shard is reused; else None.
    """

    name: str
    rows: int
    files: tuple[File, ...]
    info: dict[str, Any]
    folder: str | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an invalid name, number of rows, ``info`` or folder."""
        validation.label(self.name, "the name of a shard")
        validation.count(self.rows, "the rows of a shard")
        validation.mapping(self.info, "the info of a shard")
        if self.folder is not None:
            validation.uri(self.folder, "the folder of a shard")

    def reused_from(self, folder_uri: str) -> Self:
        """Return this shard of ``folder_uri`` as a shard of another version. Its files are not copied."""
        return dataclasses.replace(self, folder=self.folder or folder_uri)

    def file(self, suffix: str) -> File:
        """Return the only file with ``suffix``. Raises ``IntegrityError`` if there is not exactly one."""
        found = [file for file in self.files if file.name.endswith(suffix)]
        if len(found) != 1:
            raise IntegrityError(f"shard {self.name} has {len(found)} files *{suffix} instead of 1; rebuild it")
        return found[0]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Content and provenance of a committed folder.

    ``identity`` describes the content (e.g. the encoder) and is part of the digest. ``info`` contains counts and
    timings and is not. ``checksum`` covers every field except locations.
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
        """All files of the shards, in order."""
        return tuple(file for shard in self.shards for file in shard.files)

    def content_digest(self) -> str:
        """Return the digest of kind, rows, files, digests of the inputs, and identity.

        It does not depend on time, location and interruptions.
        """
        return digest_of(
            {
                "kind": self.kind,
                "rows": self.rows,
                "shards": [[shard.name, shard.rows, shard.files] for shard in self.shards],
                "inputs": {name: source["digest"] for name, source in self.inputs.items()},
                "identity": self.identity,
            }
        )

    def check(self) -> None:
        """Raise ``ValueError`` for a field of the wrong type or range, and for duplicate names."""
        for name in ("kind", "key"):
            validation.label(getattr(self, name), f"the {name}")
        for name in ("created_at", "digest", "checksum"):
            validation.text(getattr(self, name), name, longest=64)
        for name in ("inputs", "config", "identity", "info"):
            validation.mapping(getattr(self, name), name)
        for name, source in self.inputs.items():
            if validation.mapping(source, "an input").keys() != {"uri", "digest"}:
                raise ValueError(f"the input {validation.shown(name)} must have exactly a uri and a digest")
            validation.uri(source["uri"], "the uri of an input")
            validation.digest(source["digest"], "the digest of an input")
        if validation.count(self.rows, "rows") != sum(shard.rows for shard in self.shards):
            raise ValueError(f"rows is {self.rows}, but its shards have {sum(shard.rows for shard in self.shards)}")
        if len({shard.name.casefold() for shard in self.shards}) < len(self.shards):
            raise ValueError("two shards have the same name, or names that differ only in case")
        validation.distinct_files(
            (shard.folder, file.name, file.sha256) for shard in self.shards for file in shard.files
        )

    def to_json(self) -> str:
        """Return readable JSON with sorted keys and one shard per line."""
        text = json.dumps(dataclasses.replace(self, shards=()), indent=1, sort_keys=True, default=_plain)
        lines = ",".join(f"\n  {json.dumps(shard, sort_keys=True, default=_plain)}" for shard in self.shards)
        return text.replace('\n "shards": []', f'\n "shards": [{lines}\n ]', 1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Parse and check ``text``. Raises ``IntegrityError``, with ``where`` in the message."""
        try:
            raw = validation.mapping(validation.parse_json(text, MAX_MANIFEST_BYTES), "a manifest")
            if validation.count(raw["schema_version"], "the schema version") != SCHEMA_VERSION:
                raise IntegrityError(
                    f"{where} has schema version {raw['schema_version']}, but this release reads {SCHEMA_VERSION}; "
                    "rebuild it, or use the release that wrote it"
                )
            checksum = checksum_of(raw)
            raw["shards"] = tuple(_shard(shard) for shard in validation.sequence(raw["shards"], "shards"))
            manifest = cls(**raw)
            if manifest.digest != manifest.content_digest() or manifest.checksum not in ("", checksum):
                raise IntegrityError(f"{where} was changed after it was committed; delete its folder and run again")
            manifest.check()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{where} is not a manifest ({error}); delete its folder and run again") from error
        return manifest


def digest_of(value: Any) -> str:
    """Return the hex sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no spaces; dataclasses become objects. Raises ``TypeError`` for other types."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)


def checksum_of(raw: dict[str, Any]) -> str:
    """Return the digest of all fields of a manifest except locations, which may change. It detects any changed byte."""
    return digest_of(_without_locations({**raw, "checksum": ""}))


def _without_locations(value: Any) -> Any:
    """Return a JSON value without its location fields."""
    # Most values of a manifest are scalars; skipping the call for them saves time.
    if isinstance(value, dict):
        return {
            name: _without_locations(inner) if isinstance(inner, (dict, list)) else inner
            for name, inner in value.items()
            if name not in _LOCATION_FIELDS
        }
    return [_without_locations(inner) for inner in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def parse_shard(data: str | bytes, name: str) -> Shard:
    """Parse the marker of the shard ``name``. Raises ``ValueError``, ``KeyError`` and ``TypeError``."""
    shard = _shard(validation.parse_json(data, MAX_MARKER_BYTES))
    if shard.name != name:
        raise ValueError(f"its shard name is {shard.name}, not {name}")
    return shard


def marker_json(shard: Shard) -> str:
    """Return a shard's marker as readable JSON with sorted keys."""
    return json.dumps(shard, indent=1, sort_keys=True, default=_plain)


def _shard(raw: Any) -> Shard:
    fields = validation.mapping(raw, "a shard")
    files = validation.sequence(fields["files"], "the files of a shard")
    return Shard(**{**fields, "files": tuple(File(**validation.mapping(file, "a file")) for file in files)})
