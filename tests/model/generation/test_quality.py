"""Presets of a call."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import tiny_models

from model.errors import ModelError
from model.generation.quality import PRESETS, Preset, resolve
from model.pipeline import KNNDiffusionPipeline

PLAIN = tiny_models.pipeline(None).backbone
DISCRETE = tiny_models.discrete_pipeline().backbone


def resolved(quality: Any, backbone: Any = PLAIN, *, shown: bool = True, stored: bool = True, **given: Any) -> Preset:
    return resolve(quality, backbone, neighbours_shown=shown, has_images=stored, **given)


def test_resolve_without_quality_is_noise_and_what_is_given() -> None:
    assert resolved(None) == Preset()
    assert resolved(None, candidates=3, start="neighbour", strength=0.5) == Preset(
        candidates=3, start="neighbour", strength=0.5
    )


def test_resolve_arguments_override_the_preset() -> None:
    for quality, preset in PRESETS.items():
        assert resolved(quality) == preset
    given: dict[str, Any] = {"candidates": 5, "query": "text", "start": "neighbour", "strength": 0.3}
    assert resolved("best", **given) == Preset(**given)


def test_resolve_strength_follows_the_start() -> None:
    assert resolved("fast", start="noise").strength is None
    assert resolved("fast", strength=0.4).start == "neighbour"
    image = Image.new("RGB", (8, 8))
    assert resolved("fast", start=image, strength=0.4).start is image


@pytest.mark.parametrize("quality", list(PRESETS))
def test_resolve_uses_neighbours_only_where_they_are_supported(quality: Any) -> None:
    expected = Preset(candidates=PRESETS[quality].candidates)
    assert resolved(quality, DISCRETE) == resolved(quality, shown=False) == expected


@pytest.mark.parametrize("quality", list(PRESETS))
def test_resolve_without_images_changes_the_start_only(quality: Any) -> None:
    expected = dataclasses.replace(PRESETS[quality], start="noise", strength=None)
    assert resolved(quality, stored=False) == expected
    assert resolved(quality, stored=False, start="neighbour", strength=0.5).start == "neighbour"


def test_resolve_unknown_quality_raises() -> None:
    with pytest.raises(ModelError, match="quality is unknown: 'high'; use one of fast, best"):
        resolved("high")


def white(ids: Any) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), "white")] * len(ids)


def test_quality_of_a_call_is_its_preset(tmp_path: Path) -> None:
    pipeline = tiny_models.editor_pipeline()
    pipeline.swap_database(tiny_models.database(tmp_path, tiny_models.unit_rows(40)).with_images(white))
    prompts = torch.from_numpy(tiny_models.unit_rows(2, seed=1)).float()

    def generated(pipeline: KNNDiffusionPipeline, **options: Any) -> list[bytes]:
        generator = torch.Generator().manual_seed(0)
        output = pipeline(prompts, generator=generator, num_inference_steps=2, candidates=1, **options)
        return [image.tobytes() for image in output.images]

    preset = PRESETS["fast"]
    options = {name: getattr(preset, name) for name in ("query", "start", "strength")}
    assert generated(pipeline, quality="fast") == generated(pipeline, **options)
    assert generated(pipeline, quality="fast") != generated(pipeline)
    assert len(generated(pipeline, quality="fast", between=3)) == 3
    pipeline.swap_database(tiny_models.database(tmp_path / "plain", tiny_models.unit_rows(40)))
    assert generated(pipeline, quality="fast") == generated(pipeline, query="both", start="noise")
    with pytest.raises(ModelError, match="was opened without images"):
        generated(pipeline, quality="fast", start="neighbour")


@pytest.mark.parametrize("first", [None, "stored", "plain"])
def test_quality_uses_the_database_that_the_call_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str | None
) -> None:
    plain = tiny_models.database(tmp_path / "plain", tiny_models.unit_rows(40))
    stored = tiny_models.database(tmp_path / "stored", tiny_models.unit_rows(40, seed=9)).with_images(white)
    before, after = (plain, stored) if first == "plain" else (stored, plain)
    prompts = torch.from_numpy(tiny_models.unit_rows(2, seed=1)).float()
    pipeline = tiny_models.pipeline(None if first is None else before)

    def generated() -> list[bytes]:
        generator = torch.Generator().manual_seed(0)
        output = pipeline(prompts, quality="fast", generator=generator, num_inference_steps=2, candidates=1)
        return [image.tobytes() for image in output.images]

    undisturbed = None if first is None else generated()

    def swapped_meanwhile(embeddings: torch.Tensor) -> torch.Tensor:
        pipeline.swap_database(after)
        return embeddings

    monkeypatch.setattr(pipeline, "embed", swapped_meanwhile)
    if undisturbed is None:
        with pytest.raises(ModelError, match="this pipeline has no database; plug one in with swap_database"):
            generated()
    else:
        assert generated() == undisturbed
        assert pipeline.database is after
