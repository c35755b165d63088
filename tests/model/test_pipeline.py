import dataclasses
import itertools
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
from model.diffusion.solver import BATCH as BATCHES
from model.encoder.clip import Encoder
from model.errors import ModelError
from model.pipeline import KNNDiffusionPipeline, new_pipeline, to_images
from model.retrieval.database import Database

BATCH = BATCHES["cpu"]
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
    """A transformer that knows the clean picture of a condition, and keeps what it was asked."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, picture: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.config = SimpleNamespace(sample_size=8, in_channels=3, out_channels=3)
        self.picture = picture
        self.sigmas: list[list[float]] = []
        self.conditions: list[Tensor] = []

    def forward(self, noisy: Tensor, *, encoder_hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        self.sigmas.append((timestep / 1000).tolist())
        self.conditions.append(encoder_hidden_states)
        return (self.picture(encoder_hidden_states),)


def grey(condition: Tensor) -> Tensor:
    """A flat picture of the query's first component, in (−1, 1), darker towards the right."""
    level = torch.tanh(condition[:, 0, 0])[:, None, None, None]
    return (level * torch.linspace(1, 0.2, 8)).expand(-1, 3, 8, 8)


def knowing(database: Database, picture: Callable[[Tensor], Tensor] = grey) -> tuple[KNNDiffusionPipeline, Oracle]:
    """A pipeline around an oracle, guidance off."""
    oracle = Oracle(picture)
    pipeline = tiny_models.pipeline(database)
    pipeline.register_modules(transformer=oracle)
    pipeline.register_to_config(guidance_scale=1.0)
    return pipeline, oracle


@pytest.mark.parametrize("steps", [1, 2, 5, 25])
def test_the_steps_arrive_at_the_picture_that_the_network_knows(database: Database, steps: int) -> None:
    pipeline, oracle = knowing(database)
    output = pipeline(PROMPTS, num_inference_steps=steps, generator=seeded())
    condition = condition_tokens(PROMPTS, None, dimension=tiny_models.WIDTH, batch=5)
    expected = pixels(to_images(grey(condition)))
    assert expected[:, 0, 0, 0].std() > 30, "five different pictures"
    assert np.abs(pixels(output.images) - expected).max() <= 1
    assert len(oracle.sigmas) == steps


def test_the_noise_levels_fall_from_1_and_linger_where_there_is_much_noise(database: Database) -> None:
    pipeline, oracle = knowing(database)
    pipeline(PROMPTS[:2], num_inference_steps=8, generator=seeded())
    even = np.linspace(1, 1 / 1000, 9)[:-1]
    shifted = 2 * even / (1 + even)  # shift 2: Esser et al. 2403.03206, eq. 23
    np.testing.assert_allclose(oracle.sigmas, np.repeat(shifted[:, None], 2, axis=1), atol=2e-6)


def test_what_overshoots_is_white_or_black(database: Database) -> None:
    pipeline, _ = knowing(database, lambda condition: 3 * torch.sign(grey(condition)))
    drawn = pixels(pipeline(PROMPTS, generator=seeded()).images)
    expected = np.where(PROMPTS[:, 0] > 0, 255, 0)
    assert len(set(expected.tolist())) == 2
    np.testing.assert_array_equal(drawn, np.broadcast_to(expected[:, None, None, None], drawn.shape))


def test_pictures_come_prompt_after_prompt(database: Database) -> None:
    pipeline, _ = knowing(database)
    single = pixels(pipeline(PROMPTS, generator=seeded()).images)
    output = pipeline(PROMPTS, num_images_per_prompt=3, generator=seeded())
    assert len(output.images) == 15
    assert np.abs(pixels(output.images) - single.repeat(3, axis=0)).max() <= 1
    np.testing.assert_array_equal(output.hits.ids, database.search(PROMPTS.numpy(), 3).ids)


def test_pictures_of_one_prompt_differ(pipeline: KNNDiffusionPipeline) -> None:
    first, second = pixels(pipeline(PROMPTS[:1], num_images_per_prompt=2, generator=seeded()).images)
    assert np.abs(first - second).max() > 10


def test_the_network_is_told_the_query_and_its_neighbours(database: Database) -> None:
    pipeline, oracle = knowing(database)
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
        (told,) = oracle.conditions
        expected = condition_tokens(query, neighbours, dimension=tiny_models.WIDTH, batch=5)
        torch.testing.assert_close(told, expected)
        np.testing.assert_array_equal(output.hits.embeddings, neighbours)


