"""Editing by generators that draw codes or latents: what changes, and what stays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support import tiny_models
from torch import Tensor

from model.diffusion.solver import BATCH
from model.diffusion.vq_diffusion import Transitions
from model.editing.discrete_canvas import CONTRAST_SHARE, code_contrast
from model.editing.edit import EditConfig, edit
from model.editing.regions import cells_of, laid_over
from model.errors import ModelError
from model.networks.latents import decode_latents, encode_latents
from model.networks.vq_autoencoder import decode_codes, encode_codes
from model.networks.vq_transformer import VQTransformer
from model.pipeline import KNNDiffusionPipeline
from model.training.data import to_model_range

PROCESS = Transitions(codes=12, timesteps=10)
PROMPT = torch.nn.functional.normalize(torch.from_numpy(tiny_models.unit_rows(1, seed=1)).float())


def picture(seed: int = 0, side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def pixels(images: list[Image.Image]) -> NDArray[np.int64]:
    return np.stack([np.asarray(image) for image in images]).astype(np.int64)


class Eye:
    """An encoder to which a picture is the closer to the prompt the redder it is."""

    def embed_pixels(self, pictures: NDArray[np.uint8]) -> Tensor:
        red = torch.from_numpy(pictures[..., :1].astype(np.float32)).mean((1, 2)) / 255
        other = torch.nn.functional.normalize(PROMPT.roll(1, 1) - (PROMPT.roll(1, 1) @ PROMPT.T) * PROMPT)
        return red * PROMPT + (1 - red**2).sqrt() * other


@pytest.fixture(params=["latent", "discrete"])
def pipeline(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KNNDiffusionPipeline:
    made: KNNDiffusionPipeline = getattr(tiny_models, f"{request.param}_pipeline")()
    made.swap_database(tiny_models.database(tmp_path / "database", tiny_models.unit_rows(40)))
    monkeypatch.setattr(made, "_encoder", Eye())
    return made


def edited(pipeline: KNNDiffusionPipeline, images: list[Image.Image], **options: Any) -> NDArray[np.int64]:
    config = EditConfig(**{"steps": 3, "candidates": 2, "largest_region": 0.3, "keep": False} | options)
    return pixels(edit(pipeline, images, PROMPT, config, generator=torch.Generator().manual_seed(0)))


def decoded(pipeline: KNNDiffusionPipeline, images: list[Image.Image]) -> NDArray[np.int64]:
    """The pictures through the autoencoder and back."""
    source = to_model_range(torch.from_numpy(pixels(images).astype(np.uint8)))
    if isinstance(pipeline.transformer, VQTransformer):
        back = decode_codes(pipeline.vae, encode_codes(pipeline.vae, source))
    else:
        back = decode_latents(pipeline.vae, encode_latents(pipeline.vae, source)).clamp(-1, 1)
    return ((back + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.int64)


def test_half_precision_edits_as_the_whole_does(pipeline: KNNDiffusionPipeline) -> None:
    expected = edited(pipeline, [picture()])
    pipeline.to(torch.float16)
    assert np.abs(edited(pipeline, [picture()]) - expected).mean() < 8


def test_a_local_edit_draws_one_region_and_leaves_the_source_s_pixels_around_it(
    pipeline: KNNDiffusionPipeline,
) -> None:
    images = [picture(seed) for seed in range(BATCH["cpu"] + 1)]
    together = edited(pipeline, images)
    changed = np.abs(together - pixels(images)).max(-1) > 0
    assert changed.any((1, 2)).all(), "something was drawn in each"
    assert (changed.mean((1, 2)) < 0.9).all(), "and the rest of each was left, not decoded"
    alone = edited(pipeline, images[:1])
    assert np.abs(alone - together[:1]).max() <= 1


def test_the_baseline_from_hardly_any_noise_decodes_the_source_and_from_all_of_it_draws_another(
    pipeline: KNNDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(pipeline.transformer, VQTransformer):  # a trained one believes the codes that it sees

        def believing(codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return 30 * torch.nn.functional.one_hot(codes, 13)[..., :12].float()

        monkeypatch.setattr(pipeline.transformer, "forward", believing)
    back = decoded(pipeline, [picture()])
    weak = edited(pipeline, [picture()], method="sdedit", strength=1e-4, candidates=1, steps=1)
    assert np.abs(weak - back).mean() < 3
    strong = edited(pipeline, [picture()], method="sdedit", candidates=1)
    assert np.abs(strong - back).mean() > 3


@pytest.mark.parametrize("option", [{"strength": 0.3}, {"guidance_scale": 1.0}, {"contrast": True}], ids=str)
def test_options_change_the_edit(pipeline: KNNDiffusionPipeline, option: dict[str, Any]) -> None:
    plain, other = (edited(pipeline, [picture()], largest_region=1.0, **given) for given in ({}, option))
    assert (plain != other).any()


def test_no_more_strides_are_taken_than_the_strength_has_times(pipeline: KNNDiffusionPipeline) -> None:
    assert edited(pipeline, [picture()], steps=40, strength=0.2).shape == (1, 16, 16, 3)


def test_restoring_is_trained_for_pixels_alone(pipeline: KNNDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match=r"not trained for editing; .*method='local'"):
        edited(pipeline, [picture()], method="restore")


def test_the_contrast_of_codes_is_where_the_two_distributions_differ() -> None:
    def network(codes: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        assert t.unique().tolist() == [CONTRAST_SHARE * PROCESS.timesteps]
        logits = torch.zeros(*codes.shape, PROCESS.codes)
        logits[:, 5, 3] = 60 * condition.mean((1, 2))  # certain of code 3 under the text, of nothing under the source
        return logits

    codes = torch.zeros(2, 16, dtype=torch.int64)
    chances = torch.rand(2, 6, 16, 2, generator=torch.Generator().manual_seed(0))
    text, shown = torch.ones(2, 3, 5), torch.zeros(2, 3, 5)
    expected = torch.zeros(2, 16)
    expected[:, 5] = 1 - 1 / PROCESS.codes
    contrast = code_contrast(network, codes, text, shown, chances, PROCESS)
    torch.testing.assert_close(contrast, expected.view(2, 1, 4, 4), atol=1e-5, rtol=0)
    assert not code_contrast(network, codes, text, text, chances, PROCESS).any()


def test_a_region_frees_every_cell_it_touches_and_nothing_far_from_them_changes() -> None:
    region = torch.zeros(1, 1, 16, 16)
    region[..., 3:5, 0] = 0.2
    cells = cells_of(region, 4)
    assert cells[0, 0].nonzero().tolist() == [[0, 0], [1, 0]]
    source, drawn = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    laid = laid_over(source, drawn, (cells > 0).float())
    assert (laid[..., :6, :2] == 1).all()
    assert (laid[..., 10:, :] == 0).all()
    assert (laid[..., 6:] == 0).all()
