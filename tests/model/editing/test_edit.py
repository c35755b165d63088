import dataclasses
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

from model.diffusion.conditioning import null_condition
from model.diffusion.flow_matching import Denoiser
from model.diffusion.solver import BATCH
from model.editing.edit import (
    EditConfig,
    edit,
    edit_guided,
    edit_levels,
    edit_pictures,
    fit_images,
    keep_unchanged,
    sdedit_pictures,
)
from model.errors import ModelError
from model.networks.editor import widen_input
from model.pipeline import KNNDiffusionPipeline

GENERATOR = torch.Generator().manual_seed(0)
SOURCE = torch.rand(2, 3, 8, 8, generator=GENERATOR) * 2 - 1
NOISE = torch.randn(2, 3, 8, 8, generator=GENERATOR)
TOKENS = torch.randn(2, 4, tiny_models.WIDTH + 1, generator=GENERATOR)
PROMPT = torch.nn.functional.normalize(torch.from_numpy(tiny_models.unit_rows(1, seed=1)).float())
PLAIN = EditConfig(guidance_scale=1, keep=False)


def restorer(target: Tensor) -> Denoiser:
    """A denoiser of six channels that knows the picture to draw: Euler steps end in it whatever they start from."""

    def denoise(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        assert noisy.shape[1] == 6
        return (noisy[:, :3] - target) / sigma[:, None, None, None]

    return denoise


def stranger(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
    """A denoiser, of six channels or three, whose answer depends on all that it sees."""
    told = (condition * torch.arange(1, condition.shape[2] + 1)).mean((1, 2))
    seen = noisy.mean(1, keepdim=True) + (noisy[:, 3:].sum(1, keepdim=True) if noisy.shape[1] == 6 else 0)
    return (seen * (1 + sigma[:, None, None, None])).sin() * 2 + told[:, None, None, None] + torch.zeros(1, 3, 1, 1)


def changed(config: EditConfig, **changes: Any) -> EditConfig:
    return dataclasses.replace(config, **changes)


def test_levels_fall_from_the_strength_to_zero() -> None:
    even = edit_levels(EditConfig(steps=4, strength=0.8, shift=1))
    assert even.tolist() == pytest.approx([0.8, 0.6, 0.4, 0.2, 0])
    shifted = edit_levels(EditConfig(steps=2, strength=0.6, shift=2))
    assert shifted.tolist() == pytest.approx([0.6, 0.4, 0])


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_an_edit_ends_in_what_the_network_sees_in_it(strength: float) -> None:
    target = -SOURCE
    edited = edit_pictures(restorer(target), SOURCE, TOKENS, NOISE, changed(PLAIN, strength=strength, steps=3))
    torch.testing.assert_close(edited, target, atol=1e-5, rtol=0)


def test_a_strength_near_zero_returns_the_source_and_more_leaves_it() -> None:
    def distance(strength: float) -> float:
        config = changed(PLAIN, strength=strength)
        return float((edit_pictures(stranger, SOURCE, TOKENS, NOISE, config) - SOURCE).abs().mean())

    assert distance(1e-4) < 1e-3
    assert distance(1e-4) < distance(0.1) < distance(0.4)


def test_the_network_starts_on_the_path_and_sees_the_source_untouched() -> None:
    calls = []

    def recorder(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        calls.append((noisy, sigma))
        return torch.zeros_like(noisy[:, :3])

    edit_pictures(recorder, SOURCE, TOKENS, NOISE, changed(PLAIN, strength=0.6, steps=5))
    assert len(calls) == 5
    torch.testing.assert_close(calls[0][0][:, :3], 0.4 * SOURCE + 0.6 * NOISE)
    assert calls[0][1].tolist() == pytest.approx([0.6, 0.6])
    assert all(torch.equal(noisy[:, 3:], SOURCE) for noisy, _ in calls)


def test_the_baseline_takes_the_same_path_without_a_reference() -> None:
    def base(noisy: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        assert noisy.shape[1] == 3
        return (noisy - SOURCE.abs()) / sigma[:, None, None, None]

    config = changed(PLAIN, method="sdedit", strength=0.5, steps=4)
    torch.testing.assert_close(sdedit_pictures(base, SOURCE, TOKENS, NOISE, config), SOURCE.abs(), atol=1e-5, rtol=0)
    near = sdedit_pictures(stranger, SOURCE, TOKENS, NOISE, changed(config, strength=1e-4))
    torch.testing.assert_close(near, SOURCE, atol=2e-3, rtol=0)


@pytest.mark.parametrize("image_scale", [1.0, 1.7])
def test_guidance_follows_the_text_and_the_source(image_scale: float) -> None:
    sigma, config = torch.tensor([0.3, 0.8]), EditConfig(guidance_scale=3, image_guidance_scale=image_scale)
    nothing, shown, hidden = null_condition(TOKENS), torch.cat([NOISE, SOURCE], 1), torch.cat([NOISE, SOURCE * 0], 1)
    both, source_alone = stranger(shown, sigma, TOKENS), stranger(shown, sigma, nothing)
    neither = stranger(hidden, sigma, nothing)
    assert (source_alone - neither).abs().max() > 0.1
    expected = source_alone + 3 * (both - source_alone) + (image_scale - 1) * (source_alone - neither)
    torch.testing.assert_close(edit_guided(stranger, SOURCE, config)(NOISE, sigma, TOKENS), expected)


def test_guidance_pushes_away_from_what_it_is_given() -> None:
    sigma, negative, shown = torch.tensor([0.3, 0.8]), TOKENS.flip(0), torch.cat([NOISE, SOURCE], 1)
    away = stranger(shown, sigma, negative)
    pushed = edit_guided(stranger, SOURCE, EditConfig(guidance_scale=3), negative=negative)(NOISE, sigma, TOKENS)
    torch.testing.assert_close(pushed, away + 3 * (stranger(shown, sigma, TOKENS) - away))


def test_pixels_that_hardly_differ_are_the_sources_again() -> None:
    source = torch.zeros(1, 3, 32, 32)
    edited = source + 0.05
    edited[..., 10:20, 10:20] = 0.9
    kept = keep_unchanged(edited, source)
    assert (kept[..., 10:20, 10:20] == 0.9).all()
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[4:26, 4:26] = False
    assert (kept[..., outside] == 0).all()
    assert torch.equal(keep_unchanged(-source - 1, source), -source - 1), "a change of everything stays"
    config = changed(PLAIN, steps=2)
    drawn = (
        edit_pictures(restorer(SOURCE + 0.04), SOURCE, TOKENS, NOISE, changed(config, keep=keep)) for keep in (1, 0)
    )
    assert [float((picture - SOURCE).abs().max()) for picture in drawn] == pytest.approx([0, 0.04], abs=1e-5)


def picture(side: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def pixels(images: list[Image.Image]) -> NDArray[np.int64]:
    return np.stack([np.asarray(image) for image in images]).astype(np.int64)


@pytest.fixture
def base(tmp_path: Path) -> KNNDiffusionPipeline:
    return tiny_models.pipeline(tiny_models.database(tmp_path / "database", tiny_models.unit_rows(40)))


@pytest.fixture
def editor(base: KNNDiffusionPipeline) -> KNNDiffusionPipeline:
    wide = widen_input(base.transformer)
    with torch.no_grad():
        wide.pos_embed.proj.weight += 0.2 * torch.randn(wide.pos_embed.proj.weight.shape, generator=GENERATOR)
    base.register_modules(transformer=wide.eval())
    return base


def drawn(pipeline: KNNDiffusionPipeline, images: Any, prompts: Any = PROMPT, **options: Any) -> list[Image.Image]:
    call = {name: options.pop(name) for name in ("neighbours", "retrieve") if name in options}
    config = EditConfig(**{"method": "restore", "steps": 3, "candidates": 1} | options)
    return edit(pipeline, images, prompts, config, generator=torch.Generator().manual_seed(0), **call)


def test_every_picture_is_edited_as_it_is_alone(editor: KNNDiffusionPipeline) -> None:
    images = [picture(seed=seed) for seed in range(BATCH["cpu"] + 2)]
    together = drawn(editor, images)
    assert {(image.mode, image.size) for image in together} == {("RGB", (8, 8))}
    assert np.abs(pixels(drawn(editor, images[:3])) - pixels(together[:3])).max() <= 1
    assert np.abs(pixels(drawn(editor, images[0])) - pixels(together[:1])).max() <= 1
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
def test_every_option_changes_the_picture(editor: KNNDiffusionPipeline, option: dict[str, Any]) -> None:
    assert (pixels(drawn(editor, picture())) != pixels(drawn(editor, picture(), **option))).any()


class Eye:
    """An encoder to which a picture is the closer to the prompt the redder it is."""

    def __init__(self) -> None:
        self.shown: list[NDArray[np.uint8]] = []

    def embed_pixels(self, pictures: NDArray[np.uint8]) -> Tensor:
        self.shown.append(pictures)
        cosine = torch.from_numpy(pictures[..., :1].astype(np.float32)).mean((1, 2)) / 255
        other = torch.nn.functional.normalize(PROMPT.roll(1, 1) - (PROMPT.roll(1, 1) @ PROMPT.T) * PROMPT)
        return cosine * PROMPT + (1 - cosine**2).sqrt() * other


@pytest.fixture
def eye(editor: KNNDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> Eye:
    monkeypatch.setattr(editor, "_encoder", seen := Eye())
    return seen


def test_contrast_asks_the_encoder_what_the_picture_shows(editor: KNNDiffusionPipeline, eye: Eye) -> None:
    assert (pixels(drawn(editor, picture(), contrast=True)) != pixels(drawn(editor, picture()))).any()
    np.testing.assert_array_equal(eye.shown[0], pixels([picture()]))


@pytest.mark.parametrize("method", ["restore", "sdedit"])
def test_of_several_candidates_the_closest_to_the_text_is_kept(
    editor: KNNDiffusionPipeline, eye: Eye, method: str
) -> None:
    (kept,) = pixels(drawn(editor, picture(), method=method, candidates=4, kept_db=-100))
    reds = [shown[0, ..., 0].mean() for shown in eye.shown]
    assert len(reds) == 4
    assert np.ptp(reds) > 1
    np.testing.assert_array_equal(kept, eye.shown[int(np.argmax(reds))][0])


def test_a_local_edit_changes_its_region_alone(editor: KNNDiffusionPipeline, eye: Eye) -> None:
    images = [picture(seed=seed) for seed in range(BATCH["cpu"] + 1)]
    options: dict[str, Any] = {"method": "local", "candidates": 2, "largest_region": 0.5, "keep": False}
    together = pixels(drawn(editor, images, **options))
    same = (np.abs(together - pixels(images)).max(-1) <= 1).mean((1, 2))
    assert (same > 0.1).all()
    assert (same < 1).any()
    alone = pixels(drawn(editor, images[:1], **options))
    assert np.abs(alone - together[:1]).max() <= 1


@pytest.mark.parametrize("method", ["restore", "sdedit"])
def test_hardly_any_strength_returns_the_picture(editor: KNNDiffusionPipeline, method: str) -> None:
    assert np.abs(pixels(drawn(editor, picture(), method=method, strength=1e-4)) - pixels([picture()])).max() <= 3


def test_an_edit_that_changes_nothing_says_so(editor: KNNDiffusionPipeline, caplog: pytest.LogCaptureFixture) -> None:
    sources = [picture(seed=0), picture(seed=1)]
    with caplog.at_level(logging.WARNING):
        drawn(editor, sources)
        assert not caplog.text
        assert (pixels(drawn(editor, sources, strength=1e-4)) == pixels(sources)).all()
    assert "2 of 2 pictures are left as they were; say it otherwise, or allow more" in caplog.text


def test_a_generator_that_was_not_trained_for_it_is_refused_but_has_the_baseline(base: KNNDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match=r"not trained for editing; .*method='local'"):
        drawn(base, picture())
    assert len(drawn(base, [picture()] * 2, method="sdedit")) == 2


def test_any_picture_is_fitted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    wide = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    wide.paste((0, 0, 255, 255), (20, 0, 40, 20))
    with caplog.at_level(logging.WARNING):
        fitted = fit_images([wide, picture(), Image.new("L", (8, 8), 77), Image.new("P", (8, 8))], 8)
    assert (fitted.shape, fitted.dtype) == ((4, 8, 8, 3), np.uint8)
    assert fitted[0, 4, 0].tolist() == [255, 255, 255], "what was transparent is white"
    assert fitted[0, 4, 7].tolist() == [0, 0, 255]
    assert (fitted[2] == 77).all()
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 4 pictures are cut to their centre square and resized to 8 px"
    ]


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        ([], PROMPT, "no picture to edit"),
        (["cat.png"], PROMPT, "no picture to edit"),
        ([picture()] * 3, PROMPT.expand(2, -1), "2 prompts for 3 pictures"),
        ([picture()], " ", "prompt is empty"),
        ([picture()], torch.full((1, 8), torch.nan), "must be finite rows"),
    ],
)
def test_bad_input_is_told_in_one_line(editor: KNNDiffusionPipeline, images: Any, prompts: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        drawn(editor, images, prompts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strength": 0}, "strength is 0; give a number above 0, and at most 1"),
        ({"strength": 1.01}, "strength is 1.01"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"steps": 0}, "at least 1 step"),
        ({"steps": 2.5}, r"steps is 2\.5 and shift 2\.0; give at least 1 step, in whole numbers"),
        ({"shift": float("inf")}, "steps is 12 and shift inf; .* a finite shift above 0"),
        ({"guidance_scale": float("inf")}, "finite"),
        ({"candidates": 0}, "candidates is 0; give a whole number, at least 1"),
        ({"candidates": 1.5}, r"candidates is 1\.5; give a whole number, at least 1"),
        ({"largest_region": 0}, "largest_region is 0; give a share above 0, and at most 1"),
        ({"method": "paint"}, "'local', 'restore' or 'sdedit'"),
    ],
)
def test_a_config_without_meaning_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        EditConfig(**wrong)


@pytest.mark.parametrize("neighbours", [0, 1.5])
def test_neighbours_of_an_edit_are_counted(editor: KNNDiffusionPipeline, neighbours: Any) -> None:
    with pytest.raises(ModelError, match=rf"neighbours is {neighbours}; give a whole number, at least 1"):
        drawn(editor, picture(), neighbours=neighbours)


def test_the_pipeline_passes_on_what_it_is_given(base: KNNDiffusionPipeline) -> None:
    def edited(**options: Any) -> NDArray[np.int64]:
        made = base.edit(picture(), PROMPT, generator=torch.Generator().manual_seed(0), method="sdedit", **options)
        return pixels(made)

    expected = pixels(drawn(base, picture(), method="sdedit", steps=2, strength=0.7, candidates=1, shift=2.0))
    np.testing.assert_array_equal(edited(num_inference_steps=2, strength=0.7, candidates=1), expected)
    with pytest.raises(ModelError, match="at least 1 step"):
        edited(num_inference_steps=0, candidates=1)
