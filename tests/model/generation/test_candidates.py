"""Generation of several candidates for each image that is returned."""

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

from model.configs import VQTransformerConfig
from model.errors import ModelError
from model.generation import sampling
from model.generation.batching import BATCH_SIZE
from model.generation.sampling import best_candidates
from model.networks.vq_autoencoder import AutoencoderConfig, build_autoencoder
from model.networks.vq_transformer import build_vq_transformer
from model.pipeline import KNNDiffusionPipeline, new_pipeline

PROMPTS = F.normalize(torch.from_numpy(tiny_models.unit_rows(4, seed=1)).float())
IMAGES, CANDIDATES = 3, 5


class RandomEncoder:
    """Encoder that projects pixels at random."""

    def embed_pixels(self, images: NDArray[np.uint8]) -> Tensor:
        flat = torch.from_numpy(images.reshape(len(images), -1)).float() / 127.5 - 1
        directions = torch.randn(flat.shape[1], tiny_models.WIDTH, generator=torch.Generator().manual_seed(5))
        return F.normalize(flat @ directions)


class LimitedEncoder(RandomEncoder):
    """Encoder that runs out of memory above ``limit`` images."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def embed_pixels(self, images: NDArray[np.uint8]) -> Tensor:
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return super().embed_pixels(images)


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KNNDiffusionPipeline:
    made = tiny_models.pipeline(
        tiny_models.database(tmp_path / "database", tiny_models.unit_rows(40)), prediction="velocity"
    )
    monkeypatch.setattr(made, "_encoder", RandomEncoder())
    return made


def generated(pipeline: KNNDiffusionPipeline, **options: Any) -> NDArray[np.uint8]:
    chosen = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)} | options
    return np.stack([np.asarray(image) for image in pipeline(PROMPTS, **chosen).images])


def closest(images: NDArray[np.uint8], targets: Tensor) -> NDArray[np.uint8]:
    """Return the image closest to its target from each group of ``CANDIDATES`` adjacent images."""
    cosines = (RandomEncoder().embed_pixels(images) * targets.repeat_interleave(CANDIDATES, dim=0)).sum(1)
    best = cosines.reshape(-1, CANDIDATES).argmax(1).numpy()
    assert len(set(best.tolist())) > 1
    return images.reshape(-1, CANDIDATES, *images.shape[1:])[np.arange(len(best)), best]


@pytest.mark.parametrize(
    "options",
    [{"query": "text"}, {"query": "mean"}, {"query": "both"}, {"query": "none"}, {"retrieve": False}],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_candidates_return_the_one_closest_to_the_query_slot(
    pipeline: KNNDiffusionPipeline, options: dict[str, Any]
) -> None:
    mean = F.normalize(torch.from_numpy(pipeline.database.search(PROMPTS.numpy(), 3).embeddings).mean(1))
    target = {"mean": mean, "both": F.normalize(PROMPTS + mean)}.get(options.get("query", "text"), PROMPTS)
    everything = generated(pipeline, num_images_per_prompt=IMAGES * CANDIDATES, **options)
    assert len(everything) > BATCH_SIZE["cpu"]
    best = generated(pipeline, num_images_per_prompt=IMAGES, candidates=CANDIDATES, **options)
    np.testing.assert_array_equal(best, closest(everything, target.repeat_interleave(IMAGES, dim=0)))


def test_candidates_use_the_negative_prompt_of_their_prompt(pipeline: KNNDiffusionPipeline) -> None:
    options = {"negative_prompt": PROMPTS.flip(0), "guidance_scale": 3.0}
    everything = generated(pipeline, num_images_per_prompt=CANDIDATES, **options)
    np.testing.assert_array_equal(generated(pipeline, candidates=CANDIDATES, **options), closest(everything, PROMPTS))


def test_candidates_encoder_out_of_memory_halves_the_batch_then_raises(
    pipeline: KNNDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generated(pipeline, candidates=CANDIDATES)
    monkeypatch.setattr(pipeline, "_encoder", LimitedEncoder(BATCH_SIZE["cpu"] // 2))
    np.testing.assert_array_equal(generated(pipeline, candidates=CANDIDATES), expected)
    monkeypatch.setattr(pipeline, "_encoder", LimitedEncoder(0))
    with pytest.raises(ModelError, match="cpu is out of memory at batch size 4; free some"):
        generated(pipeline, candidates=CANDIDATES)
    with pytest.raises(ModelError, match="cpu is out of memory at batch size 1; free some"):
        pipeline.edit(Image.new("RGB", (8, 8)), PROMPTS[:1])


def test_candidates_of_a_discrete_network_are_selected_by_the_query_slot(
    pipeline: KNNDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    coding = AutoencoderConfig(image_size=16, downscale=4, codes=12, code_width=4, channels=(32, 32, 32), layers=1)
    size = VQTransformerConfig(codes=12, tokens=16, timesteps=10, layers=1, heads=1, head_width=16)
    network = build_vq_transformer(size, embedding_dimension=tiny_models.WIDTH, seed=0)
    made = new_pipeline(network, tiny_models.identity(), vae=build_autoencoder(coding, seed=0).eval(), neighbours=3)
    made.swap_database(pipeline.database)
    monkeypatch.setattr(made, "_encoder", RandomEncoder())
    everything = generated(made, num_images_per_prompt=CANDIDATES)
    np.testing.assert_array_equal(generated(made, candidates=CANDIDATES), closest(everything, PROMPTS))


def test_candidates_are_ignored_with_shared_noise(pipeline: KNNDiffusionPipeline) -> None:
    np.testing.assert_array_equal(
        generated(pipeline, shared_noise=True, candidates=CANDIDATES), generated(pipeline, shared_noise=True)
    )


def test_candidates_zero_raises(pipeline: KNNDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match="candidates is not a positive integer: 0; give at least 1"):
        generated(pipeline, candidates=0)


def test_candidates_default_is_saved_with_the_pipeline(
    pipeline: KNNDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.register_to_config(candidates=CANDIDATES)
    pipeline.save_pretrained(tmp_path / "saved")
    opened = KNNDiffusionPipeline.open(tmp_path / "saved", pipeline.database)
    monkeypatch.setattr(opened, "_encoder", RandomEncoder())
    np.testing.assert_array_equal(generated(opened), generated(pipeline, candidates=CANDIDATES))
    assert (generated(opened, candidates=1) != generated(opened)).any()


def test_candidates_missing_in_a_saved_pipeline_default_to_1(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    before = generated(pipeline)
    pipeline.save_pretrained(tmp_path / "saved")
    index = tmp_path / "saved" / "model_index.json"
    saved = json.loads(index.read_text())
    del saved["candidates"], saved["trained_neighbours"]
    index.write_text(json.dumps(saved))
    np.testing.assert_array_equal(generated(KNNDiffusionPipeline.open(tmp_path / "saved", pipeline.database)), before)


def test_best_candidates_pass_over_copies_unless_all_are() -> None:
    rows = F.normalize(torch.from_numpy(tiny_models.unit_rows(8, seed=2)).float())
    target, near, copied = rows[0], F.normalize(rows[0] + 0.5 * rows[1], dim=0), rows[0]
    targets = torch.stack([target] * 3)
    embeddings = torch.stack([near, copied, copied, copied, near, copied])
    neighbours = torch.stack([torch.stack([rows[5], copied])] * 3)
    assert best_candidates(embeddings, targets).tolist() == [1, 2, 5]
    assert best_candidates(embeddings, targets, neighbours).tolist() == [0, 2, 4]


@pytest.mark.parametrize(("start", "compared"), [("neighbour", True), ("noise", False)])
def test_call_compares_candidates_with_the_neighbours_if_it_starts_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Any, compared: bool
) -> None:
    stored = tiny_models.database(tmp_path / "stored", tiny_models.unit_rows(40)).with_images(
        lambda ids: [Image.new("RGB", (8, 8), (int(row), 0, 0)) for row in ids]
    )
    made = tiny_models.pipeline(stored, prediction="velocity")
    monkeypatch.setattr(made, "_encoder", RandomEncoder())
    seen = []
    original = sampling.best_candidates

    def recorded(embeddings: Tensor, targets: Tensor, neighbours: Tensor | None = None) -> Tensor:
        seen.append(neighbours)
        return original(embeddings, targets, neighbours)

    monkeypatch.setattr(sampling, "best_candidates", recorded)
    output = made(PROMPTS, start=start, candidates=2, num_images_per_prompt=2, num_inference_steps=2)
    (neighbours,) = seen
    assert (neighbours is not None) == compared
    if compared:
        assert torch.equal(neighbours, torch.from_numpy(output.hits.embeddings).repeat_interleave(2, dim=0))
