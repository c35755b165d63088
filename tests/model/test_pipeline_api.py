"""The arguments that the pipeline shares with diffusers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_models

from model.errors import ModelError
from model.pipeline import EXAMPLE_DOC_STRING, KNNDiffusionOutput, KNNDiffusionPipeline

PROMPTS = torch.nn.functional.normalize(torch.from_numpy(tiny_models.unit_rows(2, seed=1)).float())


@pytest.fixture(params=["pixel", "discrete"])
def pipeline(request: pytest.FixtureRequest, tmp_path: Path) -> KNNDiffusionPipeline:
    database = tiny_models.database(tmp_path / "database", tiny_models.unit_rows(40))
    made = tiny_models.pipeline(database) if request.param == "pixel" else tiny_models.discrete_pipeline()
    made.swap_database(database)
    return made


def call(pipeline: KNNDiffusionPipeline, *args: Any, **options: Any) -> Any:
    defaults = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    return pipeline(*args, **defaults | options)


def pixels(images: list[Image.Image]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.stack([np.asarray(image) for image in images])


def test_call_output_types_hold_the_same_images(pipeline: KNNDiffusionPipeline) -> None:
    expected = pixels(call(pipeline, PROMPTS).images)
    array = call(pipeline, PROMPTS, output_type="np").images
    tensor = call(pipeline, PROMPTS, output_type="pt").images
    assert (array.dtype, array.shape) == (np.float32, expected.shape)
    assert (tensor.dtype, tensor.shape) == (torch.float32, (2, 3, pipeline.side, pipeline.side))
    assert 0 <= array.min() <= array.max() <= 1
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    np.testing.assert_allclose(array * 255, expected, atol=0.501)


def test_call_unknown_output_type_raises(pipeline: KNNDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match="output_type is unknown: 'latent'; use one of pil, np, pt"):
        call(pipeline, PROMPTS, output_type="latent")


def test_call_return_dict_false_gives_a_tuple(pipeline: KNNDiffusionPipeline) -> None:
    output = call(pipeline, PROMPTS)
    assert isinstance(output, KNNDiffusionOutput)
    images, hits = call(pipeline, PROMPTS, return_dict=False)
    np.testing.assert_array_equal(pixels(images), pixels(output.images))
    np.testing.assert_array_equal(hits.ids, output.hits.ids)


def test_call_size_of_the_network_is_accepted_and_other_sizes_raise(pipeline: KNNDiffusionPipeline) -> None:
    side = pipeline.side
    assert call(pipeline, PROMPTS, height=side, width=side).images[0].size == (side, side)
    for name in ("height", "width"):
        with pytest.raises(ModelError, match=f"{name} is not supported: 512; this generator makes images of {side}"):
            call(pipeline, PROMPTS, **{name: 512})


def test_call_latents_replace_the_generator(pipeline: KNNDiffusionPipeline) -> None:
    expected = call(pipeline, PROMPTS).images
    noise = pipeline.backbone.noise(2, 2, torch.Generator().manual_seed(0))
    images = call(pipeline, PROMPTS, generator=None, latents=noise).images
    np.testing.assert_array_equal(pixels(images), pixels(expected))
    with pytest.raises(ModelError, match=r"latents have the wrong shape: \(1, .*; give \(2, "):
        call(pipeline, PROMPTS, latents=noise[:1])


def test_call_old_argument_names_work_with_a_warning(pipeline: KNNDiffusionPipeline) -> None:
    options: dict[str, Any] = {"guidance_scale": 2.0}
    expected = call(pipeline, PROMPTS, PROMPTS.flip(0), **options).images
    steps: list[int] = []
    with pytest.warns(FutureWarning) as caught:
        old = {"prompts": PROMPTS, "negative_prompts": PROMPTS.flip(0), "callback": lambda step, _: steps.append(step)}
        images = call(pipeline, **old, **options).images
    np.testing.assert_array_equal(pixels(images), pixels(expected))
    assert steps == [1, 2]
    messages = [str(warning.message) for warning in caught if warning.category is FutureWarning]
    for pair in ("'prompts' is deprecated; use 'prompt'", "use 'negative_prompt'", "use 'on_progress'"):
        assert any(pair in message for message in messages)
    assert all(warning.filename == __file__ for warning in caught if warning.category is FutureWarning)


def test_call_argument_given_by_both_names_or_unknown_raises(pipeline: KNNDiffusionPipeline) -> None:
    with pytest.raises(TypeError, match="argument given twice: 'prompt' and its old name 'prompts'"):
        call(pipeline, PROMPTS, prompts=PROMPTS)
    with pytest.raises(TypeError, match="unexpected argument: 'steps'"):
        call(pipeline, PROMPTS, steps=2)


def test_call_docstring_has_the_example_and_its_imports_resolve() -> None:
    assert EXAMPLE_DOC_STRING.strip() in (KNNDiffusionPipeline.__call__.__doc__ or "")
    lines = [line.strip().removeprefix(">>> ") for line in EXAMPLE_DOC_STRING.splitlines()]
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert len(imports) == 5
    exec("\n".join(imports), {})  # noqa: S102 - the project's own docstring