def test_without_retrieval_the_network_is_told_the_query_alone(database: Database) -> None:
    pipeline, oracle = knowing(database)
    assert pipeline(PROMPTS, num_inference_steps=1, generator=seeded(), retrieve=False).hits is None
    whole = condition_tokens(PROMPTS, torch.ones(5, 1, tiny_models.WIDTH), dimension=tiny_models.WIDTH, batch=5)
    (told,) = oracle.conditions
    torch.testing.assert_close(told[:, 0], whole[:, 0])
    assert (told[:, 1:] == 0).all()


def test_guidance_costs_one_call_of_twice_the_batch_a_step(database: Database) -> None:
    pipeline, oracle = knowing(database)
    pipeline(PROMPTS, num_inference_steps=2, generator=seeded())
    plain = oracle.conditions[0]
    oracle.conditions.clear()
    pipeline(PROMPTS, num_inference_steps=2, guidance_scale=3.0, generator=seeded())
    assert len(oracle.conditions) == 2
    assert torch.equal(oracle.conditions[0], torch.cat([plain, null_condition(plain)]))


def test_guidance_moves_the_picture_away_from_the_unconditional_one(database: Database) -> None:
    def dim(condition: Tensor) -> Tensor:
        return 0.25 * grey(condition)  # the unconditional picture is 0, so that scale s draws s times this

    pipeline, _ = knowing(database, dim)
    base = pixels(pipeline(PROMPTS, generator=seeded()).images) - 127.5
    pushed = pixels(pipeline(PROMPTS, guidance_scale=3.0, generator=seeded()).images) - 127.5
    np.testing.assert_allclose(pushed, 3 * base, atol=2.5)
    assert np.abs(base).max() > 15


def test_the_same_seed_draws_the_same_pictures(pipeline: KNNDiffusionPipeline) -> None:
    first, same, other = (pixels(pipeline(PROMPTS, generator=seeded(seed)).images) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 10


def test_a_picture_does_not_depend_on_its_batch(pipeline: KNNDiffusionPipeline) -> None:
    many = BATCH + 5
    alone, of_five, of_many = (
        pixels(pipeline(prompts, num_inference_steps=4, generator=seeded()).images)
        for prompts in (PROMPTS[:1], PROMPTS, PROMPTS.repeat(14, 1)[:many])
    )
    assert len(of_many) == many
    assert np.abs(of_five[0] - alone[0]).max() <= 1
    assert np.abs(of_many[:5] - of_five).max() <= 1
    assert np.abs(of_many[5:10] - of_five).max() > 10, "the same prompts, other noise"

    # The pictures past the batch's end are those that the same noise draws in a batch of their own.
    generator = seeded()
    for _ in range(BATCH):
        torch.randn(3, 8, 8, generator=generator)
    last = pixels(pipeline(PROMPTS.repeat(14, 1)[BATCH:many], num_inference_steps=4, generator=generator).images)
    assert np.abs(of_many[BATCH:] - last).max() <= 1


def test_steps_are_told_over_all_batches(pipeline: KNNDiffusionPipeline) -> None:
    told: list[tuple[int, int]] = []
    pipeline(
        PROMPTS[:1],
        num_images_per_prompt=BATCH + 1,
        num_inference_steps=3,
        generator=seeded(),
        callback=lambda step, steps: told.append((step, steps)),
    )
    assert told == [(step, 6) for step in range(1, 7)]


def test_a_seeded_call_leaves_the_global_random_state_alone(pipeline: KNNDiffusionPipeline) -> None:
    before = torch.random.get_rng_state()
    pipeline(PROMPTS, num_inference_steps=1, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_generator_every_call_draws_anew(pipeline: KNNDiffusionPipeline) -> None:
    first, second = (pixels(pipeline(PROMPTS, num_inference_steps=1).images) for _ in range(2))
    assert np.abs(first - second).max() > 10


def test_embeddings_are_scaled_to_unit_length(pipeline: KNNDiffusionPipeline) -> None:
    images = pixels(pipeline(PROMPTS, generator=seeded()).images)
    scaled = pixels(pipeline(PROMPTS.double() * 7, generator=seeded()).images)
    assert np.abs(images - scaled).max() <= 1


def test_texts_are_embedded_by_the_encoder_trained_with(tmp_path: Path) -> None:
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


def test_an_encoder_that_is_not_the_one_trained_with_is_refused(tmp_path: Path) -> None:
    changed = dataclasses.replace(Encoder().identity, weights_digest="f" * 64)
    pipeline = tiny_models.pipeline(tiny_models.database(tmp_path, tiny_models.unit_rows(4, 256), encoder=changed))
    with pytest.raises(ModelError, match=r"sticker-clip \(256-d, .* is not what was embedded with, sticker-clip.*ffff"):
        pipeline("an apple")


@pytest.mark.parametrize("prompts", ["", " \n", [], ["an apple", ""]])
def test_an_empty_prompt_is_refused(pipeline: KNNDiffusionPipeline, prompts: Any) -> None:
    with pytest.raises(ModelError, match="a prompt is empty; write what"):
        pipeline(prompts)


@pytest.mark.parametrize("retrieve", [True, False])
def test_embeddings_of_another_width_are_refused(pipeline: KNNDiffusionPipeline, retrieve: bool) -> None:
    with pytest.raises(ModelError, match=r"\(2, 9\).* do not fit"):
        pipeline(torch.ones(2, 9), retrieve=retrieve)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_no_pictures_cannot_be_asked_for(pipeline: KNNDiffusionPipeline, count: int) -> None:
    with pytest.raises(ModelError, match=r"num_images_per_prompt.* must be at least 1"):
        pipeline(PROMPTS, num_images_per_prompt=count)


@pytest.mark.parametrize("option", ["num_inference_steps", "neighbours", "candidates"])
def test_numbers_of_a_call_are_whole(pipeline: KNNDiffusionPipeline, option: str) -> None:
    with pytest.raises(ModelError, match=rf"{option}.* must be at least 1, in whole numbers"):
        pipeline(PROMPTS, **{option: 2.5})


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"guidance_interval": (0.9, 0.1)}, r"guidance_interval is \[0\.9, 0\.1\]; give two noise levels, the lower"),
        ({"guidance_interval": (0.9,)}, r"guidance_interval is \[0\.9\]"),
        ({"guidance_interval": (0.1, float("nan"))}, "guidance_interval is"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"prediction": "foo"}, "prediction is 'foo'; write one of velocity, sample"),
        ({"query": "foo"}, "query is 'foo'; write one of text, mean, both, none"),
        ({"truncation": 0}, "truncation is 0; give a share above 0"),
        ({"truncation": 1.1}, r"truncation is 1\.1"),
        ({"neighbours": 0}, "neighbours is 0; give a whole number, at least 1"),
        ({"trained_neighbours": -1}, "trained_neighbours is -1"),
        ({"candidates": 1.5}, r"candidates is 1\.5"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
    ],
    ids=str,
)
def test_defaults_that_no_call_could_use_are_refused(wrong: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=told):
        new_pipeline(tiny_models.network(), tiny_models.identity(), **wrong)
    made = new_pipeline(tiny_models.network(), tiny_models.identity())
    made.register_to_config(
        **{name: list(value) if isinstance(value, tuple) else value for name, value in wrong.items()}
    )
    made.save_pretrained(tmp_path / "saved")
    with pytest.raises(ModelError, match=f"(?s)saved holds no usable generator .*{told}"):
        KNNDiffusionPipeline.open(tmp_path / "saved")


