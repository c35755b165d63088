import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support import tiny_models
from torch import Tensor, nn

from model.diffusion.conditioning import condition_tokens, null_condition
from model.encoder.clip import Encoder
from model.errors import ModelError
from model.generation.batching import BATCH_SIZE
from model.images import to_pil
from model.pipeline import KNNDiffusionPipeline
from model.retrieval.database import Database

BATCH = BATCH_SIZE["cpu"]
ROWS = tiny_models.unit_rows(40)
PROMPTS = torch.nn.functional.normalize(torch.from_numpy(tiny_models.unit_rows(5, seed=1)).float())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(images: list[Image.Image]) -> NDArray[np.int64]:
    return np.stack([np.asarray(image) for image in images]).astype(np.int64)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return tiny_models.database(tmp_path / "database", ROWS)


@pytest.fixture
def pipeline(database: Database) -> KNNDiffusionPipeline:
    return tiny_models.pipeline(database)


class Oracle(nn.Module):
    """A transformer that returns the clean image of a condition, and records its inputs."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, image_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.config = SimpleNamespace(sample_size=8, in_channels=3, out_channels=3)
        self.image_of = image_of
        self.sigmas: list[list[float]] = []
        self.conditions: list[Tensor] = []

    def forward(self, noisy: Tensor, *, encoder_hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        self.sigmas.append((timestep / 1000).tolist())
        self.conditions.append(encoder_hidden_states)
        return (self.image_of(encoder_hidden_states),)


def grey(condition: Tensor) -> Tensor:
    """Return an image of the query's first component, in (−1, 1), darker towards the right."""
    level = torch.tanh(condition[:, 0, 0])[:, None, None, None]
    return (level * torch.linspace(1, 0.2, 8)).expand(-1, 3, 8, 8)


def with_oracle(database: Database, image_of: Callable[[Tensor], Tensor] = grey) -> tuple[KNNDiffusionPipeline, Oracle]:
    """Return a pipeline around an oracle, without guidance."""
    oracle = Oracle(image_of)
    pipeline = tiny_models.pipeline(database)
    pipeline.register_modules(transformer=oracle)
    pipeline.register_to_config(guidance_scale=1.0)
    return pipeline, oracle


@pytest.mark.parametrize("steps", [1, 2, 5, 25])
def test_call_any_number_of_steps_reaches_the_image(database: Database, steps: int) -> None:
    pipeline, oracle = with_oracle(database)
    output = pipeline(PROMPTS, num_inference_steps=steps, generator=seeded())
    condition = condition_tokens(PROMPTS, None, dimension=tiny_models.WIDTH, batch=5)
    expected = pixels(to_pil(grey(condition)))
    assert expected[:, 0, 0, 0].std() > 30, "five different images"
    assert np.abs(pixels(output.images) - expected).max() <= 1
    assert len(oracle.sigmas) == steps


def test_call_noise_levels_decrease_from_1_with_shift_2(database: Database) -> None:
    pipeline, oracle = with_oracle(database)
    pipeline(PROMPTS[:2], num_inference_steps=8, generator=seeded())
    even = np.linspace(1, 1 / 1000, 9)[:-1]
    shifted = 2 * even / (1 + even)  # shift 2: Esser et al. 2403.03206, eq. 23
    np.testing.assert_allclose(oracle.sigmas, np.repeat(shifted[:, None], 2, axis=1), atol=2e-6)


def test_call_out_of_range_values_are_clamped(database: Database) -> None:
    pipeline, _ = with_oracle(database, lambda condition: 3 * torch.sign(grey(condition)))
    images = pixels(pipeline(PROMPTS, generator=seeded()).images)
    expected = np.where(PROMPTS[:, 0] > 0, 255, 0)
    assert len(set(expected.tolist())) == 2
    np.testing.assert_array_equal(images, np.broadcast_to(expected[:, None, None, None], images.shape))


def test_call_images_are_ordered_by_prompt(database: Database) -> None:
    pipeline, _ = with_oracle(database)
    single = pixels(pipeline(PROMPTS, generator=seeded()).images)
    output = pipeline(PROMPTS, num_images_per_prompt=3, generator=seeded())
    assert len(output.images) == 15
    assert np.abs(pixels(output.images) - single.repeat(3, axis=0)).max() <= 1
    np.testing.assert_array_equal(output.hits.ids, database.search(PROMPTS.numpy(), 3).ids)


def test_call_images_of_one_prompt_differ(pipeline: KNNDiffusionPipeline) -> None:
    first, second = pixels(pipeline(PROMPTS[:1], num_images_per_prompt=2, generator=seeded()).images)
    assert np.abs(first - second).max() > 10


