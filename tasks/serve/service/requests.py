"""Requests of the service: the JSON bodies of the REST routes, and the inputs of the page.

Images are PIL images. In JSON they are base64, with or without a ``data:`` prefix.
"""

import base64
import binascii
from typing import Annotated, Any, Literal, TypeAlias

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from infra.download.images import ImageError, ImageNormaliser

MAX_PROMPT_CHARACTERS = 2_000
MAX_IMAGES = 16
"""Maximum images of one request."""
MAX_NEIGHBOURS = 500
MAX_DIMENSION = 4_096
MAX_COMPONENT = 1e6
"""Maximum absolute value in an embedding, so that its length is finite."""
MAX_PIXELS = 16_000_000
"""Maximum pixels of an image in a request. Decoding it takes about 0.3 s and 200 MB."""
_SVG_SIDE_PX = 512
_NORMALISER = ImageNormaliser(max_pixels=MAX_PIXELS, min_side_px=1, max_side_px=_SVG_SIDE_PX)


def decode_image(value: Any) -> Image.Image:
    """Return the image of a base64 text, with the checks of a download. Raises ``ValueError`` with a message."""
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, str):
        raise ValueError("is not an image; give base64, e.g. data:image/png;base64,…")
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return decode_bytes(base64.b64decode(text, validate=True))
    except binascii.Error:
        raise ValueError("is not base64; encode the bytes of an image file") from None


def decode_bytes(data: bytes) -> Image.Image:
    """Decode an image as the download does: upright, 8-bit sRGB, on white. Raises ``ValueError`` with a message."""
    try:
        return _NORMALISER.decode(data, first_frame=True)
    except ImageError as error:
        raise ValueError(f"is not a readable image: {error.detail}") from None


RequestImage: TypeAlias = Annotated[
    Image.Image, BeforeValidator(decode_image), WithJsonSchema({"type": "string", "format": "byte"})
]
Text: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
Component: TypeAlias = Annotated[float, Field(ge=-MAX_COMPONENT, le=MAX_COMPONENT, allow_inf_nan=False, strict=True)]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    database: str | None = Field(None, description="Name of a served database. Default: the first one.", max_length=200)


class SearchRequest(_Request):
    """Search for stored images near a text, an image, a row, an embedding, or the mean of those that are given."""

    text: Text | None = None
    image: RequestImage | None = None
    row: int | None = Field(None, ge=0, description="Id of a stored row: more like this.")
    embedding: list[Component] | None = Field(
        None,
        min_length=1,
        max_length=MAX_DIMENSION,
        description="Embedding of the generator's encoder. It is scaled to length 1.",
    )
    negative: list[Text] = Field([], max_length=8, description="Texts whose embeddings are subtracted.")
    k: int = Field(10, ge=1, le=MAX_NEIGHBOURS, description="Maximum number of results.")
    min_score: float | None = Field(None, ge=-1, le=1, description="Lowest cosine of a result.")
    where: str | None = Field(None, max_length=2_000, description="Filter on the columns, e.g. url like '%cat%'.")

    @model_validator(mode="after")
    def _require_query(self) -> "SearchRequest":
        if all(given is None for given in (self.text, self.image, self.row, self.embedding)):
            raise ValueError("there is no query; give text, image, row or embedding")
        return self


class GenerateRequest(_Request):
    """Generate images of a prompt with the neighbours of a database. None means the default of model and quality.

    The prompt is a text, an image, or the mean of both.
    """

    prompt: Text | None = None
    image: RequestImage | None = Field(None, description="Image as the prompt, alone or with a text.")
    negative_prompt: Text | None = None
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="Number of images.")
    seed: Seed | None = Field(None, description="Default: random. The response names it.")
    quality: Literal["fast", "best"] = Field("fast", description="Preset of candidates, query, start and strength.")
    steps: int | None = Field(None, ge=1, le=250)
    guidance: float | None = Field(None, ge=1, le=50)
    candidates: int | None = Field(None, ge=1, le=16)
    k: int | None = Field(None, ge=1, le=100, description="Number of neighbours.")
    start: Literal["neighbour", "noise"] | None = Field(None, description="Default: neighbour, if images are stored.")
    strength: float | None = Field(None, gt=0, le=1, description="Share of noise that is added to the start.")
    interpolate_to: Text | None = Field(None, description="Second prompt: the n images lead from the first to it.")

    @model_validator(mode="after")
    def _require_prompt(self) -> "GenerateRequest":
        if self.prompt is None and self.image is None:
            raise ValueError("there is no prompt; give prompt, image or both")
        return self


class EditRequest(_Request):
    """Edit an image by a text, without a mask. None means the generator's default."""

    image: RequestImage
    prompt: Text
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="Number of edits to choose from, from seed, seed + 1, ….")
    seed: Seed | None = None
    method: Literal["flow", "local", "restore", "sdedit"] | None = None
    strength: float | None = Field(None, gt=0, le=1)
    steps: int | None = Field(None, ge=1, le=250)
    guidance: float | None = Field(None, ge=1, le=50)
    k: int | None = Field(None, ge=1, le=100)


Request: TypeAlias = SearchRequest | GenerateRequest | EditRequest
