"""Start from a stored neighbour or from an image of the user instead of pure noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_models

from model.diffusion.flow_matching import add_noise
from model.diffusion.solver import new_scheduler, solve
from model.errors import ModelError
from model.generation.continuous import REFERENCE_ABOVE
from model.generation.start import choose_by_noise
from model.networks.denoiser import TIMESTEPS
from model.pipeline import KNNDiffusionPipeline

SIDE = 8


def colour_of_row(row: int) -> int:
    return 5 * row


def stored_images(ids: Any) -> list[Image.Image]:
    return [Image.new("RGB", (SIDE, SIDE), (colour_of_row(row),) * 3) for row in ids]


@pytest.fixture
def pipeline(tmp_path: Path) -> KNNDiffusionPipeline:
    plugged = tiny_models.database(tmp_path, tiny_models.unit_rows(40)).with_images(stored_images)
    return tiny_models.pipeline(plugged)


def queries(count: int = 2) -> torch.Tensor:
    return torch.from_numpy(tiny_models.unit_rows(count, seed=1).astype(np.float32))


def generated(pipeline: KNNDiffusionPipeline, prompts: Any, **options: Any) -> np.ndarray[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    output = pipeline(prompts, generator=generator, num_inference_steps=2, **options)
    return np.stack([np.asarray(image) for image in output.images]).astype(np.int64)


def test_start_of_low_strength_returns_one_of_the_nearest_neighbours_of_about_the_same_score(tmp_path: Path) -> None:
    rows = tiny_models.unit_rows(40).astype(np.float32)
    query, other = rows[0], rows[1] - rows[1] @ rows[0] * rows[0]
    other /= np.linalg.norm(other)
    for row, cosine in ((1, 0.97), (2, 0.93)):
        rows[row] = cosine * query + (1 - cosine**2) ** 0.5 * other
    near = tiny_models.database(tmp_path, rows.astype(np.float16)).with_images(stored_images)
    pipeline = tiny_models.pipeline(near)
    for k in (1, 3):
        prompt = torch.from_numpy(query[None])
        images = generated(pipeline, prompt, start="neighbour", strength=1e-4, num_images_per_prompt=8, neighbours=k)
        values = images.mean(axis=(1, 2, 3)).round()
        assert set(values.tolist()) == {colour_of_row(0), colour_of_row(1)}, "row 2 has a lower score"


def test_start_with_the_same_seed_does_not_depend_on_the_batch(pipeline: KNNDiffusionPipeline) -> None:
    both = generated(pipeline, queries(), start="neighbour")
    assert np.array_equal(generated(pipeline, queries()[:1], start="neighbour")[0], both[0])


def test_start_by_default_is_noise(pipeline: KNNDiffusionPipeline) -> None:
    assert np.array_equal(generated(pipeline, queries()), generated(pipeline, queries(), start="noise"))
    assert not np.array_equal(generated(pipeline, queries()), generated(pipeline, queries(), start="neighbour"))


def test_start_without_images_raises(tmp_path: Path) -> None:
    plain = tiny_models.pipeline(tiny_models.database(tmp_path, tiny_models.unit_rows(40)))
    with pytest.raises(ModelError, match="was opened without images"):
        generated(plain, queries(), start="neighbour")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "image"}, "start is unknown"),
        ({"start": "neighbour", "strength": 0.0}, "strength is out of range"),
        ({"start": "neighbour", "strength": 1.1}, "strength is out of range"),
        ({"start": "neighbour", "strength": float("nan")}, "strength is out of range"),
        ({"strength": 0.5}, "strength has no effect"),
        ({"start": "neighbour", "retrieve": False}, "needs retrieval"),
        ({"start": "neighbour", "between": 4}, "interpolation cannot start from images"),
        ({"start": [Image.new("RGB", (SIDE, SIDE))] * 3}, "3 start images for 2 prompts"),
        ({"reference": "image"}, "reference is unknown"),
        ({"reference": "neighbour"}, "this generator takes no reference"),
    ],
)
def test_start_with_invalid_arguments_raises(
    options: dict[str, Any], message: str, pipeline: KNNDiffusionPipeline
) -> None:
    with pytest.raises(ModelError, match=message):
        generated(pipeline, queries(), **options)


def test_start_of_a_discrete_generator_raises() -> None:
    discrete = tiny_models.discrete_pipeline()
    with pytest.raises(ModelError, match="a discrete generator cannot start from an image"):
        discrete(torch.ones(1, discrete.identity.dimension), start="neighbour")


@pytest.fixture
def editor(pipeline: KNNDiffusionPipeline) -> KNNDiffusionPipeline:
    made = tiny_models.editor_pipeline()
    made.swap_database(pipeline.database)
    return made


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_reference_is_the_neighbour_of_the_start_and_hidden_at_low_noise_levels(
    guidance_scale: float, editor: KNNDiffusionPipeline
) -> None:
    shown: list[tuple[float, torch.Tensor]] = []

    def record(_: Any, positional: Any, named: Any) -> None:
        shown.append((float(named["timestep"][0]) / TIMESTEPS, positional[0][:2, 3:]))

    editor.transformer.register_forward_pre_hook(record, with_kwargs=True)
    options: dict[str, Any] = {"start": "neighbour", "strength": 0.95, "guidance_scale": guidance_scale}
    generated(editor, queries(), reference="neighbour", **options)
    high = [images for sigma, images in shown if sigma > REFERENCE_ABOVE]
    low = [images for sigma, images in shown if sigma <= REFERENCE_ABOVE]
    start = np.stack([np.asarray(image) for image in generated_start(editor)])
    expected = torch.from_numpy(start / 127.5 - 1).float().permute(0, 3, 1, 2)
    assert high
    assert low
    assert all(torch.allclose(images, expected, atol=1e-2) for images in high)
    assert not any(images.any() for images in low)


def generated_start(editor: KNNDiffusionPipeline) -> np.ndarray[Any, Any]:
    """Return the images that a call with the same noise starts from."""
    return generated(editor, queries(), start="neighbour", strength=1e-4, guidance_scale=1.0)


def test_reference_by_default_is_hidden(editor: KNNDiffusionPipeline) -> None:
    with torch.no_grad():
        editor.transformer.pos_embed.proj.weight[:, 3:] = 0.5  # the copied network ignores the new channels
    assert np.array_equal(generated(editor, queries()), generated(editor, queries(), reference="none"))
    assert not np.array_equal(generated(editor, queries()), generated(editor, queries(), reference="neighbour"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrieve": False}, "needs retrieval"),
        ({"between": 4}, "interpolation cannot start from images"),
        ({"quality": "fast"}, "has no effect with this strength: 0.8; use a strength above 0.85, or start='noise'"),
        ({"start": "neighbour", "strength": 0.85}, "has no effect with this strength: 0.85"),
    ],
)
def test_reference_that_cannot_be_shown_raises(
    options: dict[str, Any], message: str, editor: KNNDiffusionPipeline
) -> None:
    with pytest.raises(ModelError, match=message):
        generated(editor, queries(), reference="neighbour", **options)


def test_reference_of_a_discrete_backbone_raises() -> None:
    backbone = tiny_models.discrete_pipeline().backbone
    noise, tokens = backbone.noise(1, 2, None), torch.zeros(1, 4, tiny_models.WIDTH + 1)
    with pytest.raises(ModelError, match="takes no reference"):
        backbone.generate(
            tokens,
            noise,
            steps=2,
            guidance_scale=1.0,
            negative=None,
            on_step=print,
            reference=torch.zeros(1, 3, 16, 16),
        )


def test_vary_of_low_strength_returns_each_image(pipeline: KNNDiffusionPipeline) -> None:
    given = [Image.new("RGB", (32, 32), "white"), Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 255))]
    varied = pipeline.vary(given, 1e-4, prompt=queries(), num_images_per_prompt=2, num_inference_steps=2).images
    means = [np.asarray(image).mean() for image in varied]
    assert means == pytest.approx([255, 255, 0, 0], abs=2)
    one_for_all = pipeline.vary(given[0], 1e-4, prompt=queries(), num_inference_steps=2).images
    assert [np.asarray(image).mean() for image in one_for_all] == pytest.approx([255, 255], abs=2)


def test_vary_without_an_image_raises(pipeline: KNNDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match="there is no image to vary"):
        pipeline.vary([])


def test_solve_from_a_lower_strength_follows_the_path_to_the_image() -> None:
    image, noise = torch.full((1, 3, 4, 4), 0.5), torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    levels: list[float] = []

    def exact(sample: torch.Tensor, sigma: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        levels.append(float(sigma[0]))
        return noise - image

    noised = add_noise(image, noise, torch.tensor([0.6]))
    solved = solve(exact, noised, torch.zeros(1, 1, 1), new_scheduler(), 4, lambda _: None, strength=0.6)
    assert levels[0] == pytest.approx(0.6, abs=1e-3)
    assert len(levels) == 4
    torch.testing.assert_close(solved, image, atol=1e-3, rtol=0)


def test_choose_by_noise_is_uniform_and_below_the_counts() -> None:
    noise = torch.randn(3_000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = np.bincount(choose_by_noise(noise, np.full(3_000, 3)), minlength=3)
    assert len(drawn) == 3
    assert np.abs(drawn - 1_000).max() < 120
    assert choose_by_noise(noise[:5], np.ones(5, np.int64)).tolist() == [0] * 5


def test_has_images_is_tried_once_with_a_row_that_may_be_returned(tmp_path: Path) -> None:
    plain = tiny_models.database(tmp_path, tiny_models.unit_rows(40), hidden=np.array([0, 1, 5]))
    assert not plain.has_images
    read: list[int] = []

    def images(ids: Any) -> list[Image.Image]:
        read.extend(ids)
        return stored_images(ids)

    def deleted(ids: Any) -> list[Image.Image]:
        raise FileNotFoundError(ids)

    readable = plain.with_images(images)
    assert readable.has_images
    assert readable.has_images
    assert read == [2]
    assert not readable.with_images(deleted, errors=(FileNotFoundError,)).has_images
    with pytest.raises(FileNotFoundError):
        readable.with_images(deleted).has_images  # noqa: B018 - a property
    assert not plain.with_images(images).without(np.arange(40)).has_images


def test_images_of_a_database_rejects_unknown_rows(pipeline: KNNDiffusionPipeline) -> None:
    database: Any = pipeline.database
    assert [image.getpixel((0, 0))[0] for image in database.images([3, 1, 3])] == [15, 5, 15]
    with pytest.raises(ModelError, match="40"):
        database.images([40])