def test_call_network_input_is_query_and_neighbours(database: Database) -> None:
    pipeline, oracle = with_oracle(database)
    found = torch.from_numpy(database.search(PROMPTS.numpy(), 6).embeddings)
    mean = torch.nn.functional.normalize(found.mean(1))
    for options, query, neighbours in [
        ({}, PROMPTS, found[:, :3]),
        ({"neighbours": 6}, PROMPTS, found),
        ({"query": "none"}, None, found[:, :3]),
        ({"query": "mean", "neighbours": 6}, mean, found),
        ({"query": "both", "neighbours": 6}, torch.nn.functional.normalize(PROMPTS + mean), found),
    ]:
        oracle.conditions.clear()
        output = pipeline(PROMPTS, num_inference_steps=1, generator=seeded(), **options)
        (condition,) = oracle.conditions
        expected = condition_tokens(query, neighbours, dimension=tiny_models.WIDTH, batch=5)
        torch.testing.assert_close(condition, expected)
        np.testing.assert_array_equal(output.hits.embeddings, neighbours)


def test_call_without_retrieval_hides_the_neighbours(database: Database) -> None:
    pipeline, oracle = with_oracle(database)
    assert pipeline(PROMPTS, num_inference_steps=1, generator=seeded(), retrieve=False).hits is None
    whole = condition_tokens(PROMPTS, torch.ones(5, 1, tiny_models.WIDTH), dimension=tiny_models.WIDTH, batch=5)
    (condition,) = oracle.conditions
    torch.testing.assert_close(condition[:, 0], whole[:, 0])
    assert (condition[:, 1:] == 0).all()


def test_call_guidance_doubles_the_batch(database: Database) -> None:
    pipeline, oracle = with_oracle(database)
    pipeline(PROMPTS, num_inference_steps=2, generator=seeded())
    plain = oracle.conditions[0]
    oracle.conditions.clear()
    pipeline(PROMPTS, num_inference_steps=2, guidance_scale=3.0, generator=seeded())
    assert len(oracle.conditions) == 2
    assert torch.equal(oracle.conditions[0], torch.cat([plain, null_condition(plain)]))


def test_call_guidance_extrapolates_from_the_unconditional_image(database: Database) -> None:
    def dim(condition: Tensor) -> Tensor:
        return 0.25 * grey(condition)  # the unconditional image is 0, so scale s gives s times this

    pipeline, _ = with_oracle(database, dim)
    base = pixels(pipeline(PROMPTS, generator=seeded()).images) - 127.5
    pushed = pixels(pipeline(PROMPTS, guidance_scale=3.0, generator=seeded()).images) - 127.5
    np.testing.assert_allclose(pushed, 3 * base, atol=2.5)
    assert np.abs(base).max() > 15


