"""Pipelines that were distilled to few steps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_models
from torch import nn

from model.diffusion.few_steps import few_step_levels
from model.errors import ModelError
from model.networks.editor import widen_input
from model.pipeline import KNNDiffusionPipeline, new_pipeline

LEVELS = list(few_step_levels(4))
PROMPTS = torch.from_numpy(tiny_models.unit_rows(2, seed=1)).float()


@pytest.fixture
def pipeline(tmp_path: Path) -> KNNDiffusionPipeline:
    made = new_pipeline(tiny_models.network(), tiny_models.identity(), noise_levels=LEVELS, guidance_scale=1.0)
    rows = tiny_models.database(tmp_path / "database", tiny_models.unit_rows(40))
    made.swap_database(rows.with_images(lambda ids: [Image.new("RGB", (8, 8), (5 * row, 0, 0)) for row in ids]))
    return made


def generated(pipeline: KNNDiffusionPipeline, **options: Any) -> tuple[np.ndarray[Any, Any], list[float]]:
    """Return images, and the noise levels of all calls of the network."""
    levels = list[float]()

    def note(network: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        levels.append(float(named["timestep"][0]) / 1000)

    hook = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        output = pipeline(PROMPTS, generator=torch.Generator().manual_seed(0), output_type="np", **options)
    finally:
        hook.remove()
    return output.images, levels


def test_few_step_pipeline_calls_the_network_once_per_level(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    images, levels = generated(pipeline)
    assert levels == pytest.approx(LEVELS)
    pipeline.save_pretrained(tmp_path / "saved")
    opened = KNNDiffusionPipeline.open(tmp_path / "saved", pipeline.database)
    assert (opened.config.num_inference_steps, opened.config.noise_levels) == (4, LEVELS)
    np.testing.assert_array_equal(generated(opened)[0], images)


def test_few_step_pipeline_started_from_an_image_continues_on_the_grid(pipeline: KNNDiffusionPipeline) -> None:
    progress = list[tuple[int, int]]()
    _, levels = generated(pipeline, start="neighbour", strength=0.8, on_progress=lambda *step: progress.append(step))
    assert levels == pytest.approx([0.8, *LEVELS[2:]])
    assert progress == [(2, 4), (3, 4), (4, 4)]


def test_few_step_pipeline_other_steps_and_edits_raise(pipeline: KNNDiffusionPipeline) -> None:
    with pytest.raises(
        ModelError, match="number of steps is not supported: 8; this generator was distilled to 4 steps"
    ):
        generated(pipeline, num_inference_steps=8)
    assert generated(pipeline, num_inference_steps=4)[1] == pytest.approx(LEVELS)
    with pytest.raises(ModelError, match="distilled to few steps and cannot edit; edit with the generator that it was"):
        pipeline.edit(Image.new("RGB", (8, 8)), PROMPTS[:1])


def test_few_step_pipeline_of_an_editor_takes_no_reference(pipeline: KNNDiffusionPipeline) -> None:
    pipeline.register_modules(transformer=widen_input(pipeline.transformer))
    assert pipeline.backbone.restorer is None
    with pytest.raises(ModelError, match="this generator takes no reference; use reference='none'"):
        generated(pipeline, reference="neighbour")


def test_few_step_pipeline_invalid_levels_or_codes_raise() -> None:
    for levels in ([0.9, 0.5], []):
        with pytest.raises(ModelError, match="noise_levels is not valid"):
            new_pipeline(tiny_models.network(), tiny_models.identity(), noise_levels=levels)
    discrete = tiny_models.discrete_pipeline()
    with pytest.raises(ModelError, match="a network over codes has a guide or noise_levels"):
        new_pipeline(discrete.transformer, discrete.identity, vae=discrete.vae, noise_levels=LEVELS)
