"""Routes of the images, styles and scripts of the page. Images never travel over its websocket."""

from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, Response

from infra.errors import KNNDiffusionError, NotFoundError
from tasks.serve.playground.images import SentImages
from tasks.serve.service.errors import public_message
from tasks.serve.service.responses import ImagesResponse

if TYPE_CHECKING:
    from tasks.serve.service.engine import Engine

_STATIC = Path(__file__).parent / "static"
_FILES = {path.name: path for path in _STATIC.iterdir()}
_TYPES = {".css": "text/css", ".js": "text/javascript"}
_STORED = {"Cache-Control": "private, max-age=30"}  # so that a takedown takes effect
_RESULT = {"Cache-Control": "private, max-age=3600"}  # a result never changes


def make_router(engine: "Engine", images: SentImages) -> APIRouter:
    """Return the routes below ``/playground``."""
    router = APIRouter(prefix="/playground", include_in_schema=False)

    @router.get("/thumbnails/{database}/{row}")
    def thumbnail(database: str, row: int, generation: int | None = None) -> Response:
        try:
            if generation is not None and generation != _generation(engine, database):
                raise NotFoundError("another version of the database is served now; run the request again")
            return Response(engine.thumbnail(database, row), media_type="image/webp", headers=_STORED)
        except KNNDiffusionError as error:
            raise HTTPException(404, public_message(error)) from None

    @router.get("/results/{job}/{number}.png")
    def result(job: str, number: int, download: bool = False) -> Response:
        try:
            future = engine.jobs.get(job).future
        except NotFoundError as error:
            raise HTTPException(404, public_message(error)) from None
        response = future.result() if future.done() and future.exception() is None else None
        if not isinstance(response, ImagesResponse) or not 0 <= number < len(response.images):
            raise HTTPException(404, "there is no such image")
        made = response.images[number]
        name = f"knn-diffusion-{response.kind}-{made.seed}.png"
        saved = {"Content-Disposition": f'attachment; filename="{name}"'} if download else {}
        return Response(made.png, media_type="image/png", headers=_RESULT | saved)

    @router.get("/images/{token}")
    def sent_image(token: str) -> Response:
        try:
            return Response(images.webp(token), media_type="image/webp", headers=_RESULT)
        except NotFoundError as error:
            raise HTTPException(404, str(error)) from None

    @router.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in _FILES:
            raise HTTPException(404, "there is no such file")
        return FileResponse(_FILES[name], media_type=_TYPES[_FILES[name].suffix])

    return router


def _generation(engine: "Engine", name: str) -> int | None:
    served = (one.served for one in engine.databases() if one.name == name)
    return next((one.generation for one in served if one is not None), None)