def test_call_same_seed_gives_same_images(pipeline: KNNDiffusionPipeline) -> None:
    first, same, other = (pixels(pipeline(PROMPTS, generator=seeded(seed)).images) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 10


def test_call_image_does_not_depend_on_its_batch(pipeline: KNNDiffusionPipeline) -> None:
    many = BATCH + 5
    alone, of_five, of_many = (
        pixels(pipeline(prompts, num_inference_steps=4, generator=seeded()).images)
        for prompts in (PROMPTS[:1], PROMPTS, PROMPTS.repeat(14, 1)[:many])
    )
    assert len(of_many) == many
    assert np.abs(of_five[0] - alone[0]).max() <= 1
    assert np.abs(of_many[:5] - of_five).max() <= 1
    assert np.abs(of_many[5:10] - of_five).max() > 10, "same prompts, different noise"

    # Images of the second batch equal those that the same noise gives in a batch of their own.
    generator = seeded()
    for _ in range(BATCH):
        torch.randn(3, 8, 8, generator=generator)
    last = pixels(pipeline(PROMPTS.repeat(14, 1)[BATCH:many], num_inference_steps=4, generator=generator).images)
    assert np.abs(of_many[BATCH:] - last).max() <= 1


def test_call_on_progress_counts_over_all_batches(pipeline: KNNDiffusionPipeline) -> None:
    calls: list[tuple[int, int]] = []
    pipeline(
        PROMPTS[:1],
        num_images_per_prompt=BATCH + 1,
        num_inference_steps=3,
        generator=seeded(),
        on_progress=lambda step, total: calls.append((step, total)),
    )
    assert calls == [(step, 6) for step in range(1, 7)]


def test_call_with_generator_leaves_the_global_random_state_unchanged(pipeline: KNNDiffusionPipeline) -> None:
    before = torch.random.get_rng_state()
    pipeline(PROMPTS, num_inference_steps=1, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_call_without_generator_gives_different_images(pipeline: KNNDiffusionPipeline) -> None:
    first, second = (pixels(pipeline(PROMPTS, num_inference_steps=1).images) for _ in range(2))
    assert np.abs(first - second).max() > 10


def test_call_normalises_embeddings(pipeline: KNNDiffusionPipeline) -> None:
    images = pixels(pipeline(PROMPTS, generator=seeded()).images)
    scaled = pixels(pipeline(PROMPTS.double() * 7, generator=seeded()).images)
    assert np.abs(images - scaled).max() <= 1


def test_call_embeds_texts_with_the_encoder_trained_with(tmp_path: Path) -> None:
    encoder = Encoder()
    rows = encoder.embed_texts(["red", "green", "blue", "yellow"]).numpy().astype(np.float16)
    pipeline = tiny_models.pipeline(tiny_models.database(tmp_path, rows, encoder=encoder.identity), neighbours=2)
    texts = ["a red apple", "a blue square"]
    by_text = pipeline(texts, generator=seeded())
    by_embedding = pipeline(encoder.embed_texts(texts), generator=seeded())
    assert np.abs(pixels(by_text.images) - pixels(by_embedding.images)).max() <= 1
    assert by_text.hits.ids[:, 0].tolist() == [0, 2]
    alone = pipeline(texts[0], generator=seeded())
    assert np.abs(pixels(alone.images) - pixels(by_text.images)[:1]).max() <= 1


def test_call_other_encoder_raises(tmp_path: Path) -> None:
    changed = dataclasses.replace(Encoder().identity, weights_digest="f" * 64)
    pipeline = tiny_models.pipeline(tiny_models.database(tmp_path, tiny_models.unit_rows(4, 256), encoder=changed))
    with pytest.raises(ModelError, match=r"changed: it is sticker-clip \(256-d, .* were made with sticker-clip.*ffff"):
        pipeline("an apple")


@pytest.mark.parametrize("prompts", ["", " \n", [], ["an apple", ""]])
def test_call_empty_prompt_raises(pipeline: KNNDiffusionPipeline, prompts: Any) -> None:
    with pytest.raises(ModelError, match="a prompt is empty; describe what"):
        pipeline(prompts)


@pytest.mark.parametrize("retrieve", [True, False])
def test_call_embeddings_of_other_width_raise(pipeline: KNNDiffusionPipeline, retrieve: bool) -> None:
    with pytest.raises(ModelError, match=r"\(2, 9\)"):
        pipeline(torch.ones(2, 9), retrieve=retrieve)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_call_invalid_num_images_per_prompt_raises(pipeline: KNNDiffusionPipeline, count: int) -> None:
    with pytest.raises(ModelError, match=f"num_images_per_prompt is not a positive integer: {count}; give at least 1"):
        pipeline(PROMPTS, num_images_per_prompt=count)


@pytest.mark.parametrize("option", ["num_inference_steps", "neighbours", "candidates"])
def test_call_fractional_count_raises(pipeline: KNNDiffusionPipeline, option: str) -> None:
    with pytest.raises(ModelError, match=rf"{option} is not a positive integer: 2\.5; give at least 1"):
        pipeline(PROMPTS, **{option: 2.5})


def test_call_uses_the_database_it_started_with(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    undisturbed = pipeline(PROMPTS, generator=seeded())
    other = tiny_models.database(tmp_path / "other", tiny_models.unit_rows(40, seed=9))
    output = pipeline(PROMPTS, generator=seeded(), on_progress=lambda *_: pipeline.swap_database(other))
    np.testing.assert_array_equal(pixels(output.images), pixels(undisturbed.images))
    np.testing.assert_array_equal(output.hits.ids, undisturbed.hits.ids)


def test_call_negative_prompt_uses_the_same_database(
    pipeline: KNNDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = pipeline(PROMPTS, negative_prompt=PROMPTS.flip(0), guidance_scale=2, generator=seeded())
    first, other = pipeline.database, tiny_models.database(tmp_path / "other", tiny_models.unit_rows(40, seed=9))
    search = first.search

    def swapped_meanwhile(*arguments: Any, **options: Any) -> Any:
        pipeline.swap_database(other)
        return search(*arguments, **options)

    monkeypatch.setattr(first, "search", swapped_meanwhile)
    output = pipeline(PROMPTS, negative_prompt=PROMPTS.flip(0), guidance_scale=2, generator=seeded())
    np.testing.assert_array_equal(pixels(output.images), pixels(undisturbed.images))
    assert pipeline.database is other


def test_call_without_database_raises_unless_retrieve_is_false() -> None:
    pipeline = tiny_models.pipeline(None)
    with pytest.raises(ModelError, match="this pipeline has no database; plug one in with swap_database"):
        pipeline(PROMPTS)
    assert len(pipeline(PROMPTS, retrieve=False, num_inference_steps=1).images) == 5
