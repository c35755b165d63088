"""References that stages pass to each other. A reference is a URI, a row count and a digest, never data.

    URL list -> ImageShards -> EmbeddingShards -> DatabaseVersion -> Neighbours -> Generator

Opening a reference reads its manifest only. The rows are read when a worker streams them.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import pyarrow as pa
from pydantic import TypeAdapter

from infra import artifacts, storage
from infra.errors import EncoderMismatchError, InputError, IntegrityError
from infra.key_fields import key_settings
from model.encoder.identity import BUNDLED_ENCODER, EncoderIdentity
from tasks.references.manifest_fields import check_fields

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)
else:
    Config = TypeVar("Config")

_TRUST = "if you trust whoever made it like code that you run, add --trust (in Python and flows: trust=True)"

# One row of metadata_NNNNN.parquet. Its position in the file is the row number in img_emb_NNNNN.npy.
METADATA_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # position in the shard; the global row number adds the rows of all earlier shards
        ("key", pa.string()),
        ("url", pa.string()),
        ("sha256", pa.string()),  # of the bytes as downloaded
        ("width", pa.int32()),  # px, as stored
        ("height", pa.int32()),
        ("status", pa.string()),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A committed, immutable artifact. ``kind`` is also the name of its folder below the domain.

    ``confined_to`` is None for a trusted artifact. Otherwise it is the only folder in which the artifact's files and
    inputs may be, and only the bundled encoder is loaded for it (see ``tasks/references/trust.py``).
    """

    kind: ClassVar[str]
    uri: str
    rows: int
    digest: str
    confined_to: str | None = dataclasses.field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, manifest: artifacts.Manifest, uri: str, *, confined_to: str | None = None) -> Self:
        """Return the reference to the artifact at ``uri`` with the given manifest.

        Raises:
            InputError: the artifact is of another kind.
            IntegrityError: a field has the wrong type or range.
        """
        if manifest.kind != cls.kind:
            raise InputError(f"{uri} is an artifact of kind {manifest.kind}; give one of kind {cls.kind}")
        check_fields(manifest, uri)
        return cls(uri=uri, rows=manifest.rows, digest=manifest.digest, confined_to=confined_to)

    @classmethod
    def open(cls, uri: str, *, confined_to: str | None = None) -> Self:
        """Return the reference to a committed folder. Raises ``NotFoundError``, ``IntegrityError``, ``InputError``."""
        return cls.of(artifacts.read_manifest(uri), uri, confined_to=confined_to)

    def manifest(self) -> artifacts.Manifest:
        """Return the manifest of this artifact.

        Raises:
            IntegrityError: it has changed since the reference was made.
            InputError: the artifact is not trusted and refers to files or an encoder that require trust.
        """
        manifest = artifacts.read_manifest(self.uri)
        if manifest.digest != self.digest:
            raise IntegrityError(
                f"{self.uri} has changed: its digest is no longer {self.digest[:12]}…; give the version to use"
            )
        if self.confined_to is not None:
            for folder in [*(shard.folder for shard in manifest.shards), *_history_folders(manifest)]:
                self.require_inside(folder or self.uri)
            if "encoder" in manifest.identity:
                self.require_known(encoder_of(manifest))
        return manifest

    def require_inside(self, uri: str) -> None:
        """Raise ``InputError`` if this artifact is not trusted and ``uri`` is outside its own root."""
        if self.confined_to is not None and not storage.is_below(uri, self.confined_to):
            raise InputError(f"{self.uri} refers to {uri}, outside its own root {self.confined_to}; {_TRUST}")

    def require_known(self, encoder: EncoderIdentity) -> None:
        """Raise ``InputError`` if this artifact is not trusted and ``encoder`` is not the bundled one."""
        if self.confined_to is not None and encoder.name != BUNDLED_ENCODER:
            raise InputError(
                f"{self.uri} names the encoder {encoder.name}, which would be loaded or downloaded; {_TRUST}"
            )

    def as_input(self) -> dict[str, str]:
        """Return the entry for this artifact in the ``inputs`` of a manifest."""
        return {"uri": self.uri, "digest": self.digest}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageShards(Reference):
    """Webdataset output of img2dataset: ``NNNNN.tar``, ``NNNNN.parquet``, ``NNNNN_stats.json``. Rows are images.

    A version may use only some images of its shards. The manifest's identity then records which ones, and versions
    that extend it inherit that record (``tasks/upkeep/merge.py``).
    """

    kind: ClassVar[str] = "images"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingShards(Reference):
    """``img_emb/img_emb_NNNNN.npy`` (n, D) float16 unit rows and ``metadata/metadata_NNNNN.parquet``."""

    kind: ClassVar[str] = "embeddings"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseVersion(Reference):
    """``index/NNNNN.faiss`` over embedding shards, which are not copied. Immutable: every change is a new version."""

    kind: ClassVar[str] = "database"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Takedown(Reference):
    """``takedown.parquet``: every url, sha256 and key that a domain must never show again. Rows are entries."""

    kind: ClassVar[str] = "takedown"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours(Reference):
    """``NNNNN.npy``: (n, K) int64 database row ids for every row of embedding shards, excluding the row itself."""

    kind: ClassVar[str] = "neighbours"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generator(Reference):
    """A diffusers folder under ``pipeline/``. Rows are the training images."""

    kind: ClassVar[str] = "generator"


def domain_of(database: DatabaseVersion) -> str:
    """Return the name of the domain whose folder contains the version."""
    return storage.join(database.uri).rsplit("/", 3)[-3]


def encoder_of(manifest: artifacts.Manifest) -> EncoderIdentity:
    """Return the encoder that made the artifact's embeddings. Raises ``IntegrityError`` if the manifest names none."""
    try:
        return EncoderIdentity(**manifest.identity["encoder"])
    except (KeyError, TypeError) as error:
        raise IntegrityError(
            f"the manifest of {manifest.kind} {manifest.key} names no encoder; build it again"
        ) from error


def require_same_encoder(**manifests: artifacts.Manifest) -> EncoderIdentity:
    """Return the encoder that all manifests share. Raises ``EncoderMismatchError`` naming the two that differ."""
    (first_name, first), *others = ((name, encoder_of(manifest)) for name, manifest in manifests.items())
    for name, encoder in others:
        if not encoder.same_space(first):
            raise EncoderMismatchError(
                f"{first_name} was made by {first}, {name} by {encoder}: their embeddings are not comparable; "
                "rebuild one with the other's encoder"
            )
    return first


def config_from_manifest(of: type[Config], stored: Mapping[str, Any]) -> Config:
    """Return a config dataclass with the values that a manifest stores; other fields get their defaults."""
    names = {field.name for field in dataclasses.fields(of)}
    return TypeAdapter(of).validate_python({name: value for name, value in stored.items() if name in names})


def config_to_dict(config: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a config dataclass as the settings of a stage's key, except those in ``without``.

    Those affect speed only. Fields may also be left out by their metadata, see :mod:`infra.key_fields`.
    """
    return {name: value for name, value in key_settings(config).items() if name not in without}


def _history_folders(manifest: artifacts.Manifest) -> list[str]:
    """Return the folders of the URL history's files (``tasks/references/url_history.py``)."""
    return [file["folder"] for file in manifest.info.get("seen", ())]


Made = TypeVar("Made", bound=Reference)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StageResult(Generic[Made]):
    """Result of a stage: the reference, and whether the output was already committed."""

    reference: Made
    skipped: bool
    seconds: float
    note: str = ""  # one clause for the log line
