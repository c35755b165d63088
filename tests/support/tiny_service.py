"""A tiny service: databases of eight-channel rows, an untrained generator, and a registry in memory."""

import io
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from support import tiny_models
from torch import Tensor

from infra.errors import IntegrityError, NotFoundError, TransientError
from model.encoder.identity import EncoderIdentity
from model.errors import ModelError
from tasks.serve.service.engine import Engine
from tasks.serve.service.generator import OpenModel
from tasks.serve.service.requests import Request, SearchRequest
from tasks.serve.service.responses import ImagesResponse, SearchResponse
from tasks.serve.service.served import OpenDatabase
from tasks.serve.service.versions import Followed, Listing

ROWS = 12
SOURCE = Image.new("RGB", (20, 30), (200, 40, 40))


class TinyEncoder:
    """Fake of an encoder: rows that depend on the text, or on the mean colour of the image."""

    def __init__(self, identity: EncoderIdentity) -> None:
        self.identity = identity

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        seeds = [sum(map(ord, text)) for text in texts]
        return torch.from_numpy(np.concatenate([tiny_models.unit_rows(1, seed=seed) for seed in seeds])).float()

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        return self.embed_pixels(np.stack([np.asarray(image.convert("RGB").resize((8, 8))) for image in images]))

    def embed_pixels(self, pixels: NDArray[np.uint8]) -> Tensor:
        means = pixels.reshape(len(pixels), -1, 3).mean(1) / 255 + 0.01
        return torch.from_numpy(tiny_models.unit(np.pad(means, ((0, 0), (0, tiny_models.WIDTH - 3)))))


class TinyVersions:
    """Fake of the registry. ``databases`` maps names to versions, and ``aliases`` names to their champions."""

    def __init__(self, folder: Path, **databases: int) -> None:
        """Register databases with so many versions each; the last one is the champion."""
        self._folder = folder
        self.databases = {name: list(range(1, count + 1)) for name, count in databases.items()}
        self.champions = dict(databases)
        self.generators: list[int] = [1]
        self.generator_champion: int | None = 1
        self.broken: set[tuple[str, int | None]] = set()
        self.temporary: set[tuple[str, int | None]] = set()
        self.unusable: set[tuple[str, int | None]] = set()
        self.odd: set[tuple[str, int | None]] = set()
        self.identities: dict[Any, EncoderIdentity] = {}
        self.is_away = False
        self.opened: list[tuple[str, int | None]] = []
        self.on_open: Callable[[], object] = lambda: None
        self.on_listing: Callable[[], object] = lambda: None
        self._built: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def listing(self) -> Listing:
        if self.is_away:
            raise TransientError("MLflow at sqlite:////srv/secret/mlflow.db does not answer")
        databases = {
            name: [
                {"version": one, "aliases": ["champion"] if one == self.champions.get(name) else [], "created_ms": one}
                for one in versions
            ]
            for name, versions in self.databases.items()
        }
        generators = [
            {"version": one, "aliases": ["champion"] if one == self.generator_champion else []}
            for one in self.generators
        ]
        listing = Listing(databases=databases, generators={"knn-diffusion": generators})
        self.on_listing()
        return listing

    def open_database(self, followed: Followed, version: int | None, generation: int) -> OpenDatabase:
        name = followed.name or "folder"
        self._open(name, version)
        with self._lock:
            if (name, version) not in self._built:
                self._built[name, version] = self._build(name, version)
        return OpenDatabase(self._built[name, version], name=name, version=version, generation=generation)

    def open_model(self, followed: Followed, version: int | None, generation: int) -> OpenModel:
        self._open("model", version)
        pipeline = tiny_models.pipeline(None)
        pipeline._identity = self.identities.get(("model", version), pipeline.identity)
        pipeline._encoder = TinyEncoder(pipeline.identity)  # type: ignore[assignment]
        pipeline.register_to_config(num_inference_steps=3, candidates=2)
        name = followed.reference if version is None else f"{followed.name}/{version}"
        return OpenModel(name=name, version=version, generation=generation, pipeline=pipeline)

    def _open(self, name: str, version: int | None) -> None:
        self.opened.append((name, version))
        self.on_open()
        if (name, version) in self.unusable:
            raise ModelError("row 3 is not finite; embed it again")
        if version is not None and version > 100:
            raise NotFoundError(f"{name} has no version {version}")
        if (name, version) in self.odd:
            raise OSError("cannot identify image file /srv/secret/1.png")
        if (name, version) in self.temporary:
            raise TransientError("the object store does not answer")
        if (name, version) in self.broken:
            raise IntegrityError(f"/srv/secret/{name}/rows.npy differs from its committed digest; restore it")

    def _build(self, name: str, version: int | None) -> Any:
        """Build a database whose rows name their version in their URL and in the colour of their images."""
        seed = 100 * sum(map(ord, name)) + (version or 0)
        colour = tuple(np.random.default_rng(seed).integers(0, 256, 3).tolist())

        def describe(ids: Sequence[int]) -> list[dict[str, Any]]:
            return [{"key": f"{row:09d}", "url": f"http://{name}/{version}/{row}"} for row in ids]

        def images(ids: Sequence[int]) -> list[Image.Image]:
            return [Image.new("RGB", (16, 16), colour) for _ in ids]

        folder = self._folder / f"{name}-{version}"
        rows = tiny_models.unit_rows(ROWS, seed=seed)
        return tiny_models.database(
            folder, rows, name=name, describe=describe, images=images, encoder=self.identities.get((name, version))
        )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def search(engine: Engine, **fields: Any) -> SearchResponse:
    response = engine.submit(SearchRequest(**fields)).future.result(20)
    assert isinstance(response, SearchResponse)
    return response


def images(engine: Engine, request: Request) -> ImagesResponse:
    response = engine.submit(request).future.result(20)
    assert isinstance(response, ImagesResponse)
    return response


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)
