"""Generation, interpolation and edits of the engine, on tiny models."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_models
from support.tiny_service import SOURCE, images, pixels

from infra.errors import InputError
from tasks.serve.service import drawing
from tasks.serve.service.engine import Engine
from tasks.serve.service.plans import GeneratePlan, plan
from tasks.serve.service.provenance import CHUNK
from tasks.serve.service.requests import EditRequest, GenerateRequest
from tasks.serve.service.served import OpenDatabase


def test_generation_names_versions_settings_and_provenance(engine: Engine) -> None:
    made = images(engine, GenerateRequest(prompt="an owl", n=3, seed=5, database="birds"))
    assert (made.model, made.kind, made.database.version) == ("knn-diffusion/1", "generate", 2)
    assert made.settings["steps"] == 3
    assert [made.settings[name] for name in ("quality", "candidates", "start")] == ["fast", 3, "neighbour"]
    assert [image.seed for image in made.images] == [5, 6, 7]
    assert all(len(image.neighbours) == 3 and image.nearest is not None for image in made.images)
    assert made.images[0].neighbours[0].url == f"http://birds/2/{made.images[0].neighbours[0].id}"
    assert CHUNK in Image.open(io.BytesIO(made.images[0].png)).info


def test_quality_is_a_preset_that_given_settings_override(engine: Engine) -> None:
    best = images(engine, GenerateRequest(prompt="an owl", quality="best")).settings
    assert (best["candidates"], best["start"]) == (8, "neighbour")
    given = images(engine, GenerateRequest(prompt="an owl", quality="best", candidates=1, start="noise")).settings
    assert (given["candidates"], given["start"], given["strength"]) == (1, "noise", None)


def test_generation_without_stored_images_equals_the_pipeline(engine: Engine, tmp_path: Path) -> None:
    model = engine._catalog.model
    plain = tiny_models.database(tmp_path / "plain", tiny_models.unit_rows(40))
    opened = OpenDatabase(plain, name="plain", version=1)
    planned = plan(GenerateRequest(prompt="an owl", seed=9), opened, model)
    assert isinstance(planned, GeneratePlan)
    used = [planned.settings[name] for name in ("candidates", "query", "start", "strength")]
    assert used == [3, "both", "noise", None]
    (made,) = drawing.generate([planned], lambda step, steps: None)
    alone = model.with_database(opened)("an owl", generator=torch.Generator().manual_seed(9), quality="fast").images[0]
    assert np.abs(pixels(made.images[0].png) - np.asarray(alone).astype(int)).max() <= 1
    with pytest.raises(InputError, match="database plain has no images to start from"):
        plan(GenerateRequest(prompt="an owl", start="neighbour"), opened, model)


def test_image_depends_on_its_seed_but_not_on_the_batch(engine: Engine) -> None:
    many = images(engine, GenerateRequest(prompt="an owl", n=4, seed=5))
    for number in range(4):
        alone = images(engine, GenerateRequest(prompt="an owl", seed=5 + number))
        assert np.abs(pixels(alone.images[0].png) - pixels(many.images[number].png)).max() <= 1
    assert len({image.png for image in many.images}) == 4, "four seeds"
    opened, model = engine._catalog.get(None), engine._catalog.model
    requests = [GenerateRequest(prompt=prompt, n=2, seed=seed) for prompt, seed in (("a cat", 1), ("an owl", 5))]
    plans = [plan(request, opened, model) for request in requests]
    assert plans[0].key == plans[1].key
    batch = drawing.generate(plans, lambda step, steps: None)  # type: ignore[arg-type]
    for number in range(2):
        assert np.abs(pixels(batch[1].images[number].png) - pixels(many.images[number].png)).max() <= 1


def test_first_image_equals_pipeline_output_for_its_seed(engine: Engine) -> None:
    made = images(engine, GenerateRequest(prompt="an owl", seed=9))
    pipeline = engine._catalog.model.with_database(engine._catalog.get(None))
    alone = pipeline("an owl", generator=torch.Generator().manual_seed(9), quality="fast").images[0]
    assert np.abs(pixels(made.images[0].png) - np.asarray(alone).astype(int)).max() <= 1


def test_generation_with_negative_prompt_image_and_noise(engine: Engine) -> None:
    settings: Any = {"prompt": "a", "start": "noise", "steps": 2, "guidance": 2, "k": 2, "seed": 0}
    made = images(engine, GenerateRequest(negative_prompt="b", **settings))
    assert made.settings["strength"] is None
    assert len(made.images[0].neighbours) == 2
    assert (pixels(made.images[0].png) != pixels(images(engine, GenerateRequest(**settings)).images[0].png)).any()
    assert images(engine, GenerateRequest(image=SOURCE)).settings["image_sha256"]


def test_generation_of_text_and_image_uses_the_unit_mean_of_both(engine: Engine) -> None:
    pipeline = engine._catalog.model.with_database(engine._catalog.get(None))
    mean = pipeline.embed(["an owl", SOURCE]).mean(0, keepdim=True)
    expected = pipeline(mean / mean.norm(), generator=torch.Generator().manual_seed(9), quality="fast").images[0]
    made = images(engine, GenerateRequest(prompt="an owl", image=SOURCE, seed=9))
    assert np.abs(pixels(made.images[0].png) - np.asarray(expected).astype(int)).max() <= 1
    assert made.settings["prompt"] == "an owl" and made.settings["image_sha256"]
    for alone in (GenerateRequest(prompt="an owl", seed=9), GenerateRequest(image=SOURCE, seed=9)):
        assert made.images[0].neighbours != images(engine, alone).images[0].neighbours


def test_interpolation_has_the_neighbours_of_the_nearer_end(engine: Engine) -> None:
    made = images(engine, GenerateRequest(prompt="an owl", interpolate_to="a cat", n=4, seed=2))
    assert made.kind == "interpolate"
    assert [image.seed for image in made.images] == [2] * 4
    first, last = (images(engine, GenerateRequest(prompt=prompt)).images[0] for prompt in ("an owl", "a cat"))
    expected = [[hit.id for hit in one.neighbours] for one in (first, first, last, last)]
    assert [[hit.id for hit in image.neighbours] for image in made.images] == expected


def test_edit_returns_an_image_and_region_for_each_seed(engine: Engine) -> None:
    request = EditRequest(image=SOURCE, prompt="a cat", n=2, seed=3, method="sdedit", steps=2)
    made = images(engine, request)
    assert (made.kind, made.settings["method"], made.settings["steps"]) == ("edit", "sdedit", 2)
    assert [image.seed for image in made.images] == [3, 4]
    again = images(engine, request.model_copy(update={"n": 1, "seed": 4})).images[0]
    assert np.abs(pixels(again.png) - pixels(made.images[1].png)).max() <= 1
    points = [point for image in made.images for point in image.region]
    assert all(0 <= value <= 1 for point in points for value in point)


def test_edits_in_a_batch_equal_those_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        EditRequest(image=image, prompt=prompt, n=n, seed=seed, method="flow", steps=4)
        for image, prompt, n, seed in ((SOURCE, "a cat", 2, 3), (SOURCE.rotate(90), "an owl", 1, 8))
    ]
    alone = [images(engine, request) for request in requests]
    opened, model = engine._catalog.get(None), engine._catalog.model
    plans = [plan(request, opened, model) for request in requests]
    assert plans[0].key != plans[1].key, "on a CPU, edits run one by one"
    monkeypatch.setattr(type(model.pipeline), "device", torch.device("cuda"))
    assert plans[0].key == plans[1].key
    other = plan(requests[0].model_copy(update={"steps": 5}), opened, model)
    assert other.key != plans[0].key
    monkeypatch.undo()
    progress: list[tuple[int, int]] = []
    batch = drawing.edit(plans, lambda *step: progress.append(step))  # type: ignore[arg-type]
    assert progress == [(step, 4) for step in range(1, 5)]
    for one, other_response in zip(batch, alone, strict=True):
        assert [hit.id for hit in one.images[0].neighbours] == [hit.id for hit in other_response.images[0].neighbours]
        for made, single in zip(one.images, other_response.images, strict=True):
            assert made.seed == single.seed
            assert np.abs(pixels(made.png) - pixels(single.png)).max() <= 1


def test_region_outline_surrounds_the_changed_pixels() -> None:
    before = np.zeros((16, 16, 3), np.uint8)
    after = before.copy()
    after[4:8, 6:10] = 255
    outline = np.array(drawing.region_outline(before, after)) * 16
    assert outline.min(0).tolist() == pytest.approx([4.5, 2.5], abs=0.1)
    assert outline.max(0).tolist() == pytest.approx([11.5, 9.5], abs=0.1)
    assert drawing.region_outline(before, before) == []
