"""Plans: requests with all defaults resolved, on the versions that they were submitted with.

Image i of a request with seed s uses a random generator with seed s + i. The candidates of the image draw their noise
from it in turn. The image therefore depends neither on n nor on the batch. The first image equals that of
``knn-diffusion generate --seed s``, and the seed s + i alone generates image i again.
"""

import dataclasses
import hashlib
import secrets
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.download.images import as_stored, shrink_to_fit
from infra.errors import InputError
from model.editing.config import EditConfig, edit_config
from model.editing.edit import check_method
from model.errors import ModelError
from model.generation import arguments
from model.generation.backbone import Backbone
from model.generation.quality import resolve
from tasks.serve.service.checks import check_embedding, check_start, check_steps, require_text
from tasks.serve.service.generator import OpenModel
from tasks.serve.service.requests import EditRequest, GenerateRequest, Request, SearchRequest
from tasks.serve.service.served import OpenDatabase

_LAST_SEED = 2**63
_RANDOM_SEEDS = 2**32
"""Random seeds are below it, so that they are short, and exact in JavaScript."""
_MAX_SIDE_PX = 1024
"""Longer side to which images of generations and edits are reduced at once; a queue of large ones would fill memory."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SearchPlan:
    """A search."""

    request: SearchRequest
    opened: OpenDatabase
    model: OpenModel

    @property
    def kind(self) -> str:
        """Name of the work, in metrics."""
        return "search"

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the response."""
        request = self.request
        return {
            "text": request.text,
            "image_sha256": _digest(request.image),
            "row": request.row,
            "embedding_sha256": _embedding_digest(request.embedding),
            "negative": request.negative,
            "k": request.k,
            "min_score": request.min_score,
            "where": request.where,
        }

    @property
    def key(self) -> Hashable:
        """Searches of one version run together."""
        return (self.opened, self.model)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GeneratePlan:
    """A generation. ``settings`` has every setting of the response but the seed."""

    request: GenerateRequest
    opened: OpenDatabase
    model: OpenModel
    seed: int
    settings: dict[str, Any]

    @property
    def kind(self) -> str:
        """Name of the work, in metrics."""
        return "generate" if self.request.interpolate_to is None else "interpolate"

    @property
    def key(self) -> Hashable:
        """Generations with the same settings run together; an interpolation runs alone."""
        shared = ("steps", "guidance", "k", "candidates", "query", "start", "strength")
        alone = self if self.request.interpolate_to is not None else None
        negative = self.request.negative_prompt is not None
        return (self.opened, self.model, *(self.settings[name] for name in shared), negative, id(alone))

    @property
    def seeds(self) -> list[int]:
        """The seed of each image. The images of an interpolation start from the same noise."""
        if self.request.interpolate_to is not None:
            return [self.seed] * self.request.n
        return [(self.seed + number) % _LAST_SEED for number in range(self.request.n)]

    def noise(self, backbone: Backbone) -> Tensor:
        """Return the noise of all images and candidates, image after image."""
        candidates, steps = self.settings["candidates"], self.settings["steps"]
        parts = [backbone.noise(candidates, steps, torch.Generator().manual_seed(seed)) for seed in self.seeds]
        return torch.cat(parts)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EditPlan:
    """An edit: one for each seed. ``settings`` has every setting of the response but the seed."""

    request: EditRequest
    opened: OpenDatabase
    model: OpenModel
    seed: int
    config: EditConfig
    settings: dict[str, Any]

    @property
    def kind(self) -> str:
        """Name of the work, in metrics."""
        return "edit"

    @property
    def key(self) -> Hashable:
        """Edits with the same settings run together, except on a CPU.

        There a batch takes as long as its edits one by one, and the first edit would wait for the last.
        """
        alone = self if self.model.pipeline.device.type == "cpu" else None
        return (self.opened, self.model, self.config, self.settings["k"], id(alone))

    @property
    def seeds(self) -> list[int]:
        """The seed of each edit."""
        return [(self.seed + number) % _LAST_SEED for number in range(self.request.n)]


Plan = SearchPlan | GeneratePlan | EditPlan


def plan(request: Request, opened: OpenDatabase, model: OpenModel) -> Plan:
    """Resolve a request.

    Raises:
        InputError: The model or the database does not support the settings, or they need too many steps.
    """
    try:
        planned = _plan(request, opened, model)
    except ModelError as error:
        raise InputError(str(error)) from error
    if not isinstance(planned, SearchPlan):
        check_steps(planned.request.n, planned.settings)
    return planned


def size(resolved: Plan) -> int:
    """Return the number of images that a plan generates at once, or 1 for a search."""
    match resolved:
        case GeneratePlan():
            return int(resolved.request.n * resolved.settings["candidates"])
        case EditPlan():
            return resolved.request.n
        case SearchPlan():
            return 1


