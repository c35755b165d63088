import itertools

import numpy as np
import pytest
import torch
from support import tiny_models
from torch import Tensor

from model.configs import NEAR_DUPLICATE, ConditioningConfig, RestorationConfig
from model.diffusion.conditioning import SampledCondition, append_image_tokens, condition_tokens
from model.errors import ModelError
from model.networks.denoiser import as_denoiser
from model.networks.dit import build_transformer
from model.networks.image_tokens import NeighbourImageTransformer, add_image_tokens
from model.step_random import StepRandom
from model.training.batch import Batch
from model.training.data import TrainingRows, TrainingSet
from model.training.objectives.flow_matching import FlowMatching
from model.training.objectives.restoration import Restoration
from model.training.shown_images import change_at_random, shown_images

ROWS, SIDE = 6, 8
GREYS = (np.arange(ROWS) * 40).astype(np.uint8)
PIXELS = np.broadcast_to(GREYS[:, None, None, None], (ROWS, SIDE, SIDE, 3)).copy()
NETWORK = add_image_tokens(tiny_models.network(), images=2, patch=4)


def training_set(neighbours: np.ndarray, *, rows: np.ndarray | None = None, images: bool = True) -> TrainingSet:
    embeddings = tiny_models.unit_rows(ROWS) if rows is None else rows
    count = len(neighbours)
    content = TrainingRows(
        images=PIXELS[:count], embeddings=embeddings[:count], neighbours=neighbours, reference=PIXELS[:count]
    )
    return TrainingSet(content, embeddings, database_images=PIXELS if images else None)


def condition(chosen: list[list[int]], visible: list[list[bool]]) -> SampledCondition:
    return SampledCondition(torch.empty(0), torch.tensor(chosen), torch.tensor(visible))


def shown(
    batch: Batch, sampled: SampledCondition, network: NeighbourImageTransformer = NETWORK, drop: float = 0.0
) -> list[list[int | None]]:
    """Return the database rows whose images are shown, None for a hidden one."""
    images = shown_images(network, batch, sampled, ConditioningConfig(drop_images=drop), StepRandom(0, 0))
    assert images is not None
    greys = ((images.pixels.mean((2, 3, 4)) + 1) * 127.5 / 40).round().int().tolist()
    return [
        [grey if visible else None for grey, visible in zip(*row, strict=True)]
        for row in zip(greys, images.shown.tolist(), strict=True)
    ]


def test_shown_images_are_those_of_the_nearest_visible_neighbours() -> None:
    batch = training_set(np.array([[1, 2, 3, 4]])).batch(0, seed=0, size=1)
    assert shown(batch, condition([[0, 1, 3]], [[True, True, True]])) == [[1, 2]]
    assert shown(batch, condition([[1, 3]], [[True, True]])) == [[2, 4]], "as chosen from the pool"
    assert shown(batch, condition([[0, 1, 2]], [[True, False, False]])) == [[1, None]]
    assert shown(batch, condition([[0, 1, 2]], [[False] * 3])) == [[None, None]], "hidden with the neighbours"
    assert shown(batch, condition([[0, 1, 2]], [[True] * 3]), drop=1.0) == [[None, None]]


def test_shown_images_near_duplicates_are_skipped() -> None:
    rows = tiny_models.unit_rows(ROWS).astype(np.float32)
    for row, cosine in ((1, NEAR_DUPLICATE + 0.01), (2, NEAR_DUPLICATE - 0.01)):
        across = rows[row] - rows[row] @ rows[0] * rows[0]
        rows[row] = cosine * rows[0] + (1 - cosine**2) ** 0.5 * across / np.linalg.norm(across)
    batch = training_set(np.array([[1, 2, 3, 4]]), rows=rows.astype(np.float16)).batch(0, seed=0, size=1)
    assert shown(batch, condition([[0, 1, 2]], [[True] * 3])) == [[2, 3]]
    assert shown(batch, condition([[0]], [[True]])) == [[None]], "hidden if there is no other"


def test_shown_images_are_hidden_as_a_whole_in_the_configured_share() -> None:
    neighbours = np.tile([[1, 2, 3]], (4, 1))
    batch = training_set(neighbours).batch(0, seed=0, size=2000)
    everything = condition([[0, 1, 2]] * 2000, [[True] * 3] * 2000)
    images = shown_images(NETWORK, batch, everything, ConditioningConfig(drop_images=0.3), StepRandom(0, 0))
    assert images is not None
    assert torch.equal(images.shown[:, 0], images.shown[:, 1])
    assert images.shown[:, 0].float().mean().item() == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("kind", ["generation", "restoration"])
