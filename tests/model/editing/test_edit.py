import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support import tiny_models
from torch import Tensor

from model.editing.config import EditConfig
from model.editing.edit import fit_images
from model.errors import ModelError
from model.generation.batching import BATCH_SIZE
from model.networks.editor import widen_input
from model.pipeline import KNNDiffusionPipeline

PROMPT = torch.nn.functional.normalize(torch.from_numpy(tiny_models.unit_rows(1, seed=1)).float())


def image(side: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def pixels(images: list[Image.Image]) -> NDArray[np.int64]:
    return np.stack([np.asarray(image) for image in images]).astype(np.int64)


@pytest.fixture
def base(tmp_path: Path) -> KNNDiffusionPipeline:
    return tiny_models.pipeline(tiny_models.database(tmp_path / "database", tiny_models.unit_rows(40)))


@pytest.fixture
def editor(base: KNNDiffusionPipeline) -> KNNDiffusionPipeline:
    wide, generator = widen_input(base.transformer), torch.Generator().manual_seed(0)
    with torch.no_grad():
        wide.pos_embed.proj.weight += 0.2 * torch.randn(wide.pos_embed.proj.weight.shape, generator=generator)
    base.register_modules(transformer=wide.eval())
    return base


def edited(pipeline: KNNDiffusionPipeline, images: Any, prompts: Any = PROMPT, **options: Any) -> list[Image.Image]:
    options = {"method": "restore", "steps": 3, "candidates": 1} | options
    return pipeline.edit(images, prompts, generator=torch.Generator().manual_seed(0), **options)


def test_edit_result_does_not_depend_on_the_batch(editor: KNNDiffusionPipeline) -> None:
    images = [image(seed=seed) for seed in range(BATCH_SIZE["cpu"] + 2)]
    together = edited(editor, images)
    assert {(image.mode, image.size) for image in together} == {("RGB", (8, 8))}
    assert np.abs(pixels(edited(editor, images[:3])) - pixels(together[:3])).max() <= 1
    assert np.abs(pixels(edited(editor, images[0])) - pixels(together[:1])).max() <= 1
    assert np.abs(pixels(together) - pixels(images)).mean() > 20


@pytest.mark.parametrize(
    "option",
    [
        {"strength": 0.5},
        {"guidance_scale": 2.0},
        {"image_guidance_scale": 2.0},
        {"neighbours": 1},
        {"retrieve": False},
        {"method": "sdedit"},
        {"prompts": -PROMPT},
    ],
    ids=str,
)
def test_edit_every_option_changes_the_result(editor: KNNDiffusionPipeline, option: dict[str, Any]) -> None:
    assert (pixels(edited(editor, image())) != pixels(edited(editor, image(), **option))).any()


class RedEncoder:
    """An encoder whose cosine to the prompt grows with the red of an image."""

    def __init__(self) -> None:
        self.inputs: list[NDArray[np.uint8]] = []

    def embed_pixels(self, images: NDArray[np.uint8]) -> Tensor:
        self.inputs.append(images)
        cosine = torch.from_numpy(images[..., :1].astype(np.float32)).mean((1, 2)) / 255
        other = torch.nn.functional.normalize(PROMPT.roll(1, 1) - (PROMPT.roll(1, 1) @ PROMPT.T) * PROMPT)
        return cosine * PROMPT + (1 - cosine**2).sqrt() * other


@pytest.fixture
def encoder(editor: KNNDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> RedEncoder:
    monkeypatch.setattr(editor, "_encoder", fake := RedEncoder())
    return fake


def test_edit_contrast_embeds_the_source(editor: KNNDiffusionPipeline, encoder: RedEncoder) -> None:
    assert (pixels(edited(editor, image(), contrast=True)) != pixels(edited(editor, image()))).any()
    np.testing.assert_array_equal(encoder.inputs[0], pixels([image()]))


@pytest.mark.parametrize("method", ["flow", "restore", "sdedit"])
def test_edit_returns_the_candidate_closest_to_the_text(
    editor: KNNDiffusionPipeline, encoder: RedEncoder, method: str
) -> None:
    options: dict[str, Any] = {} if method == "flow" else {"kept_db": -100}  # "flow" has no minimum by default
    (kept,) = pixels(edited(editor, image(), method=method, candidates=4, **options))
    reds = [shown[0, ..., 0].mean() for shown in encoder.inputs[-4:]]  # "flow" embeds the source first
    assert len(reds) == 4
    assert np.ptp(reds) > 1
    np.testing.assert_array_equal(kept, encoder.inputs[-4:][int(np.argmax(reds))][0])


def test_edit_flow_result_does_not_depend_on_the_batch(editor: KNNDiffusionPipeline, encoder: RedEncoder) -> None:
    images = [image(seed=seed) for seed in range(BATCH_SIZE["cpu"] + 1)]
    together = pixels(edited(editor, images, method="flow", strength=0.5))
    alone = pixels(edited(editor, images[:1], method="flow", strength=0.5))
    assert np.abs(alone - together[:1]).max() <= 1
    assert np.abs(together - pixels(images)).mean() > 5


def test_edit_with_a_generator_for_each_image_gives_the_results_of_single_edits(
    editor: KNNDiffusionPipeline,
) -> None:
    images = [image(seed=seed) for seed in range(2)]

    def sampled(*numbers: int) -> NDArray[np.int64]:
        generators = [torch.Generator().manual_seed(number + 5) for number in numbers]
        chosen = [images[number] for number in numbers]
        return pixels(
            editor.edit(chosen, PROMPT, method="sdedit", candidates=1, num_inference_steps=2, generator=generators)
        )

    together = sampled(0, 1)
    for number in range(2):
        assert np.abs(sampled(number) - together[number : number + 1]).max() <= 1
    with pytest.raises(ModelError, match="number of generators differs from that of the images: 1, 2; give one"):
        editor.edit(images, PROMPT, method="sdedit", generator=[torch.Generator()])


def test_edit_local_changes_only_its_region(editor: KNNDiffusionPipeline, encoder: RedEncoder) -> None:
    images = [image(seed=seed) for seed in range(BATCH_SIZE["cpu"] + 1)]
    options: dict[str, Any] = {"method": "local", "candidates": 2, "largest_region": 0.5, "keep": False}
    together = pixels(edited(editor, images, **options))
    same = (np.abs(together - pixels(images)).max(-1) <= 1).mean((1, 2))
    assert (same > 0.1).all()
    assert (same < 1).any()
    alone = pixels(edited(editor, images[:1], **options))
    assert np.abs(alone - together[:1]).max() <= 1


@pytest.mark.parametrize("method", ["flow", "restore", "sdedit"])
def test_edit_strength_near_zero_returns_the_source(
    editor: KNNDiffusionPipeline, encoder: RedEncoder, method: str
) -> None:
    assert np.abs(pixels(edited(editor, image(), method=method, strength=1e-4)) - pixels([image()])).max() <= 3


@pytest.mark.parametrize("method", ["flow", "local", "restore", "sdedit"])
def test_edit_reports_progress_after_each_step(editor: KNNDiffusionPipeline, encoder: RedEncoder, method: str) -> None:
    reported: list[tuple[int, int]] = []

    def on_progress(done: int, total: int) -> None:
        reported.append((done, total))

    edited(editor, [image()] * (BATCH_SIZE["cpu"] + 1), method=method, candidates=2, on_progress=on_progress)
    assert reported == [(step, 12) for step in range(1, 13)], "two batches of two candidates of three steps"


def test_edit_unchanged_images_are_logged(editor: KNNDiffusionPipeline, caplog: pytest.LogCaptureFixture) -> None:
    sources = [image(seed=0), image(seed=1)]
    with caplog.at_level(logging.WARNING):
        edited(editor, sources)
        assert not caplog.text
        assert (pixels(edited(editor, sources, strength=1e-4)) == pixels(sources)).all()
    assert "2 of 2 images are unchanged; rephrase the prompt, or increase strength or largest_region" in caplog.text


def test_edit_flow_of_a_discrete_generator_raises() -> None:
    discrete = tiny_models.discrete_pipeline()
    with pytest.raises(ModelError, match=r"has no velocities, .*; use method='local'"):
        edited(discrete, image(), method="flow")


def test_edit_restore_without_training_raises_and_sdedit_works(base: KNNDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match=r"not trained for method='restore'; use method='local'"):
        edited(base, image())
    assert len(edited(base, [image()] * 2, method="sdedit")) == 2


def test_fit_images_converts_any_image_and_logs_crops(caplog: pytest.LogCaptureFixture) -> None:
    wide = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    wide.paste((0, 0, 255, 255), (20, 0, 40, 20))
    with caplog.at_level(logging.WARNING):
        fitted = fit_images([wide, image(), Image.new("L", (8, 8), 77), Image.new("P", (8, 8))], 8)
    assert (fitted.shape, fitted.dtype) == ((4, 8, 8, 3), np.uint8)
    assert fitted[0, 4, 0].tolist() == [255, 255, 255], "what was transparent is white"
    assert fitted[0, 4, 7].tolist() == [0, 0, 255]
    assert (fitted[2] == 77).all()
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 4 images are cropped to their centre square and resized to 8 px"
    ]


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        ([], PROMPT, "there is no image to edit"),
        (["cat.png"], PROMPT, "there is no image to edit"),
        ([image()] * 3, PROMPT.expand(2, -1), "2 prompts for 3 images"),
        ([image()], " ", "prompt is empty"),
        ([image()], torch.full((1, 8), torch.nan), "embeddings are not finite rows"),
    ],
)
def test_edit_invalid_input_raises_on_one_line(
    editor: KNNDiffusionPipeline, images: Any, prompts: Any, message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        edited(editor, images, prompts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strength": 0}, "strength is out of range: 0; give a number above 0 and at most 1"),
        ({"strength": 1.01}, "strength is out of range: 1.01"),
        ({"strength": float("nan")}, "strength is out of range: nan"),
        ({"steps": 0}, "steps is not a positive integer: 0; give at least 1"),
        ({"steps": 2.5}, r"steps is not a positive integer: 2\.5"),
        ({"shift": float("inf")}, "shift is out of range: inf; give a finite number above 0"),
        ({"guidance_scale": float("inf")}, "guidance_scale is not finite: inf"),
        ({"candidates": 0}, "candidates is not a positive integer: 0; give at least 1"),
        ({"candidates": 1.5}, r"candidates is not a positive integer: 1\.5"),
        ({"largest_region": 0}, "largest_region is out of range: 0; give a number above 0 and at most 1"),
        ({"method": "paint"}, "method is unknown: 'paint'; use 'flow', 'local', 'restore' or 'sdedit'"),
    ],
)
def test_edit_config_invalid_field_raises(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        EditConfig(**wrong)


@pytest.mark.parametrize("neighbours", [0, 1.5])
def test_edit_invalid_neighbours_raises(editor: KNNDiffusionPipeline, neighbours: Any) -> None:
    with pytest.raises(ModelError, match=f"neighbours is not a positive integer: {neighbours}; give at least 1"):
        edited(editor, image(), neighbours=neighbours)


def test_edit_num_inference_steps_sets_the_steps(base: KNNDiffusionPipeline) -> None:
    options = {"method": "sdedit", "strength": 0.7, "candidates": 1}
    by_name = base.edit(image(), PROMPT, generator=torch.Generator().manual_seed(0), num_inference_steps=2, **options)
    np.testing.assert_array_equal(pixels(by_name), pixels(edited(base, image(), steps=2, **options)))
    with pytest.raises(ModelError, match="steps is not a positive integer: 0"):
        base.edit(image(), PROMPT, num_inference_steps=0)


def test_edit_old_argument_names_work_with_a_warning(editor: KNNDiffusionPipeline) -> None:
    expected = pixels(edited(editor, image()))
    options: dict[str, Any] = {"method": "restore", "steps": 3, "candidates": 1}
    with pytest.warns(FutureWarning, match="'images' is deprecated; use 'image' instead"):
        by_old_name = editor.edit(images=image(), prompt=PROMPT, generator=torch.Generator().manual_seed(0), **options)
    np.testing.assert_array_equal(pixels(by_old_name), expected)


def test_edit_uses_the_database_it_started_with(
    editor: KNNDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = pixels(edited(editor, image()))
    other = tiny_models.database(tmp_path / "other", tiny_models.unit_rows(40, seed=9))

    def swapped_meanwhile(prompts: Tensor) -> Tensor:
        editor.swap_database(other)
        return prompts

    monkeypatch.setattr(editor, "embed", swapped_meanwhile)
    np.testing.assert_array_equal(pixels(edited(editor, image())), undisturbed)
    assert (pixels(edited(editor, image())) != undisturbed).any()  # the next call uses the other
