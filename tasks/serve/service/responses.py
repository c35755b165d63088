"""Responses of the service. Each names the model, the database version, the settings and the provenance."""

import base64
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema

Png: TypeAlias = Annotated[
    bytes,
    PlainSerializer(lambda data: base64.b64encode(data).decode(), when_used="json"),  # pydantic's is URL-safe
    WithJsonSchema({"type": "string", "format": "byte"}),
]


class _Response(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_bytes="base64")  # a user's column may hold bytes


class Hit(_Response):
    """A stored image near a query. ``columns`` are the columns of the URL list, e.g. the licence."""

    id: int
    rank: int
    score: float = Field(description="Cosine to the query.")
    url: str | None = None
    key: str | None = None
    columns: dict[str, Any] = {}


class ServedVersion(_Response):
    """The database version that a request ran with. ``generation`` counts the swaps since the service started."""

    name: str
    version: int | None
    rows: int
    generation: int


class ServedDatabase(_Response):
    """A registered database: what is served, what is registered."""

    name: str
    served: ServedVersion | None
    champion: int | None = None
    versions: list[int] = []
    aliases: dict[str, int] = {}
    recall_at_10_image: float | None = None
    recall_at_10_text: float | None = None
    created_ms: int | None = None
    problem: str | None = Field(None, description="Why the newest version is not served.")


class SearchResponse(_Response):
    """Nearest stored images, best first."""

    model: str
    database: ServedVersion
    encoder: str
    settings: dict[str, Any] = Field(description="Every setting that the hits depend on, with defaults resolved.")
    hits: list[Hit]


class MadeImage(_Response):
    """A generated or edited image with its provenance."""

    png: Png = Field(description="PNG with the provenance as text chunks; base64 in JSON.")
    seed: int
    neighbours: list[Hit]
    nearest: Hit | None = Field(None, description="Nearest stored image of this image; its score is the similarity.")
    region: list[list[float]] = Field([], description="Outline of the changed region of an edit, in [0, 1].")


class ImagesResponse(_Response):
    """Generated or edited images."""

    model: str
    database: ServedVersion
    kind: str
    settings: dict[str, Any] = Field(description="Every setting that the images depend on, with defaults resolved.")
    images: list[MadeImage]


class ServiceInfo(_Response):
    """The model that is served, its defaults and the limits of a request."""

    model: str
    side_px: int
    encoder: str
    defaults: dict[str, Any]
    limits: dict[str, int]
    starts_from_images: bool
    edit_methods: list[str]
