"""Manifest records: what a committed folder lists, checked when it is parsed.

A manifest may come from a folder or a registry that somebody else wrote. A ``File`` cannot hold a name that leaves its
folder or a digest that is not one, so code that joins them to a local path needs no check of its own.
"""

import dataclasses
import hashlib
import json
from typing import Any, Self

from infra import validation
from infra.errors import IntegrityError

SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 256 << 20
"""Of a manifest that is read; one of 100,000 shards has about 70 MB."""
MAX_MARKER_BYTES = 16 << 20
"""Of a shard marker that is read."""
_PLACES = frozenset({"uri", "folder"})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """One stored file: its name below the folder, hex sha256, and size in bytes."""

    name: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        """Refuse a name outside the folder, and what is no digest or size. Raises ``ValueError``."""
        validation.file_name(self.name)
        validation.digest(self.sha256, "the sha256 of a file")
        validation.count(self.bytes, "the size of a file")


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

    def __post_init__(self) -> None:
        """Refuse a name that is no file name, and rows or a folder that cannot be. Raises ``ValueError``."""
        validation.label(self.name, "the name of a shard")
        validation.count(self.rows, "the rows of a shard")
        validation.mapping(self.info, "the info of a shard")
        if self.folder is not None:
            validation.uri(self.folder, "the folder of a shard")

    def reused_from(self, folder_uri: str) -> Self:
        """This shard of the folder at ``folder_uri`` as a shard of another version; its files stay where they are."""
        return dataclasses.replace(self, folder=self.folder or folder_uri)

    def file(self, suffix: str) -> File:
        """Its only file of that suffix. Raises ``IntegrityError`` when there is none, or more."""
        found = [file for file in self.files if file.name.endswith(suffix)]
        if len(found) != 1:
            raise IntegrityError(f"shard {self.name} has {len(found)} files *{suffix}, not 1; make it again")
        return found[0]


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

    def check(self) -> None:
        """Raise ``ValueError`` for a field of the wrong type or range, and for names that are not unique."""
        for name in ("kind", "key"):
            validation.label(getattr(self, name), f"the {name}")
        for name in ("created_at", "digest", "checksum"):
            validation.text(getattr(self, name), name, longest=64)
        for name in ("inputs", "config", "identity", "info"):
            validation.mapping(getattr(self, name), name)
        for name, source in self.inputs.items():
            if validation.mapping(source, "an input").keys() != {"uri", "digest"}:
                raise ValueError(f"the input {validation.shown(name)} must have a uri and a digest, nothing else")
            validation.uri(source["uri"], "the uri of an input")
            validation.digest(source["digest"], "the digest of an input")
        if validation.count(self.rows, "rows") != sum(shard.rows for shard in self.shards):
            raise ValueError(f"rows is {self.rows}, its shards have {sum(shard.rows for shard in self.shards)}")
        if len({shard.name.casefold() for shard in self.shards}) < len(self.shards):
            raise ValueError("the name of a shard comes twice, or differs from another in case alone")
        validation.distinct_files(
            (shard.folder, file.name, file.sha256) for shard in self.shards for file in shard.files
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
            raw = validation.mapping(validation.parse_json(text, MAX_MANIFEST_BYTES), "a manifest")
            if validation.count(raw["schema_version"], "the schema version") != SCHEMA_VERSION:
                raise IntegrityError(
                    f"{where} has schema version {raw['schema_version']}, this release reads {SCHEMA_VERSION}; "
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
    """Hex sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; dataclasses become objects. Raises ``TypeError`` for what JSON lacks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)


def checksum_of(raw: dict[str, Any]) -> str:
    """Digest of everything in a manifest but where things lie, which may move: a byte that changed on disk shows."""
    return digest_of(_placeless({**raw, "checksum": ""}))


def _placeless(value: Any) -> Any:
    """A JSON value without what says where something is."""
    # Values that hold nothing are most of a manifest: no call is made for them.
    if isinstance(value, dict):
        return {
            name: _placeless(inner) if isinstance(inner, (dict, list)) else inner
            for name, inner in value.items()
            if name not in _PLACES
        }
    return [_placeless(inner) for inner in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def parse_shard(data: str | bytes, name: str) -> Shard:
    """Parse the marker of the shard ``name``. Raises ``ValueError``, ``KeyError`` and ``TypeError``."""
    shard = _shard(validation.parse_json(data, MAX_MARKER_BYTES))
    if shard.name != name:
        raise ValueError(f"it names the shard {shard.name}")
    return shard


def marker_json(shard: Shard) -> str:
    """Readable JSON of a shard's marker, keys sorted."""
    return json.dumps(shard, indent=1, sort_keys=True, default=_plain)


def _shard(raw: Any) -> Shard:
    fields = validation.mapping(raw, "a shard")
    files = validation.sequence(fields["files"], "the files of a shard")
    return Shard(**{**fields, "files": tuple(File(**validation.mapping(file, "a file")) for file in files)})
