"""Pipelines that guide by a weaker version of the network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_models

from model.errors import ModelError
from model.networks.editor import widen_input
from model.networks.image_tokens import add_image_tokens
from model.pipeline import KNNDiffusionPipeline, new_pipeline

PROMPTS = torch.from_numpy(tiny_models.unit_rows(2, seed=1)).float()


@pytest.fixture
def database(tmp_path: Path) -> Any:
    return tiny_models.database(tmp_path / "database", tiny_models.unit_rows(40))


def made(database: Any, network: Any, guide: Any = None) -> KNNDiffusionPipeline:
    pipeline = new_pipeline(network, tiny_models.identity(), guide=guide, neighbours=3)
    pipeline.swap_database(database)
    return pipeline


def generated(pipeline: KNNDiffusionPipeline, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipeline(PROMPTS, generator=generator, num_inference_steps=3, output_type="np", **options).images


def test_guide_is_saved_and_guides_with_the_neighbours_hidden(database: Any, tmp_path: Path) -> None:
    network, weaker = tiny_models.network(), tiny_models.network(seed=1, layers=2)
    guided = made(database, network, weaker)
    images, alone = generated(guided), generated(made(database, network))
    assert np.abs(images - alone).max() > 0.01
    np.testing.assert_allclose(generated(made(database, network, tiny_models.network())), alone, atol=1e-5)
    np.testing.assert_array_equal(
        generated(guided, guidance_scale=1.0), generated(made(database, network), guidance_scale=1.0)
    )

    guided.save_pretrained(tmp_path / "saved")
    opened = KNNDiffusionPipeline.open(tmp_path / "saved", database)
    assert opened.guide.config.num_layers == 2
    np.testing.assert_allclose(generated(opened), images, atol=1e-5)
    assert (generated(opened, negative_prompt=PROMPTS[:1]) != images).any()


def test_pipeline_without_a_guide_is_saved_as_before(database: Any, tmp_path: Path) -> None:
    pipeline = made(database, tiny_models.network())
    pipeline.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert not {"guide", "noise_levels"} & index.keys()
    assert not (tmp_path / "saved" / "guide").exists()
    opened = KNNDiffusionPipeline.open(tmp_path / "saved", database)
    assert opened.guide is None
    np.testing.assert_array_equal(generated(opened), generated(pipeline))


def test_guide_of_an_editor_with_image_tokens_needs_none_itself(database: Any) -> None:
    editor = widen_input(tiny_models.network())
    shown = tiny_models.stirred(add_image_tokens(editor))
    images = database.with_images(lambda ids: [Image.new("RGB", (8, 8), (5 * row, 0, 0)) for row in ids])
    assert np.isfinite(generated(made(images, shown, editor))).all()
    np.testing.assert_allclose(
        generated(made(images, shown, editor)), generated(made(images, shown, add_image_tokens(editor))), atol=1e-5
    )


def test_guide_that_does_not_fit_raises(database: Any) -> None:
    for other in (tiny_models.network(image_size=16), widen_input(tiny_models.network()), tiny_models.network(9)):
        with pytest.raises(ModelError, match=r"the guide does not fit the network: side and channels \(.*; use an"):
            made(database, tiny_models.network(), other)
    discrete = tiny_models.discrete_pipeline()
    with pytest.raises(ModelError, match="the guide is a network over codes, which has no velocities"):
        made(database, tiny_models.network(), discrete.transformer)
    with pytest.raises(ModelError, match="a network over codes has a guide or noise_levels"):
        new_pipeline(discrete.transformer, discrete.identity, vae=discrete.vae, guide=tiny_models.network())