def test_objective_network_with_image_tokens_and_a_set_without_images_raises(kind: str) -> None:
    conditioning = ConditioningConfig(neighbours=2, pool=2)
    batch = training_set(np.array([[1, 2], [3, 4]]), images=False).batch(0, seed=0, size=2)
    objective: FlowMatching | Restoration = FlowMatching(conditioning)
    if kind == "restoration":
        objective = Restoration(conditioning, RestorationConfig(), prediction="velocity")
    with pytest.raises(ModelError, match="training set has none; give it database_images"):
        objective(NETWORK, batch, StepRandom(0, 0))
    assert FlowMatching(conditioning)(tiny_models.network(), batch, StepRandom(0, 0)).isfinite(), "others need none"


def test_training_set_with_too_few_database_images_raises() -> None:
    rows = tiny_models.unit_rows(ROWS)
    content = TrainingRows(images=PIXELS, embeddings=rows, neighbours=np.zeros((ROWS, 1), np.int64))
    with pytest.raises(ModelError, match="numbers of images and rows of the database differ: 5, 6"):
        TrainingSet(content, rows, database_images=PIXELS[:5])


def test_flow_matching_without_shown_images_equals_the_loss_of_the_base() -> None:
    base = tiny_models.network()
    batch = training_set(np.array([[1, 2], [3, 4]])).batch(0, seed=0, size=2)
    objective = FlowMatching(ConditioningConfig(neighbours=2, pool=2))
    losses = [objective(network, batch, StepRandom(0, 0)) for network in (base, add_image_tokens(base, patch=4))]
    assert torch.equal(*losses), "the noise levels and the noise are the same too"


def test_change_at_random_moves_images_independently_and_keeps_their_range() -> None:
    images = torch.full((64, 2, 3, 16, 16), 1.0)
    images[..., 4:8, 2:6] = -1
    changed = change_at_random(images, StepRandom(0, 0))
    assert changed.shape == images.shape
    assert changed.min() >= -1 - 1e-5
    assert changed.max() <= 1 + 1e-5
    dark = (1 - changed.mean(2)).clamp(min=0)
    columns = torch.arange(16.0)
    centres = (dark.sum(2) * columns).sum(-1) / dark.sum((2, 3))  # (64, 2) mean column of the dark square
    assert not torch.allclose(centres[:, 0], centres[:, 1], atol=1), "each image has its own changes"
    assert (centres > 8).float().mean().item() == pytest.approx(0.5, abs=0.15), "half of them are mirrored"
    assert torch.equal(change_at_random(images, StepRandom(0, 0)), changed)


def test_network_with_image_tokens_follows_the_images_after_training() -> None:
    """The vectors are equal for all images, so only the images of neighbours can supply the brightness."""
    torch.manual_seed(0)
    base = build_transformer(tiny_models.size(), embedding_dimension=tiny_models.WIDTH, seed=0)
    network = add_image_tokens(base, patch=4)
    rows = np.repeat(tiny_models.unit_rows(1), ROWS, axis=0)
    neighbours = np.arange(ROWS)[:, None]  # each image itself; equal vectors would make it a near-duplicate
    batch = training_set(neighbours, rows=rows).batch(0, seed=0, size=ROWS)
    query, near = batch.query, -batch.neighbours
    batch = Batch(images=batch.images, query=query, neighbours=near, neighbour_images=batch.neighbour_images)
    objective = FlowMatching(ConditioningConfig(neighbours=1, pool=1, gap_probability=0))
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for step in range(100):
        optimizer.zero_grad()
        objective(network, batch, StepRandom(0, step)).backward()
        optimizer.step()
    tokens = condition_tokens(query, near, dimension=tiny_models.WIDTH, batch=ROWS)
    with torch.no_grad():
        seen = batch.images[:, None]
        encoded = network.encode_images(seen, torch.ones(ROWS, 1, dtype=torch.bool))
        with_images, without = (
            generated(network, given).mean((1, 2, 3)) for given in (append_image_tokens(tokens, encoded), tokens)
        )
    wanted = batch.images.mean((1, 2, 3))
    assert torch.corrcoef(torch.stack([with_images, wanted]))[0, 1] > 0.9
    assert (with_images - wanted).square().mean() < 0.3 * (without - wanted).square().mean()


def generated(network: NeighbourImageTransformer, tokens: Tensor) -> Tensor:
    """Generate an image for each condition by eight Euler steps, from the same noise."""
    sample = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).repeat(len(tokens), 1, 1, 1)
    denoiser = as_denoiser(network, "velocity")
    for now, following in itertools.pairwise(torch.linspace(1, 0, 9)):
        sample = sample + (following - now) * denoiser(sample, now.expand(len(tokens)), tokens)
    return sample


def test_shown_images_network_without_tokens_is_none() -> None:
    batch = training_set(np.array([[1, 2]])).batch(0, seed=0, size=1)
    sampled, rng = condition([[0]], [[True]]), StepRandom(0, 0)
    assert shown_images(tiny_models.network(), batch, sampled, ConditioningConfig(), rng) is None
