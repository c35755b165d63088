"""Types and ranges of the values that stages store in a manifest's ``identity`` and ``info``.

``infra.manifest`` checks the fields that every manifest has. This module checks the fields that only stages interpret.
Other keys are allowed, because they are displayed but never computed with.
"""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from infra import artifacts
from infra.errors import IntegrityError

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Text = Annotated[str, Field(max_length=1024)]
_Outcomes = dict[_Text, _Count]
_known = with_config(ConfigDict(strict=True, extra="allow"))


@_known
class _Encoder(TypedDict):
    name: _Text
    weights_digest: _Text
    preprocess_digest: _Text
    dimension: Annotated[int, Field(ge=1, le=65_536)]


@_known
class _Identity(TypedDict, total=False):
    encoder: _Encoder


@_known
class _Effort(TypedDict):
    nprobe: Annotated[int, Field(ge=1, lt=2**31)]
    candidates: Annotated[int, Field(ge=1, lt=2**31)]


@_known
class _File(TypedDict):
    name: _Text
    sha256: _Text
    bytes: _Count


@_known
class _Seen(TypedDict):
    folder: _Text
    file: _File
    rows: _Count


@_known
class _Info(TypedDict, total=False):
    factory: _Text
    effort: _Effort
    hidden: _Count
    taken_down: _Count
    near_duplicates: _Count
    requested: _Count
    images_seen: _Count
    outcomes: _Outcomes
    seen: list[_Seen]
    recall_at_10_image: float | None
    recall_at_10_text: float | None


@_known
class _ShardInfo(TypedDict, total=False):
    members: Annotated[list[_Text], Field(min_length=1)]
    ordinal: Annotated[int, Field(ge=0, lt=2**20)]
    error: float
    factory: _Text
    encoder: _Encoder
    outcomes: _Outcomes
    source: _Text


@_known
class _Shard(TypedDict):
    info: _ShardInfo


@_known
class _Fields(TypedDict):
    identity: _Identity
    info: _Info
    shards: list[_Shard]


_FIELDS = TypeAdapter(_Fields)


def check_fields(manifest: artifacts.Manifest, uri: str) -> None:
    """Check the fields that stages compute with. Raises ``IntegrityError`` for the first invalid one."""
    fields: dict[str, Any] = {
        "identity": manifest.identity,
        "info": manifest.info,
        "shards": [{"info": shard.info} for shard in manifest.shards],
    }
    try:
        _FIELDS.validate_python(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(
            f"{uri} has an unusable manifest field {where[:200]!a} ({first['msg']}); delete the folder and run again"
        ) from error
