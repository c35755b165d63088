"""Images of neighbours shown to a network that takes them."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support import tiny_models

from model.editing.config import edit_config
from model.editing.edit import needs_source_tokens
from model.generation.neighbour_images import encode_neighbours
from model.generation.start import as_start
from model.networks.editor import widen_input
from model.networks.image_tokens import NeighbourImageTransformer, add_image_tokens
from model.pipeline import KNNDiffusionPipeline, new_pipeline
from model.retrieval.database import Database
from model.retrieval.searchable import Hits

PROMPTS = torch.from_numpy(tiny_models.unit_rows(2, seed=1).astype(np.float32))
SOURCE = Image.new("RGB", (8, 8), "teal")


class Reader:
    """Stored images, one colour per row, and the rows that were read."""

    def __init__(self) -> None:
        self.read: list[list[int]] = []

    def __call__(self, ids: Sequence[int]) -> list[Image.Image]:
        self.read.append(list(ids))
        return [Image.new("RGB", (12, 12), (6 * row, 255 - 6 * row, 90)) for row in ids]


def hits(ids: list[list[int]], cosines: list[float] | None = None) -> Hits:
    """Return neighbours with these ids; each prompt's have the ``cosines``."""
    scores = np.tile(np.float32(cosines or len(ids[0]) * [0.5]), (len(ids), 1))
    return Hits(scores=scores, ids=np.array(ids), embeddings=np.zeros((*scores.shape, tiny_models.WIDTH), np.float32))


def plain(folder: Path) -> Database:
    return tiny_models.database(folder, tiny_models.unit_rows(40))


def network(*, editor: bool = False) -> NeighbourImageTransformer:
    base = widen_input(tiny_models.network()) if editor else tiny_models.network()
    extended: NeighbourImageTransformer = tiny_models.stirred(add_image_tokens(base, images=2, patch=4))
    return extended


def pipeline(plugged: Database, *, editor: bool = False) -> KNNDiffusionPipeline:
    built = new_pipeline(network(editor=editor), plugged.encoder, neighbours=3)
    built.swap_database(plugged)
    built._encoder = _Encoder()  # type: ignore[assignment]
    return built


