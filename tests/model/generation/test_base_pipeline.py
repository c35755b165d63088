"""The components of a pipeline: defaults, database, saving and opening."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support import tiny_models

from model.errors import ModelError
from model.pipeline import KNNDiffusionPipeline, new_pipeline
from model.retrieval.database import Database

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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"guidance_interval": (0.9, 0.1)},
            r"guidance_interval is not valid: \[0\.9, 0\.1\]; give two noise levels",
        ),
        ({"guidance_interval": (0.9,)}, r"guidance_interval is not valid: \[0\.9\]"),
        ({"guidance_interval": (0.1, float("nan"))}, "guidance_interval is not valid"),
        ({"guidance_scale": float("nan")}, "guidance_scale is not finite: nan"),
        ({"prediction": "foo"}, "prediction is unknown: 'foo'; use one of velocity, sample"),
        ({"query": "foo"}, "query is unknown: 'foo'; use one of text, mean, both, none"),
        ({"truncation": 0}, "truncation is out of range: 0; give a share above 0"),
        ({"truncation": 1.1}, r"truncation is out of range: 1\.1"),
        ({"neighbours": 0}, "neighbours is not a positive integer: 0; give at least 1"),
        ({"trained_neighbours": -1}, "trained_neighbours is not a positive integer: -1"),
        ({"candidates": 1.5}, r"candidates is not a positive integer: 1\.5"),
        ({"num_inference_steps": 0}, "num_inference_steps is not a positive integer: 0"),
    ],
    ids=str,
)
def test_pipeline_invalid_defaults_raise(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        new_pipeline(tiny_models.network(), tiny_models.identity(), **wrong)
    made = new_pipeline(tiny_models.network(), tiny_models.identity())
    made.register_to_config(
        **{name: list(value) if isinstance(value, tuple) else value for name, value in wrong.items()}
    )
    made.save_pretrained(tmp_path / "saved")
    with pytest.raises(ModelError, match=f"(?s)cannot load a generator: .*saved .*{message}"):
        KNNDiffusionPipeline.open(tmp_path / "saved")


def test_swap_database_changes_the_images(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    first = pipeline.database
    before = pixels(pipeline(PROMPTS, generator=seeded()).images)
    other = tiny_models.database(
        tmp_path / "other",
        tiny_models.unit_rows(40, seed=9),
        encoder=tiny_models.identity(name="the same under another name"),
    )
    pipeline.swap_database(other)
    assert pipeline.database is other
    assert np.abs(pixels(pipeline(PROMPTS, generator=seeded()).images) - before).max() > 10
    pipeline.swap_database(first)
    np.testing.assert_array_equal(pixels(pipeline(PROMPTS, generator=seeded()).images), before)


def test_swap_database_of_other_encoder_raises_and_keeps_the_old(
    pipeline: KNNDiffusionPipeline, tmp_path: Path
) -> None:
    before = pipeline.database
    other = tiny_models.database(
        tmp_path / "other", ROWS, encoder=tiny_models.identity(name="ViT-B-32/openai", weights="f" * 64), name="birds"
    )
    with pytest.raises(ModelError) as caught:
        pipeline.swap_database(other)
    for part in ("database birds", "ViT-B-32/openai (8-d, ffffffff", "tiny-clip (8-d, 00000000", "rebuild"):
        assert part in str(caught.value)
    assert pipeline.database is before


def test_pipeline_without_encoder_identity_raises(pipeline: KNNDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match="encoder_identity is missing"):
        KNNDiffusionPipeline(pipeline.transformer, pipeline.scheduler)


def test_open_saved_pipeline_gives_identical_images(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    before = pixels(pipeline(PROMPTS, generator=seeded()).images)
    pipeline.save_pretrained(tmp_path / "saved")
    opened = KNNDiffusionPipeline.open(tmp_path / "saved", pipeline.database)
    np.testing.assert_array_equal(pixels(opened(PROMPTS, generator=seeded()).images), before)
    assert opened.identity == pipeline.identity


def test_open_restores_the_saved_defaults(database: Database, tmp_path: Path) -> None:
    built = new_pipeline(
        tiny_models.network(), tiny_models.identity(), prediction="sample", neighbours=4, trained_neighbours=6
    )
    built.register_to_config(guidance_scale=3.5, num_inference_steps=7, query="mean")
    built.save_pretrained(tmp_path / "saved")
    opened = KNNDiffusionPipeline.open(tmp_path / "saved")
    totals: list[int] = []
    names = ("neighbours", "trained_neighbours", "guidance_scale", "num_inference_steps", "query", "prediction")
    assert [opened.config[name] for name in names] == [4, 6, 3.5, 7, "mean", "sample"]
    opened.swap_database(database)
    output = opened(PROMPTS, on_progress=lambda _, total: totals.append(total))
    assert totals == [7] * 7
    assert output.hits.ids.shape == (5, 4)


def test_open_half_precision_weights_gives_float32(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    before = pixels(pipeline(PROMPTS, generator=seeded()).images)
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path / "saved")
    opened = KNNDiffusionPipeline.open(tmp_path / "saved", pipeline.database)
    assert {parameter.dtype for parameter in opened.transformer.parameters()} == {torch.float32}
    assert np.abs(pixels(opened(PROMPTS, generator=seeded()).images) - before).mean() < 2


@pytest.mark.parametrize("damage", ["cut", "overwritten", "gone"])
def test_open_damaged_weights_raises(pipeline: KNNDiffusionPipeline, tmp_path: Path, damage: str) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    (weights,) = (tmp_path / "saved").rglob("*.safetensors")
    whole = weights.read_bytes()
    weights.unlink()
    if damage != "gone":
        weights.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\xff" * len(whole))
    with pytest.raises(ModelError, match=r"(?s)cannot load a generator: .*saved .*; train or download it again"):
        KNNDiffusionPipeline.open(tmp_path / "saved")


def test_open_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)cannot load a generator: .*nowhere"):
        KNNDiffusionPipeline.open(tmp_path / "nowhere")


def test_open_with_database_of_other_encoder_raises(pipeline: KNNDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    other = tiny_models.database(tmp_path / "other", ROWS, encoder=tiny_models.identity(weights="f" * 64))
    with pytest.raises(ModelError, match="rebuild the database"):
        KNNDiffusionPipeline.open(tmp_path / "saved", other)
