"""The pipeline with each kind of network, and the arguments of a call."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray
from PIL import Image
from support import tiny_models
from torch import Tensor

from model.encoder.clip import Encoder
from model.encoder.identity import BUNDLED_ENCODER
from model.errors import ModelError
from model.pipeline import KNNDiffusionPipeline, new_pipeline
from model.retrieval.database import Database

ROWS = tiny_models.unit_rows(40)
PROMPTS = torch.nn.functional.normalize(torch.from_numpy(tiny_models.unit_rows(3, seed=1)).float())


class _GPUGenerator(torch.Generator):
    device = torch.device("cuda")


GPU_GENERATOR = _GPUGenerator()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(images: list[Image.Image]) -> NDArray[np.int64]:
    return np.stack([np.asarray(image) for image in images]).astype(np.int64)


def generated(pipeline: KNNDiffusionPipeline, prompts: Any = PROMPTS, **options: Any) -> NDArray[np.int64]:
    return pixels(pipeline(prompts, **{"num_inference_steps": 3, "generator": seeded()} | options).images)


KINDS = {
    "unet": tiny_models.unet_pipeline,
    "latent": tiny_models.latent_pipeline,
    "discrete": tiny_models.discrete_pipeline,
    "editor": tiny_models.editor_pipeline,
}


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return tiny_models.database(tmp_path / "database", ROWS)


@pytest.fixture(params=KINDS)
def pipeline(request: pytest.FixtureRequest, database: Database) -> KNNDiffusionPipeline:
    made = KINDS[request.param]()
    made.swap_database(database)
    return made


def test_call_every_kind_gives_images_of_its_side(pipeline: KNNDiffusionPipeline) -> None:
    images = generated(pipeline)
    assert images.shape == (3, pipeline.side, pipeline.side, 3)
    assert pipeline.side == (8 if pipeline.vae is None else 16)
    assert np.abs(images[0] - images[1]).max() > 0, "different prompts, different images"


def test_call_every_kind_does_not_depend_on_the_batch(pipeline: KNNDiffusionPipeline) -> None:
    alone, among = generated(pipeline, PROMPTS[:1]), generated(pipeline, PROMPTS.repeat(4, 1))
    assert np.abs(alone[0] - among[0]).max() <= 1


def test_compile_keeps_the_images(database: Database) -> None:
    pipeline = tiny_models.discrete_pipeline()
    pipeline.swap_database(database)
    before = generated(pipeline)
    pipeline.compile()
    np.testing.assert_allclose(generated(pipeline), before, atol=1)
    assert not any("orig_mod" in name for name in pipeline.transformer.state_dict())


def test_call_every_kind_applies_guidance(pipeline: KNNDiffusionPipeline) -> None:
    plain, pushed = generated(pipeline, guidance_scale=1.0), generated(pipeline, guidance_scale=6.0)
    assert np.abs(plain - pushed).max() > 0


def test_call_every_kind_applies_the_negative_prompt(pipeline: KNNDiffusionPipeline) -> None:
    plain = generated(pipeline, guidance_scale=4.0)
    away = generated(pipeline, guidance_scale=4.0, negative_prompt=PROMPTS[:1])
    assert np.abs(plain - away).max() > 0
    # Away from itself: v + s·(v − v) is the conditional model at any scale.
    itself = generated(pipeline, guidance_scale=4.0, negative_prompt=PROMPTS)
    assert np.abs(itself - generated(pipeline, guidance_scale=1.0)).max() <= 1


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_call_negative_prompt_without_guidance_raises(pipeline: KNNDiffusionPipeline, scale: float) -> None:
    with pytest.raises(ModelError, match=f"guidance_scale is too small for a negative_prompt: {scale}"):
        generated(pipeline, negative_prompt=PROMPTS[:1], guidance_scale=scale)
    pipeline.register_to_config(guidance_scale=scale)
    with pytest.raises(ModelError, match="give a value above 1"):
        generated(pipeline, negative_prompt=PROMPTS[:1])


@pytest.mark.parametrize("wrong", [[seeded()], 5, GPU_GENERATOR], ids=["list", "seed", "gpu"])
def test_call_invalid_generator_raises(pipeline: KNNDiffusionPipeline, wrong: Any) -> None:
    message = "generator must be one torch.Generator on the CPU"
    with pytest.raises(ModelError, match=message):
        generated(pipeline, generator=wrong)
    if not isinstance(wrong, list):  # an edit accepts one for each image
        for one in (wrong, [wrong]):
            with pytest.raises(ModelError, match=message):
                pipeline.edit(Image.new("RGB", (8, 8)), PROMPTS[:1], method="sdedit", generator=one)


def test_call_nan_weights_raise(pipeline: KNNDiffusionPipeline) -> None:
    with torch.no_grad():
        [*pipeline.transformer.parameters()][-1].view(-1)[0] = torch.nan  # of the output layer
    for truncation in (0.86, 1.0):  # 1.0 skips the truncation of codes
        pipeline.register_to_config(truncation=truncation)
        with pytest.raises(ModelError, match="NaN or infinite values: the weights are corrupt; retrain"):
            generated(pipeline)
    with pytest.raises(ModelError, match="NaN or infinite values: the weights are corrupt; retrain"):
        pipeline.edit(Image.new("RGB", (8, 8)), PROMPTS[:1], method="sdedit", candidates=1)


def test_call_and_edit_half_precision_are_close_to_float32(pipeline: KNNDiffusionPipeline) -> None:
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    options: dict[str, Any] = {"method": "sdedit", "candidates": 1, "num_inference_steps": 3}
    whole, half = [], []
    for outputs in (whole, half):
        outputs += [generated(pipeline), pixels(pipeline.edit(image, PROMPTS[:1], generator=seeded(), **options))]
        pipeline.to(torch.float16)
    for one, other in zip(whole, half, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).mean() < 8, "up to rounding, and a code or two"


def test_call_editor_equals_its_base(database: Database) -> None:
    base, editor = tiny_models.pipeline(database, prediction="velocity"), tiny_models.editor_pipeline()
    editor.swap_database(database)
    np.testing.assert_array_equal(generated(editor), generated(base))


def test_call_guidance_acts_only_in_its_interval(database: Database) -> None:
    def with_interval(low: float, high: float) -> NDArray[np.int64]:
        made = new_pipeline(tiny_models.network(), tiny_models.identity(), neighbours=3, guidance_interval=(low, high))
        made.swap_database(database)
        return generated(made, guidance_scale=5.0)

    nowhere, plain = (
        with_interval(2, 3),
        generated(tiny_models.pipeline(database, prediction="velocity"), guidance_scale=1.0),
    )
    np.testing.assert_array_equal(nowhere, plain)
    assert np.abs(with_interval(0, 1) - plain).max() > 0
    assert np.abs(with_interval(0.5, 0.9) - with_interval(0, 1)).max() > 0


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0),
    ],
)
def test_call_any_flow_matching_scheduler_works(database: Database, scheduler: Any) -> None:
    made = tiny_models.pipeline(database, prediction="velocity")
    assert isinstance(made.scheduler, UniPCMultistepScheduler)
    own = generated(made, num_inference_steps=200)
    made.register_modules(scheduler=scheduler)
    other = generated(made, num_inference_steps=200)
    assert np.abs(own - other).mean() < 3, "both solve one equation"


def test_interpolate_starts_and_ends_at_the_prompts(tmp_path: Path) -> None:
    encoder = Encoder()
    rows = encoder.embed_texts([f"an image of {name}" for name in ("rain", "a dog", "a car", "bread")]).numpy()
    database = tiny_models.database(tmp_path / "texts", rows.astype(np.float16), encoder=encoder.identity)
    made = tiny_models.pipeline(database, prediction="velocity")
    options = {"num_inference_steps": 2, "neighbours": 2}
    between = pixels(made.interpolate("a dog", "a car", 4, generator=seeded(), **options).images)
    ends = pixels(made(["a dog", "a car"], generator=seeded(), shared_noise=True, **options).images)
    assert len(between) == 4
    assert np.abs(between[[0, -1]] - ends).max() <= 1
    assert (np.abs(np.diff(between, axis=0)).max(axis=(1, 2, 3)) > 1).all(), "every step moves"
    with pytest.raises(ModelError, match="wrong number of prompts to interpolate: 1"):
        made("a dog", between=3)
    with pytest.raises(ModelError, match="too few images for an interpolation: 1"):
        made.interpolate("a dog", "a car", 1)


def test_embed_accepts_texts_and_images(tmp_path: Path) -> None:
    encoder = Encoder()
    image = Image.new("RGBA", (20, 30), (255, 0, 0, 128))
    made = tiny_models.pipeline(None)
    made = new_pipeline(tiny_models.network(256), encoder.identity, neighbours=2)
    assert encoder.identity.name == BUNDLED_ENCODER
    rows = made.embed(["a red flag", image, "rain"])
    torch.testing.assert_close(rows[[0, 2]], encoder.embed_texts(["a red flag", "rain"]))
    flat = Image.new("RGB", (20, 30), (255, 127, 127))
    assert float((rows[1] * encoder.embed_images([flat])[0]).sum()) > 0.999, "transparency is white"
    with pytest.raises(ModelError, match="neither a text nor an image"):
        made.embed([3.5])  # type: ignore[list-item]
    with pytest.raises(ModelError, match="prompt has an unknown type: NoneType; give str, PIL images or embeddings"):
        made.embed(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 2])
def test_call_wrong_number_of_negative_prompts_raises(database: Database, count: int) -> None:
    made = tiny_models.pipeline(database)
    with pytest.raises(ModelError):
        made(PROMPTS, negative_prompt=PROMPTS[:count], guidance_scale=2.0)


def test_condition_small_database_warns_and_hides_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = tiny_models.database(tmp_path / "small", tiny_models.unit_rows(2))
    made = tiny_models.pipeline(small)
    with caplog.at_level(logging.WARNING):
        tokens, _, hits = made.condition(PROMPTS, 5)
    assert "the database holds 2 images, but 5 neighbours were requested" in caplog.text
    assert hits is not None
    assert (hits.ids[:, 2:] == -1).all()
    assert (tokens[:, 3:, :-1] == 0).all()
    assert (tokens[:, 1:3, :-1] != 0).any(dim=2).all()


def test_condition_pads_to_the_trained_neighbours(database: Database) -> None:
    made: KNNDiffusionPipeline = tiny_models.pipeline(database, neighbours=4)
    tokens = made.condition(PROMPTS, 1).tokens
    assert tokens.shape[1] == 5
    assert (tokens[:, 2:, :-1] == 0).all()
    made.register_to_config(neighbours=2, trained_neighbours=6)
    tokens, _, hits = made.condition(PROMPTS, made.config.neighbours)
    assert hits is not None
    assert hits.ids.shape == (3, 2)
    assert tokens.shape[1] == 7
    assert (tokens[:, 1:3, :-1] != 0).any(dim=2).all()
    assert (tokens[:, 3:, :-1] == 0).all()


def test_embed_texts_above_the_token_limit_warns(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder()
    long: Tensor = encoder.embed_texts(["one two three"])
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        long = encoder.embed_texts(["red " * 100, "rain"])
    assert caplog.text.count("is longer than") == 1
    assert long.shape == (2, encoder.identity.dimension)