class _Encoder:
    """Encoder of images to unit rows that depend on the mean colour."""

    def embed_pixels(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        means = torch.from_numpy(pixels.astype(np.float32)).mean((1, 2)) / 255
        rows = torch.cat([means, torch.ones(len(pixels), tiny_models.WIDTH - 3)], dim=1)
        return torch.nn.functional.normalize(rows, dim=1)


def generated(pipe: KNNDiffusionPipeline, **options: Any) -> NDArray[np.int64]:
    output = pipe(PROMPTS, generator=torch.Generator().manual_seed(0), num_inference_steps=3, **options)
    return np.stack([np.asarray(image) for image in output.images]).astype(np.int64)


def test_call_shows_the_images_of_the_nearest_neighbours(tmp_path: Path) -> None:
    reader = Reader()
    database = plain(tmp_path).with_images(reader)
    pipe = pipeline(database)
    reader.read.clear()
    shown = generated(pipe, num_images_per_prompt=2)
    nearest = database.search(PROMPTS.numpy(), 3).ids[:, :2]
    used = [rows for rows in reader.read if len(rows) > 1]
    assert used == [sorted(set(nearest.reshape(-1).tolist()))], "read once, for all samples and steps"
    hidden = generated(pipe, num_images_per_prompt=2, neighbour_images=False)
    assert not np.array_equal(shown, hidden)

    other = pipeline(plain(tmp_path / "other").with_images(lambda ids: [Image.new("RGB", (8, 8))] * len(ids)))
    assert not np.array_equal(generated(other, num_images_per_prompt=2), shown), "the images count, not only the rows"
    assert np.array_equal(generated(other, num_images_per_prompt=2, neighbour_images=False), hidden)


def test_call_with_hidden_images_equals_a_network_without_them(tmp_path: Path) -> None:
    database = plain(tmp_path).with_images(Reader())
    base = new_pipeline(tiny_models.network(), database.encoder, neighbours=3)
    extended = new_pipeline(add_image_tokens(tiny_models.network(), images=2, patch=4), database.encoder, neighbours=3)
    images = []
    for pipe in (base, extended):
        pipe.swap_database(database)
        images.append(generated(pipe, guidance_scale=2.0))
    assert np.array_equal(*images), "new image tokens do not change the images"


def test_database_without_images_works_through_embeddings_and_logs_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = pipeline(plain(tmp_path))
    with caplog.at_level(logging.WARNING, "model.generation.base_pipeline"):
        first, second = generated(pipe), generated(pipe)
    assert caplog.text.count("has no readable images; the generator uses the embeddings") == 1
    assert np.array_equal(first, second)
    readable = pipeline(plain(tmp_path / "readable").with_images(Reader()))
    assert np.array_equal(generated(readable, neighbour_images=False), first)


def test_encode_neighbours_hides_missing_ones_and_ignores_further_ones(tmp_path: Path) -> None:
    reader, built = Reader(), network()
    tokens = encode_neighbours(built, hits([[5, 3, 7], [3, -1, -1]]), plain(tmp_path).with_images(reader))
    assert reader.read == [[3, 5]]
    images = as_start(Reader()([5, 3, 3]), 8)
    with torch.no_grad():
        both = built.encode_images(images[None, :2], torch.ones(1, 2, dtype=torch.bool))
        one = built.encode_images(images[None, 2:], torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(tokens, torch.cat([both, one]))
    empty = encode_neighbours(built, hits([[-1, -1]]), plain(tmp_path / "empty"))
    assert not empty.any()


def test_encode_neighbours_leaves_out_near_duplicates_of_the_query(tmp_path: Path) -> None:
    reader, built = Reader(), network()
    database = plain(tmp_path).with_images(reader)
    tokens = encode_neighbours(built, hits([[5, 3, 7]], [0.99, 0.9, 0.8]), database)
    torch.testing.assert_close(tokens, encode_neighbours(built, hits([[3, 7]]), database))
    assert reader.read == [[3, 7], [3, 7]]


def test_call_with_retrieve_false_interpolation_or_negative_prompt(tmp_path: Path) -> None:
    reader = Reader()
    pipe = pipeline(plain(tmp_path).with_images(reader))
    assert pipe.has_images
    reader.read.clear()
    generated(pipe, retrieve=False)
    assert len(generated(pipe, between=3)) == 3
    assert not reader.read, "these calls show no images"
    away = torch.from_numpy(tiny_models.unit_rows(1, seed=2).astype(np.float32))
    pushed, plain_guidance = generated(pipe, negative_prompt=away), generated(pipe)
    assert not np.array_equal(pushed, plain_guidance)


@pytest.mark.parametrize("method", ["flow", "local", "sdedit", "restore"])
def test_edit_shows_text_and_source_their_own_neighbours(tmp_path: Path, method: Any) -> None:
    reader = Reader()
    pipe = pipeline(plain(tmp_path).with_images(reader), editor=method == "restore")
    assert pipe.has_images
    reader.read.clear()
    options: Any = {"method": method, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    shown = pipe.edit(SOURCE, PROMPTS[:1], **options)
    assert len(reader.read) == 1 + needs_source_tokens(edit_config(method))
    reader.read.clear()
    options["generator"] = torch.Generator().manual_seed(0)
    hidden = pipe.edit(SOURCE, PROMPTS[:1], neighbour_images=False, **options)
    assert not reader.read
    assert np.asarray(shown[0]).shape == np.asarray(hidden[0]).shape == (8, 8, 3)


def test_pipeline_with_image_tokens_saved_and_opened_generates_the_same(tmp_path: Path) -> None:
    database = plain(tmp_path / "database").with_images(Reader())
    pipe = pipeline(database)
    expected = generated(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    opened = KNNDiffusionPipeline.open(tmp_path / "saved", database)
    assert isinstance(opened.transformer, NeighbourImageTransformer)
    assert np.array_equal(generated(opened), expected)
