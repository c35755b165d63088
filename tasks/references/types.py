"""References: what stages hand to each other. A reference is a URI, a row count and a digest, never data.

    url list -> ImageShards -> EmbeddingShards -> DatabaseVersion -> Neighbours -> Generator

Opening a reference reads its manifest; its rows stay where they are until a worker streams them.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import pyarrow as pa
from pydantic import TypeAdapter

from infra import artifacts, storage
from infra.errors import EncoderMismatchError, InputError, IntegrityError
from model.encoder.identity import EMBEDDED, EncoderIdentity
from tasks.references.manifest_fields import check_fields

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)
else:
    Config = TypeVar("Config")

_TRUST = "if you trust whoever made it like code that you run, add --trust (in Python and flows: trust=True)"

# One row of metadata_NNNNN.parquet; position in the file is the row of img_emb_NNNNN.npy beside it.
METADATA_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # position in the shard; the global row adds the rows of the shards before it
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
        """The reference to what ``manifest``, found at ``uri``, describes.

        Raises ``InputError`` on another kind, ``IntegrityError`` on fields of the wrong type or range.
        """
        if manifest.kind != cls.kind:
            raise InputError(f"{uri} holds {manifest.kind}, but {cls.kind} is wanted here")
        check_fields(manifest, uri)
        return cls(uri=uri, rows=manifest.rows, digest=manifest.digest, confined_to=confined_to)

    @classmethod
    def open(cls, uri: str, *, confined_to: str | None = None) -> Self:
        """The reference to a committed folder. Raises ``NotFoundError``, ``IntegrityError``, ``InputError``."""
        return cls.of(artifacts.read_manifest(uri), uri, confined_to=confined_to)

    def manifest(self) -> artifacts.Manifest:
        """The manifest behind this reference.

        Raises:
            IntegrityError: it is no longer the same.
            InputError: it is not trusted and names files or an encoder that only a trusted one may name.
        """
        manifest = artifacts.read_manifest(self.uri)
        if manifest.digest != self.digest:
            raise IntegrityError(f"{self.uri} is no longer {self.digest[:12]}…; name the version meant")
        if self.confined_to is not None:
            for folder in [*(shard.folder for shard in manifest.shards), *_history_folders(manifest)]:
                self.require_inside(folder or self.uri)
            if "encoder" in manifest.identity:
                self.require_known(encoder_of(manifest))
        return manifest

    def require_inside(self, uri: str) -> None:
        """Raise ``InputError`` if this artifact is not trusted and ``uri`` is outside of the folder of its own."""
        if self.confined_to is not None and not storage.is_below(uri, self.confined_to):
            raise InputError(f"{self.uri} refers to {uri}, outside of its own root {self.confined_to}; {_TRUST}")

    def require_known(self, encoder: EncoderIdentity) -> None:
        """Raise ``InputError`` if this artifact is not trusted and ``encoder`` is not the bundled one."""
        if self.confined_to is not None and encoder.name != EMBEDDED:
            raise InputError(
                f"{self.uri} names the encoder {encoder.name}, and would have it loaded or downloaded; {_TRUST}"
            )

    def as_input(self) -> dict[str, str]:
        """How this reference stands in the manifest of what is made from it."""
        return {"uri": self.uri, "digest": self.digest}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageShards(Reference):
    """img2dataset's webdataset output: ``NNNNN.tar``, ``NNNNN.parquet``, ``NNNNN_stats.json``. Rows are images.

    Whole shards may stand for some of their pictures: then the identity, which goes along with whatever is grown from
    them, says which (``tasks/upkeep/merge.py``).
    """

    kind: ClassVar[str] = "images"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingShards(Reference):
    """``img_emb/img_emb_NNNNN.npy`` (n, D) float16 unit rows and ``metadata/metadata_NNNNN.parquet``."""

    kind: ClassVar[str] = "embeddings"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DatabaseVersion(Reference):
    """``index/NNNNN.faiss`` over embedding shards that stay where they are. Immutable; a change is a new version."""

    kind: ClassVar[str] = "database"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Takedown(Reference):
    """``takedown.parquet``: every url, sha256 and key that a domain may never show again. Rows are entries."""

    kind: ClassVar[str] = "takedown"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours(Reference):
    """``NNNNN.npy`` (n, K) int64 rows of a database for every row of embedding shards, itself excluded."""

    kind: ClassVar[str] = "neighbours"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generator(Reference):
    """A diffusers folder under ``pipeline/``. Rows are the images it was trained on."""

    kind: ClassVar[str] = "generator"


def domain_of(database: DatabaseVersion) -> str:
    """The name of the domain whose folder holds the version."""
    return storage.join(database.uri).rsplit("/", 3)[-3]


def encoder_of(manifest: artifacts.Manifest) -> EncoderIdentity:
    """The encoder whose space this artifact lives in. Raises ``IntegrityError`` when the manifest names none."""
    try:
        return EncoderIdentity(**manifest.identity["encoder"])
    except (KeyError, TypeError) as error:
        raise IntegrityError(
            f"the manifest of {manifest.kind} {manifest.key} names no encoder; build it again"
        ) from error


def require_same_encoder(**manifests: artifacts.Manifest) -> EncoderIdentity:
    """The encoder that all of them share. Raises ``EncoderMismatchError`` naming the two that differ."""
    (first_name, first), *others = ((name, encoder_of(manifest)) for name, manifest in manifests.items())
    for name, encoder in others:
        if not encoder.same_space(first):
            raise EncoderMismatchError(
                f"{first_name} was made by {first}, {name} by {encoder}: their embeddings do not compare; "
                "rebuild one with the other's encoder"
            )
    return first


def config_from_manifest(of: type[Config], stored: Mapping[str, Any]) -> Config:
    """A config dataclass from what a manifest keeps of it; what it does not keep is as by default."""
    names = {field.name for field in dataclasses.fields(of)}
    return TypeAdapter(of).validate_python({name: value for name, value in stored.items() if name in names})


def config_to_dict(config: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A config dataclass as JSON-ready settings, less those that only decide how fast the output is made."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in without}


def _history_folders(manifest: artifacts.Manifest) -> list[str]:
    """Return the folders of the URL history's files (``tasks/references/url_history.py``)."""
    return [file["folder"] for file in manifest.info.get("seen", ())]


Made = TypeVar("Made", bound=Reference)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StageResult(Generic[Made]):
    """What a stage returns: the reference, and whether it was there already."""

    reference: Made
    skipped: bool
    seconds: float
    note: str = ""  # one clause for the log line
