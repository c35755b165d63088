"""Generations and edits: run a batch through the pipeline, and describe where each image comes from."""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from model.editing.edit_metrics import changed_region
from model.images import image_to_array, to_model_range, to_rgb
from model.pipeline import KNNDiffusionPipeline
from tasks.serve.service.plans import EditPlan, GeneratePlan
from tasks.serve.service.provenance import encode_png, hit_provenance
from tasks.serve.service.requests import GenerateRequest
from tasks.serve.service.responses import Hit, ImagesResponse, MadeImage

OnStep = Callable[[int, int], None]
"""Called with (step, total steps) between steps. It may raise to stop the work."""


def generate(plans: Sequence[GeneratePlan], on_step: OnStep) -> list[ImagesResponse]:
    """Run generations with equal keys as one batch. Raises ``ModelError`` as the pipeline."""
    first = plans[0]
    pipeline, backbone = first.model.with_database(first.opened), first.model.backbone
    counts = [one.request.n for one in plans]
    between = first.request.interpolate_to is not None
    embedded = _embed_prompts([one.request for one in plans], pipeline)
    if first.request.interpolate_to is not None:
        embedded = torch.cat([embedded, pipeline.embed(first.request.interpolate_to)])
    negative = None
    if first.request.negative_prompt is not None:
        texts = [one.request.negative_prompt or "" for one in plans]
        negative = pipeline.embed(texts).repeat_interleave(torch.tensor(counts), dim=0)
    settings = first.settings
    output = pipeline(
        embedded if between else embedded.repeat_interleave(torch.tensor(counts), dim=0),
        negative,
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        latents=torch.cat([one.noise(backbone) for one in plans]),
        neighbours=settings["k"],
        candidates=settings["candidates"],
        query=settings["query"],
        start=settings["start"],
        strength=settings["strength"],
        between=first.request.n if between else None,
        on_progress=on_step,
    )
    rows = [number * 2 // counts[0] for number in range(counts[0])] if between else range(sum(counts))
    neighbours = [(output.hits.ids[row], output.hits.scores[row]) for row in rows]
    responses, start = [], 0
    for one in plans:
        end = start + one.request.n
        responses.append(_response(one, pipeline, output.images[start:end], neighbours[start:end]))
        start = end
    return responses


def _embed_prompts(requests: Sequence[GenerateRequest], pipeline: KNNDiffusionPipeline) -> Tensor:
    """Embed the text or the image of each request, or the mean of both, as unit rows (P, D)."""
    given = [[one for one in (request.prompt, request.image) if one is not None] for request in requests]
    embedded = pipeline.embed([one for parts in given for one in parts])
    rows = torch.split(embedded, [len(parts) for parts in given])
    return torch.stack([row[0] if len(row) == 1 else normalize(row.mean(0), dim=0) for row in rows])


def edit(plans: Sequence[EditPlan], on_step: OnStep) -> list[ImagesResponse]:
    """Run edits with equal keys as one batch. Raises ``ModelError`` as the pipeline."""
    first = plans[0]
    pipeline = first.model.with_database(first.opened)
    seeds = [(one, seed) for one in plans for seed in one.seeds]
    sources = {id(one): image_to_array(to_rgb(one.request.image), pipeline.side) for one in plans}
    images = pipeline.edit(
        [Image.fromarray(sources[id(one)]) for one, _ in seeds],
        [one.request.prompt for one, _ in seeds],
        method=first.config.method,
        strength=first.config.strength,
        num_inference_steps=first.config.steps,
        guidance_scale=first.config.guidance_scale,
        neighbours=first.settings["k"],
        generator=[torch.Generator().manual_seed(seed) for _, seed in seeds],
        on_progress=on_step,
    )
    texts = pipeline.embed([one.request.prompt for one in plans]).numpy()
    found = first.opened.database.nearest(texts, first.settings["k"])
    responses, start = [], 0
    for number, one in enumerate(plans):
        made = images[start : start + one.request.n]
        neighbours = [(found.ids[number], found.scores[number])] * len(made)
        regions = [region_outline(sources[id(one)], np.asarray(image)) for image in made]
        responses.append(_response(one, pipeline, made, neighbours, regions))
        start += one.request.n
    return responses


def region_outline(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> list[list[float]]:
    """Return the outline of the region that an edit changed, as points (x, y) in [0, 1]; empty if nothing changed.

    ``before`` and ``after`` are (S, S, 3) uint8.
    """
    mask = changed_region(_one(before), _one(after))[0, 0].numpy().astype(np.uint8)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if not outlines:
        return []
    points = max(outlines, key=cv2.contourArea)[:, 0].astype(float)
    return ((points + 0.5) / len(mask)).round(4).tolist()  # type: ignore[no-any-return]


def _one(pixels: np.ndarray[Any, Any]) -> Tensor:
    return to_model_range(torch.from_numpy(np.array(pixels[None])))


def _response(
    plan: GeneratePlan | EditPlan,
    pipeline: KNNDiffusionPipeline,
    images: Sequence[Image.Image],
    neighbours: Sequence[tuple[Any, Any]],
    regions: Sequence[list[list[float]]] | None = None,
) -> ImagesResponse:
    """Return the response: each image with its neighbours, and with the stored image that it is most similar to."""
    opened = plan.opened
    nearest = opened.database.nearest(pipeline.encoder.embed_images(images).numpy(), 1)
    nearest_of_each = opened.hits([*zip(nearest.ids.tolist(), nearest.scores.tolist(), strict=True)])
    neighbours_of_each = opened.hits([(ids.tolist(), scores.tolist()) for ids, scores in neighbours])
    made = []
    described = zip(images, plan.seeds, neighbours_of_each, nearest_of_each, strict=True)
    for number, (image, seed, own, found) in enumerate(described):
        most_similar = next(iter(found), None)
        made.append(
            MadeImage(
                png=encode_png(image, _provenance(plan, seed, own, most_similar)),
                seed=seed,
                neighbours=own,
                nearest=most_similar,
                region=[] if regions is None else regions[number],
            )
        )
    return ImagesResponse(
        model=plan.model.name,
        database=opened.info,
        kind=plan.kind,
        settings={**plan.settings, "seed": plan.seed},
        images=made,
    )


def _provenance(
    plan: GeneratePlan | EditPlan, seed: int, neighbours: Sequence[Hit], nearest: Hit | None
) -> dict[str, Any]:
    return {
        "kind": plan.kind,
        "model": plan.model.name,
        "encoder": plan.model.pipeline.identity.name,
        "database": plan.opened.info.model_dump(),
        "seed": seed,
        "settings": {**plan.settings, "seed": plan.seed},
        "neighbours": [hit_provenance(hit) for hit in neighbours],
        "nearest": None if nearest is None else hit_provenance(nearest),
    }
