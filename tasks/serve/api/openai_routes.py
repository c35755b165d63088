"""Routes that OpenAI's clients expect. The database is part of the model's name: ``knn-diffusion:birds``."""

import asyncio
import base64
import json
import time
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.responses import Response

from tasks.serve.api.limits import in_decoder, read_json, validated
from tasks.serve.api.problems import OpenAIError, ProblemError
from tasks.serve.api.routes import answered, engine_of, names_of, submitted
from tasks.serve.api.schema import body_of
from tasks.serve.service.requests import MAX_IMAGES, EditRequest, GenerateRequest, RequestImage, Seed, Text
from tasks.serve.service.requests import Request as EngineRequest
from tasks.serve.service.responses import ImagesResponse

OWNER = "knn-diffusion"
_FIELDS = 40
"""Maximum fields of a form."""
router = APIRouter(
    prefix="/v1", tags=["OpenAI"], responses={"4XX": {"model": OpenAIError}, 503: {"model": OpenAIError}}
)


class _ImagesRequest(BaseModel):
    """Fields that generations and edits share. Those without an effect are accepted, because clients send them."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text
    model: str | None = Field(None, max_length=200, description="knn-diffusion:DATABASE. Default: the first database.")
    n: int | None = Field(None, ge=1, le=MAX_IMAGES)
    size: str | None = Field(None, max_length=20, description="auto, or the size that the model generates.")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: Literal[False] | None = None
    quality: str | None = Field(None, max_length=50, description="No effect.")
    user: str | None = Field(None, max_length=200, description="No effect.")
    seed: Seed | None = None
    num_inference_steps: int | None = Field(None, ge=1, le=250)
    guidance_scale: float | None = Field(None, ge=1, le=50)


class GenerationsRequest(_ImagesRequest):
    """Body of ``/v1/images/generations``, with the extensions that other servers of diffusion models have."""

    style: str | None = Field(None, max_length=50, description="No effect.")
    moderation: str | None = Field(None, max_length=50, description="No effect.")
    negative_prompt: Text | None = None


class EditsRequest(_ImagesRequest):
    """Form of ``/v1/images/edits``. There is no mask: the text selects the region."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    image: RequestImage
    input_fidelity: str | None = Field(None, max_length=50, description="No effect.")


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """List one model for each served database."""
    served = [one for one in await asyncio.to_thread(engine_of(request).databases) if one.served is not None]
    listed = [_model(one.name, one.created_ms) for one in served]
    return {"object": "list", "data": listed}


@router.get("/models/{name}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """Return the model of one database."""
    for one in await asyncio.to_thread(engine_of(request).databases):
        if one.served is not None and name == f"{OWNER}:{one.name}":
            return _model(one.name, one.created_ms)
    raise _unknown_model(name)


@router.post("/images/generations", response_model=dict[str, Any], openapi_extra=body_of(GenerationsRequest))
async def generations(request: Request) -> Response:
    """Generate images as OpenAI's API does."""
    given = await read_json(request, lambda value: validated(GenerationsRequest, value))
    body = GenerateRequest(
        prompt=given.prompt,
        negative_prompt=given.negative_prompt,
        database=_database(given.model),
        n=given.n or 1,
        seed=given.seed,
        steps=given.num_inference_steps,
        guidance=given.guidance_scale,
    )
    return await _images(request, body, given.size)


@router.post("/images/edits", response_model=dict[str, Any], openapi_extra=body_of(EditsRequest, "multipart/form-data"))
async def edits(request: Request) -> Response:
    """Edit an image as OpenAI's API does, without a mask."""
    given = await _form(request)
    body = EditRequest(
        image=given.image,
        prompt=given.prompt,
        database=_database(given.model),
        n=given.n or 1,
        seed=given.seed,
        steps=given.num_inference_steps,
        guidance=given.guidance_scale,
    )
    return await _images(request, body, given.size)


async def _images(request: Request, body: EngineRequest, size: str | None) -> Response:
    """Run a request, and return its images in OpenAI's shape, with the provenance in further fields."""
    side = engine_of(request).info().side_px
    if size not in (None, "auto", f"{side}x{side}"):
        raise _invalid("size", f"is not the size of this model; use auto or {side}x{side}")
    response = await answered(request, await submitted(request, body))
    if not isinstance(response, ImagesResponse):
        raise TypeError(f"the engine answered an image request with {type(response).__name__}")
    data = [
        {"b64_json": base64.b64encode(image.png).decode(), **image.model_dump(mode="json", exclude={"png"})}
        for image in response.images
    ]
    answer = {
        "created": int(time.time()),
        "data": data,
        "output_format": "png",
        "size": f"{side}x{side}",
        "model": response.model,
        "database": response.database.model_dump(mode="json"),
        "settings": response.model_dump(mode="json", include={"settings"})["settings"],
    }
    return Response(json.dumps(answer), media_type="application/json", headers=names_of(request, response))


async def _form(request: Request) -> EditsRequest:
    """Return the form of an edit. Its image is decoded in a thread."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ProblemError(415, "unsupported_media_type", "the body is not a form; send multipart/form-data")
    try:
        async with request.form(max_files=4, max_fields=_FIELDS) as form:
            values: dict[str, Any] = {}
            images: list[bytes] = []
            for name, value in form.multi_items():
                if not isinstance(value, UploadFile):
                    values[name] = value
                elif name in ("image", "image[]"):
                    images.append(await value.read())
                else:
                    raise _invalid(name, "is not supported; the text selects the region to edit")
    except MultiPartException as error:
        raise ProblemError(400, "malformed_form", f"the form cannot be read: {error.message}") from error
    if len(images) != 1 or "image" in values:
        raise _invalid("image", "is not exactly one file; upload one image")
    return await in_decoder(lambda: validated(EditsRequest, values | {"image": _encoded(images[0])}))


def _encoded(data: bytes) -> str:
    """Return an image as the requests take it."""
    return base64.b64encode(data).decode()


def _database(model: str | None) -> str | None:
    """Return the database in a model's name, or None for the first one."""
    if model in (None, OWNER):
        return None
    owner, _, database = str(model).partition(":")
    if owner != OWNER or not database:
        raise _unknown_model(str(model))
    return database


def _model(name: str, created_ms: int | None) -> dict[str, Any]:
    """Return the description of a model."""
    return {"id": f"{OWNER}:{name}", "object": "model", "created": (created_ms or 0) // 1000, "owned_by": OWNER}


def _unknown_model(name: str) -> ProblemError:
    detail = f"the model does not exist: {name[:200]}; use {OWNER}:DATABASE, as /v1/models lists them"
    return ProblemError(404, "model_not_found", detail)


def _invalid(field: str, detail: str) -> ProblemError:
    error = {"pointer": f"#/{field}", "detail": detail}
    return ProblemError(422, "invalid_request", "the request is invalid", errors=(error,))