def _plan(request: Request, opened: OpenDatabase, model: OpenModel) -> Plan:
    match request:
        case SearchRequest():
            return _plan_search(request, opened, model)
        case GenerateRequest():
            return _plan_generation(request, opened, model)
        case EditRequest():
            return _plan_edit(request, opened, model)


def _plan_search(request: SearchRequest, opened: OpenDatabase, model: OpenModel) -> SearchPlan:
    require_text(request.text, *request.negative)
    if request.row is not None and opened.is_hidden(request.row):
        raise InputError(f"database {opened.name} has no row {request.row}; use the id of a result")
    if request.embedding is not None:
        check_embedding(request.embedding, model)
    return SearchPlan(request=request, opened=opened, model=model)


def _plan_generation(request: GenerateRequest, opened: OpenDatabase, model: OpenModel) -> GeneratePlan:
    require_text(request.prompt, request.negative_prompt, request.interpolate_to)
    defaults, between = model.defaults, request.interpolate_to is not None
    steps, guidance = request.steps or defaults["steps"], request.guidance or defaults["guidance"]
    if request.negative_prompt is not None and guidance <= 1:
        raise InputError(f"guidance is too small for a negative prompt: {guidance}; give a value above 1")
    if between and request.n < 2:
        raise InputError(f"n is too small for an interpolation: {request.n}; give at least 2, because it has two ends")
    arguments.check_steps(steps, model.pipeline.config.noise_levels)
    most = model.backbone.max_steps
    if most is not None and steps > most:
        raise InputError(f"steps is too large for this model: {steps}; give at most {most}")
    check_start(request, opened, model)
    preset = resolve(
        request.quality,
        model.backbone,
        neighbours_shown=not between,
        has_images=opened.has_images,
        candidates=request.candidates,
        start=request.start,
        strength=request.strength,
    )
    if preset.start == "noise" and request.strength not in (None, 1):
        raise InputError(f"strength has no effect on pure noise: {request.strength}; remove it, or use start=neighbour")
    settings = {
        "prompt": request.prompt,
        "image_sha256": _digest(request.image),
        "negative_prompt": request.negative_prompt,
        "interpolate_to": request.interpolate_to,
        "n": request.n,
        "quality": request.quality,
        "steps": steps,
        "guidance": guidance,
        "k": request.k or defaults["k"],
        "candidates": 1 if between else preset.candidates or model.pipeline.config.candidates,
        "query": preset.query or model.pipeline.config.query,
        "start": preset.start,
        "strength": None if preset.start == "noise" else preset.strength,
        "side": model.pipeline.side,
    }
    return GeneratePlan(request=request, opened=opened, model=model, seed=_seed(request.seed), settings=settings)


def _plan_edit(request: EditRequest, opened: OpenDatabase, model: OpenModel) -> EditPlan:
    require_text(request.prompt)
    method = request.method or model.defaults["edit_method"] or "flow"  # no method: the check below says why
    config = edit_config(method, strength=request.strength, steps=request.steps, guidance_scale=request.guidance)
    check_method(model.backbone, config)
    settings = {
        "prompt": request.prompt,
        "image_sha256": _digest(request.image),
        "n": request.n,
        "method": method,
        "strength": config.strength,
        "steps": config.steps,
        "guidance": config.guidance_scale,
        "candidates": config.candidates,
        "k": request.k or model.pipeline.edit_neighbours(method),
        "side": model.pipeline.side,
    }
    seed = _seed(request.seed)
    return EditPlan(request=request, opened=opened, model=model, seed=seed, config=config, settings=settings)


def reduced(request: Request, opened: OpenDatabase) -> Request:
    """Return the request with a smaller image, since jobs are kept for a while.

    A search reduces it as the download reduces stored images.
    """
    if request.image is None:
        return request
    is_search = isinstance(request, SearchRequest)
    image = as_stored(request.image, opened.side_px) if is_search else shrink_to_fit(request.image, _MAX_SIDE_PX)
    return request.model_copy(update={"image": image})


def _digest(image: Image.Image | None) -> str | None:
    """Return the digest of the pixels of an image."""
    return None if image is None else hashlib.sha256(image.tobytes()).hexdigest()


def _embedding_digest(embedding: list[float] | None) -> str | None:
    """Return the digest of an embedding in float32."""
    return None if embedding is None else hashlib.sha256(np.asarray(embedding, np.float32).tobytes()).hexdigest()


def _seed(given: int | None) -> int:
    return secrets.randbelow(_RANDOM_SEEDS) if given is None else given