def test_another_database_draws_other_pictures(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    first = pipeline.database
    before = pixels(pipeline(PROMPTS, generator=seeded()).images)
    other = tiny_models.database(
        tmp_path / "other",
        tiny_models.unit_rows(40, seed=9),
        encoder=tiny_models.identity(name="the same by another name"),
    )
    pipeline.swap_database(other)
    assert pipeline.database is other
    assert np.abs(pixels(pipeline(PROMPTS, generator=seeded()).images) - before).max() > 10
    pipeline.swap_database(first)
    np.testing.assert_array_equal(pixels(pipeline(PROMPTS, generator=seeded()).images), before)


def test_a_database_of_another_encoder_is_refused_and_the_old_one_stays(
    pipeline: KNNDiffusionPipeline, tmp_path: Path
) -> None:
    before = pipeline.database
    stranger = tiny_models.database(
        tmp_path / "other", ROWS, encoder=tiny_models.identity(name="ViT-B-32/openai", weights="f" * 64), name="birds"
    )
    with pytest.raises(ModelError) as caught:
        pipeline.swap_database(stranger)
    for part in ("database birds", "ViT-B-32/openai (8-d, ffffffff", "tiny-clip (8-d, 00000000", "rebuild"):
        assert part in str(caught.value)
    assert pipeline.database is before


def test_a_call_works_with_the_database_it_started_with(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    undisturbed = pipeline(PROMPTS, generator=seeded())
    other = tiny_models.database(tmp_path / "other", tiny_models.unit_rows(40, seed=9))
    output = pipeline(PROMPTS, generator=seeded(), callback=lambda *_: pipeline.swap_database(other))
    np.testing.assert_array_equal(pixels(output.images), pixels(undisturbed.images))
    np.testing.assert_array_equal(output.hits.ids, undisturbed.hits.ids)


def test_what_to_keep_away_from_is_looked_up_where_the_prompts_are(
    pipeline: KNNDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = pipeline(PROMPTS, negative_prompts=PROMPTS.flip(0), guidance_scale=2, generator=seeded())
    first, other = pipeline.database, tiny_models.database(tmp_path / "other", tiny_models.unit_rows(40, seed=9))
    search = first.search

    def swapped_meanwhile(*arguments: Any, **options: Any) -> Any:
        pipeline.swap_database(other)
        return search(*arguments, **options)

    monkeypatch.setattr(first, "search", swapped_meanwhile)
    output = pipeline(PROMPTS, negative_prompts=PROMPTS.flip(0), guidance_scale=2, generator=seeded())
    np.testing.assert_array_equal(pixels(output.images), pixels(undisturbed.images))
    assert pipeline.database is other


def test_without_a_database_there_is_no_retrieval_and_drawing_without_it_works() -> None:
    pipeline = tiny_models.pipeline(None)
    with pytest.raises(ModelError, match=r"no database yet.*swap_database"):
        pipeline(PROMPTS)
    assert len(pipeline(PROMPTS, retrieve=False, num_inference_steps=1).images) == 5


def test_an_identity_is_a_must(pipeline: KNNDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match="encoder_identity is missing"):
        KNNDiffusionPipeline(pipeline.transformer, pipeline.scheduler)


def test_a_saved_pipeline_draws_identical_pictures(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    before = pixels(pipeline(PROMPTS, generator=seeded()).images)
    pipeline.save_pretrained(tmp_path / "saved")
    opened = KNNDiffusionPipeline.open(tmp_path / "saved", pipeline.database)
    np.testing.assert_array_equal(pixels(opened(PROMPTS, generator=seeded()).images), before)
    assert opened.identity == pipeline.identity


def test_the_defaults_are_saved(database: Database, tmp_path: Path) -> None:
    built = new_pipeline(
        tiny_models.network(), tiny_models.identity(), prediction="sample", neighbours=4, trained_neighbours=6
    )
    built.register_to_config(guidance_scale=3.5, num_inference_steps=7, query="mean")
    built.save_pretrained(tmp_path / "saved")
    opened = KNNDiffusionPipeline.open(tmp_path / "saved")
    told: list[int] = []
    names = ("neighbours", "trained_neighbours", "guidance_scale", "num_inference_steps", "query", "prediction")
    assert [opened.config[name] for name in names] == [4, 6, 3.5, 7, "mean", "sample"]
    opened.swap_database(database)
    output = opened(PROMPTS, callback=lambda _, steps: told.append(steps))
    assert told == [7] * 7
    assert output.hits.ids.shape == (5, 4)


def test_half_precision_weights_are_opened_as_float32(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    before = pixels(pipeline(PROMPTS, generator=seeded()).images)
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path / "saved")
    opened = KNNDiffusionPipeline.open(tmp_path / "saved", pipeline.database)
    assert {parameter.dtype for parameter in opened.transformer.parameters()} == {torch.float32}
    assert np.abs(pixels(opened(PROMPTS, generator=seeded()).images) - before).mean() < 2


@pytest.mark.parametrize("damage", ["cut", "overwritten", "gone"])
def test_damaged_weights_are_refused(pipeline: KNNDiffusionPipeline, tmp_path: Path, damage: str) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    (weights,) = (tmp_path / "saved").rglob("*.safetensors")
    whole = weights.read_bytes()
    weights.unlink()
    if damage != "gone":
        weights.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\xff" * len(whole))
    with pytest.raises(ModelError, match=r"(?s)saved holds no usable generator .*train it again, or pull it anew"):
        KNNDiffusionPipeline.open(tmp_path / "saved")


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)nowhere holds no usable generator"):
        KNNDiffusionPipeline.open(tmp_path / "nowhere")


def test_a_database_of_another_encoder_is_refused_on_opening(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    stranger = tiny_models.database(tmp_path / "other", ROWS, encoder=tiny_models.identity(weights="f" * 64))
    with pytest.raises(ModelError, match="rebuild the database"):
        KNNDiffusionPipeline.open(tmp_path / "saved", stranger)


def test_pictures_are_the_rounded_range_of_the_model() -> None:
    levels = torch.tensor([-1.0, -0.6, 0.0, 1.0])
    (image,) = to_images(levels.expand(1, 3, 2, 4))
    assert image.size == (4, 2)
    assert image.mode == "RGB"
    assert np.asarray(image)[0, :, 0].tolist() == [0, 51, 128, 255]


def test_a_picture_keeps_its_channels_and_its_way_up() -> None:
    picture = torch.full((1, 3, 2, 3), -1.0)
    picture[0, 0, 0, 2] = 1  # red, top right
    (image,) = to_images(picture)
    reds = [place for place in itertools.product(range(3), range(2)) if image.getpixel(place) == (255, 0, 0)]
    assert reds == [(2, 0)]
