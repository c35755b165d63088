"""A pipeline that draws several pictures for each that it returns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from support import tiny_models
from torch import Tensor

from model.diffusion.solver import BATCH
from model.errors import ModelError
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder
from model.networks.vq_transformer import VQTransformerConfig, build_vq_transformer
from model.pipeline import KNNDiffusionPipeline, new_pipeline

PROMPTS = F.normalize(torch.from_numpy(tiny_models.unit_rows(4, seed=1)).float())
PICTURES, CANDIDATES = 3, 5


class Eye:
    """An encoder: random directions of the pixels."""

    def embed_pixels(self, pictures: NDArray[np.uint8]) -> Tensor:
        flat = torch.from_numpy(pictures.reshape(len(pictures), -1)).float() / 127.5 - 1
        directions = torch.randn(flat.shape[1], tiny_models.WIDTH, generator=torch.Generator().manual_seed(5))
        return F.normalize(flat @ directions)


class ShortOfMemory(Eye):
    """It holds so many pictures at a time."""

    def __init__(self, holds: int) -> None:
        self.holds = holds

    def embed_pixels(self, pictures: NDArray[np.uint8]) -> Tensor:
        if len(pictures) > self.holds:
            raise torch.OutOfMemoryError("out of memory")
        return super().embed_pixels(pictures)


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KNNDiffusionPipeline:
    made = tiny_models.pipeline(
        tiny_models.database(tmp_path / "database", tiny_models.unit_rows(40)), prediction="velocity"
    )
    monkeypatch.setattr(made, "_encoder", Eye())
    return made


def drawn(pipeline: KNNDiffusionPipeline, **options: Any) -> NDArray[np.uint8]:
    chosen = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)} | options
    return np.stack([np.asarray(image) for image in pipeline(PROMPTS, **chosen).images])


def closest(all_drawn: NDArray[np.uint8], targets: Tensor) -> NDArray[np.uint8]:
    """Of every ``CANDIDATES`` pictures in a row the one closest to its target."""
    cosines = (Eye().embed_pixels(all_drawn) * targets.repeat_interleave(CANDIDATES, dim=0)).sum(1)
    best = cosines.reshape(-1, CANDIDATES).argmax(1).numpy()
    assert len(set(best.tolist())) > 1
    return all_drawn.reshape(-1, CANDIDATES, *all_drawn.shape[1:])[np.arange(len(best)), best]


@pytest.mark.parametrize(
    "options",
    [{"query": "text"}, {"query": "mean"}, {"query": "both"}, {"query": "none"}, {"retrieve": False}],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_the_candidate_closest_to_the_query_slot_is_kept(
    pipeline: KNNDiffusionPipeline, options: dict[str, Any]
) -> None:
    mean = F.normalize(torch.from_numpy(pipeline.database.search(PROMPTS.numpy(), 3).embeddings).mean(1))
    target = {"mean": mean, "both": F.normalize(PROMPTS + mean)}.get(options.get("query", "text"), PROMPTS)
    everything = drawn(pipeline, num_images_per_prompt=PICTURES * CANDIDATES, **options)
    assert len(everything) > BATCH["cpu"]
    kept = drawn(pipeline, num_images_per_prompt=PICTURES, candidates=CANDIDATES, **options)
    np.testing.assert_array_equal(kept, closest(everything, target.repeat_interleave(PICTURES, dim=0)))


def test_each_candidate_keeps_away_from_its_own_negative_prompt(pipeline: KNNDiffusionPipeline) -> None:
    options = {"negative_prompts": PROMPTS.flip(0), "guidance_scale": 3.0}
    everything = drawn(pipeline, num_images_per_prompt=CANDIDATES, **options)
    np.testing.assert_array_equal(drawn(pipeline, candidates=CANDIDATES, **options), closest(everything, PROMPTS))


def test_an_encoder_out_of_memory_is_shown_half_as_many_and_then_told(
    pipeline: KNNDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = drawn(pipeline, candidates=CANDIDATES)
    monkeypatch.setattr(pipeline, "_encoder", ShortOfMemory(BATCH["cpu"] // 2))
    np.testing.assert_array_equal(drawn(pipeline, candidates=CANDIDATES), expected)
    monkeypatch.setattr(pipeline, "_encoder", ShortOfMemory(0))
    with pytest.raises(ModelError, match="cpu is out of memory for 4 pictures at a time; free some"):
        drawn(pipeline, candidates=CANDIDATES)
    with pytest.raises(ModelError, match="cpu is out of memory for 1 pictures at a time; free some"):
        pipeline.edit(Image.new("RGB", (8, 8)), PROMPTS[:1])


def test_codes_have_candidates_too(pipeline: KNNDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    coding = AutoencoderConfig(image_size=16, downscale=4, codes=12, code_width=4, channels=(32, 32, 32), layers=1)
    size = VQTransformerConfig(codes=12, tokens=16, timesteps=10, layers=1, heads=1, head_width=16)
    network = build_vq_transformer(size, embedding_dimension=tiny_models.WIDTH, seed=0)
    made = new_pipeline(network, tiny_models.identity(), vae=build_autoencoder(coding, seed=0).eval(), neighbours=3)
    made.swap_database(pipeline.database)
    monkeypatch.setattr(made, "_encoder", Eye())
    everything = drawn(made, num_images_per_prompt=CANDIDATES)
    np.testing.assert_array_equal(drawn(made, candidates=CANDIDATES), closest(everything, PROMPTS))


def test_with_shared_noise_there_is_no_choice(pipeline: KNNDiffusionPipeline) -> None:
    np.testing.assert_array_equal(
        drawn(pipeline, shared_noise=True, candidates=CANDIDATES), drawn(pipeline, shared_noise=True)
    )


def test_no_candidates_cannot_be_asked_for(pipeline: KNNDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match="candidates must be at least 1"):
        drawn(pipeline, candidates=0)


def test_the_number_is_saved_with_the_generator(
    pipeline: KNNDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.register_to_config(candidates=CANDIDATES)
    pipeline.save_pretrained(tmp_path / "saved")
    opened = KNNDiffusionPipeline.open(tmp_path / "saved", pipeline.database)
    monkeypatch.setattr(opened, "_encoder", Eye())
    np.testing.assert_array_equal(drawn(opened), drawn(pipeline, candidates=CANDIDATES))
    assert (drawn(opened, candidates=1) != drawn(opened)).any()


def test_a_generator_saved_before_there_were_candidates_draws_one(
    pipeline: KNNDiffusionPipeline, tmp_path: Path
) -> None:
    before = drawn(pipeline)
    pipeline.save_pretrained(tmp_path / "saved")
    index = tmp_path / "saved" / "model_index.json"
    kept = json.loads(index.read_text())
    del kept["candidates"], kept["trained_neighbours"]
    index.write_text(json.dumps(kept))
    np.testing.assert_array_equal(drawn(KNNDiffusionPipeline.open(tmp_path / "saved", pipeline.database)), before)
