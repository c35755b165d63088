"""Editing with generators over codes or latents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support import tiny_models
from torch import Tensor

from model.diffusion.vq_diffusion import Transitions
from model.editing.discrete_canvas import CONTRAST_SHARE, code_contrast
from model.editing.regions import composite, to_grid
from model.errors import ModelError
from model.generation.batching import BATCH_SIZE
from model.generation.discrete import DiscreteBackbone
from model.images import to_model_range, to_pixels
from model.pipeline import KNNDiffusionPipeline

PROCESS = Transitions(codes=12, timesteps=10)
PROMPT = torch.nn.functional.normalize(torch.from_numpy(tiny_models.unit_rows(1, seed=1)).float())


def image(seed: int = 0, side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def pixels(images: list[Image.Image]) -> NDArray[np.int64]:
    return np.stack([np.asarray(image) for image in images]).astype(np.int64)


class RedEncoder:
    """An encoder whose cosine to the prompt grows with the red of an image."""

    def embed_pixels(self, images: NDArray[np.uint8]) -> Tensor:
        red = torch.from_numpy(images[..., :1].astype(np.float32)).mean((1, 2)) / 255
        other = torch.nn.functional.normalize(PROMPT.roll(1, 1) - (PROMPT.roll(1, 1) @ PROMPT.T) * PROMPT)
        return red * PROMPT + (1 - red**2).sqrt() * other


@pytest.fixture(params=["latent", "discrete"])
def pipeline(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KNNDiffusionPipeline:
    made: KNNDiffusionPipeline = getattr(tiny_models, f"{request.param}_pipeline")()
    made.swap_database(tiny_models.database(tmp_path / "database", tiny_models.unit_rows(40)))
    monkeypatch.setattr(made, "_encoder", RedEncoder())
    return made


def edited(pipeline: KNNDiffusionPipeline, images: list[Image.Image], **options: Any) -> NDArray[np.int64]:
    options = {"steps": 3, "candidates": 2, "largest_region": 0.3, "keep": False} | options
    return pixels(pipeline.edit(images, PROMPT, generator=torch.Generator().manual_seed(0), **options))


def decoded(pipeline: KNNDiffusionPipeline, images: list[Image.Image]) -> NDArray[np.int64]:
    """Encode and decode the images."""
    source = to_model_range(torch.from_numpy(pixels(images).astype(np.uint8)))
    backbone = pipeline.backbone
    return to_pixels(backbone.decode(backbone.encode(source)).detach()).astype(np.int64)


def test_edit_half_precision_is_close_to_float32(pipeline: KNNDiffusionPipeline) -> None:
    expected = edited(pipeline, [image()])
    pipeline.to(torch.float16)
    assert np.abs(edited(pipeline, [image()]) - expected).mean() < 8


def test_edit_local_keeps_the_source_pixels_around_the_region(
    pipeline: KNNDiffusionPipeline,
) -> None:
    images = [image(seed) for seed in range(BATCH_SIZE["cpu"] + 1)]
    batch = edited(pipeline, images)
    changed = np.abs(batch - pixels(images)).max(-1) > 0
    assert changed.any((1, 2)).all(), "every image changed"
    assert (changed.mean((1, 2)) < 0.9).all(), "the rest is the source, not decoded"
    alone = edited(pipeline, images[:1])
    assert np.abs(alone - batch[:1]).max() <= 1


def test_edit_sdedit_strength_controls_the_distance_from_the_source(
    pipeline: KNNDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(pipeline.backbone, DiscreteBackbone):  # a trained network keeps the codes that it sees

        def keeping(codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return 30 * torch.nn.functional.one_hot(codes, 13)[..., :12].float()

        monkeypatch.setattr(pipeline.transformer, "forward", keeping)
    back = decoded(pipeline, [image()])
    weak = edited(pipeline, [image()], method="sdedit", strength=1e-4, candidates=1, steps=1)
    assert np.abs(weak - back).mean() < 3
    strong = edited(pipeline, [image()], method="sdedit", candidates=1)
    assert np.abs(strong - back).mean() > 3


@pytest.mark.parametrize("option", [{"strength": 0.3}, {"guidance_scale": 1.0}, {"contrast": True}], ids=str)
def test_edit_options_change_the_result(pipeline: KNNDiffusionPipeline, option: dict[str, Any]) -> None:
    plain, other = (edited(pipeline, [image()], largest_region=1.0, **given) for given in ({}, option))
    assert (plain != other).any()


def test_edit_more_steps_than_timesteps_are_reduced_and_count_as_finished(pipeline: KNNDiffusionPipeline) -> None:
    reported = list[tuple[int, int]]()
    steps = {"steps": 40, "strength": 0.2, "on_progress": lambda *step: reported.append(step)}
    assert edited(pipeline, [image()], **steps).shape == (1, 16, 16, 3)
    taken = [1, 2] if isinstance(pipeline.backbone, DiscreteBackbone) else range(1, 40)
    assert reported == [(done, 80) for done in (*taken, 40, *(40 + number for number in taken), 80)]


def test_edit_restore_without_training_raises(pipeline: KNNDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match=r"not trained for method='restore'; use method='local'"):
        edited(pipeline, [image()], method="restore")


def test_code_contrast_is_where_the_distributions_differ() -> None:
    def network(codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        assert t.unique().tolist() == [CONTRAST_SHARE * PROCESS.timesteps]
        logits = torch.zeros(*codes.shape, PROCESS.codes)
        logits[:, 5, 3] = 60 * condition.mean((1, 2))  # certain of code 3 under the text only
        return logits

    codes = torch.zeros(2, 16, dtype=torch.int64)
    uniforms = torch.rand(2, 6, 16, 2, generator=torch.Generator().manual_seed(0))
    text, own = torch.ones(2, 3, 5), torch.zeros(2, 3, 5)
    expected = torch.zeros(2, 16)
    expected[:, 5] = 1 - 1 / PROCESS.codes
    contrast = code_contrast(network, codes, text, own, uniforms, PROCESS)
    torch.testing.assert_close(contrast, expected.view(2, 1, 4, 4), atol=1e-5, rtol=0)
    assert not code_contrast(network, codes, text, text, uniforms, PROCESS).any()


def test_to_grid_and_composite_affect_only_touched_cells() -> None:
    region = torch.zeros(1, 1, 16, 16)
    region[..., 3:5, 0] = 0.2
    cells = to_grid(region, 4)
    assert cells[0, 0].nonzero().tolist() == [[0, 0], [1, 0]]
    source, decoded = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    result = composite(source, decoded, (cells > 0).float())
    assert (result[..., :6, :2] == 1).all()
    assert (result[..., 10:, :] == 0).all()
    assert (result[..., 6:] == 0).all()
