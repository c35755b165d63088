"""Condition tokens: the embeddings of the query and its k neighbours, as the network sees them (Sheynin et al., §3).

Legend: ``B`` batch, ``K`` neighbours, ``P`` pool of neighbours, ``D`` embedding width.

In training the query is the image's own embedding; at inference it is the embedding of a text. The two differ
systematically in CLIP space (the modality gap). Training therefore often mixes the query with a random direction, so
that a text embedding looks like one more noisy query. The mixture is LAFITE's pseudo-text (2111.13792):
(1 − a)·f + a·n, renormalised. The weights a were measured by this project; they are not the paper's.

A dropped token keeps its position and its marker, and its embedding is zero. "No query", "no neighbours" and "no
condition" are thus inputs that the network has seen in training.
"""

import dataclasses
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor

from model.errors import ModelError
from model.step_random import StepRandom

MARKER_CHANNELS = 1
"""Channels in addition to the embedding: 1 for the query, 0 for a neighbour."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningConfig:
    """Probabilities of hiding and perturbing parts of the condition in training.

    The three ``drop_`` fields are mutually exclusive probabilities per sample.

    The neighbours of a text are farther apart than those of an image. ``pool`` may therefore be larger than
    ``neighbours``: half of the samples then see a random subset of the pool instead of the nearest neighbours.
    ``fewer_neighbours`` makes k at inference independent of k in training.

    Attributes:
        neighbours: Neighbours that the network sees.
        pool: Neighbours searched for each image. Training shows ``neighbours`` of them.
        fewer_neighbours: Share of samples that see a random number of neighbours, at least 1.
        drop_all: Probability that query and neighbours are hidden.
        drop_query: Probability that only the query is hidden.
        drop_neighbours: Probability that only the neighbours are hidden.
        gap_probability: Probability that the query is mixed with a random direction, as a text differs from an image.
        gap_weight: Largest weight of the random direction.
        mean_query: Share of samples with the mean of the shown neighbours in the query's slot, as at inference.
    """

    neighbours: Annotated[int, Ge(1)] = 10
    pool: Annotated[int, Ge(1)] = 10
    fewer_neighbours: Annotated[float, Interval(ge=0, le=1)] = 0.1
    drop_all: Annotated[float, Interval(ge=0, le=1)] = 0.10
    drop_query: Annotated[float, Interval(ge=0, le=1)] = 0.15
    drop_neighbours: Annotated[float, Interval(ge=0, le=1)] = 0.10
    gap_probability: Annotated[float, Interval(ge=0, le=1)] = 0.7
    gap_weight: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    # Out of a stage's key unless set, so that stored artifacts keep their keys.
    mean_query: Annotated[float, Interval(ge=0, le=1)] = dataclasses.field(default=0.0, metadata={"in_key": "if set"})

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.neighbours < 1:
            raise ModelError(f"neighbours must be at least 1: {self.neighbours}; the method requires retrieval")
        if self.pool < self.neighbours:
            raise ModelError(f"pool is smaller than neighbours: {self.pool} < {self.neighbours}; increase pool")
        drops = (self.drop_all, self.drop_query, self.drop_neighbours)
        if min(drops) < 0 or sum(drops) > 1:
            raise ModelError(
                f"drop_all, drop_query and drop_neighbours must be at least 0, with a sum of at most 1: {drops}; "
                "lower one of them, because they are mutually exclusive"
            )
        if not 0 <= self.fewer_neighbours <= 1:
            raise ModelError(f"fewer_neighbours is not a probability: {self.fewer_neighbours}; give a value in [0, 1]")
        if not (0 <= self.gap_probability <= 1 and 0 <= self.gap_weight < 1):
            raise ModelError(
                f"gap_probability or gap_weight is out of range: {self.gap_probability}, {self.gap_weight}; "
                "give a value in [0, 1] and one in [0, 1)"
            )
        if not 0 <= self.mean_query <= 1:
            raise ModelError(f"mean_query is not a probability: {self.mean_query}; give a value in [0, 1]")


def condition_tokens(query: Tensor | None, neighbours: Tensor | None, *, dimension: int, batch: int) -> Tensor:
    """Join query and neighbours to a sequence, scale them to unit variance, and mark the query.

    Args:
        query: (B, D) unit rows, or None for a hidden query.
        neighbours: (B, K, D) unit rows, or None for one hidden neighbour.
        dimension: D.
        batch: B.

    Returns:
        (B, 1 + K, D + 1) float32.

    Raises:
        ModelError: The shapes do not match ``batch`` and ``dimension``.
    """
    if query is None:
        query = torch.zeros(batch, dimension)
    if neighbours is None:
        neighbours = torch.zeros(batch, 1, dimension, device=query.device)
    if query.shape != (batch, dimension) or neighbours.shape[::2] != (batch, dimension):
        raise ModelError(
            f"query or neighbours do not match batch {batch} and embedding width {dimension}: {tuple(query.shape)}, "
            f"{tuple(neighbours.shape)}; embed with the encoder that the generator was trained with"
        )
    embeddings = torch.cat([query[:, None], neighbours.to(query.device)], dim=1).float() * dimension**0.5
    marker = torch.zeros(*embeddings.shape[:2], MARKER_CHANNELS, device=embeddings.device)
    marker[:, 0] = 1
    return torch.cat([embeddings, marker], dim=2)


def interpolate_tokens(tokens: Tensor, count: int) -> Tensor:
    """Interpolate two conditions, tokens (2, 1 + K, D + 1) to (count, 1 + K, D + 1): each token by :func:`slerp`."""
    embeddings, marker = tokens[..., :-MARKER_CHANNELS], tokens[0, ..., -MARKER_CHANNELS:]
    length = embeddings.shape[-1] ** 0.5  # norm of every embedding that is not hidden
    first, second = embeddings / length
    return torch.cat([length * slerp(first, second, count), marker.expand(count, -1, -1)], dim=-1)


def slerp(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Return unit rows (count, …, D) on the great circles from ``first`` to ``second`` (…, D), ends included."""
    fraction = torch.linspace(0, 1, count).view(-1, *[1] * first.ndim)
    angle = (first * second).sum(-1, keepdim=True).clamp(-1, 1).arccos()
    spherical = (torch.sin((1 - fraction) * angle) * first + torch.sin(fraction * angle) * second) / angle.sin()
    linear = F.normalize(torch.lerp(first, second, fraction), dim=-1)
    # Rows of equal or opposite direction define no unique great circle.
    return torch.where(angle.sin() < 1e-4, linear, spherical)


def null_condition(tokens: Tensor) -> Tensor:
    """Hide every embedding of tokens (B, 1 + K, D + 1): the unconditional input of guidance."""
    hidden = torch.zeros_like(tokens)
    hidden[..., -MARKER_CHANNELS:] = tokens[..., -MARKER_CHANNELS:]
    return hidden


def perturb_query(query: Tensor, config: ConditioningConfig, rng: StepRandom) -> Tensor:
    """Perturb a random share of the query embeddings (B, D), so that text embeddings are in distribution."""
    batch = len(query)
    mixed = rng.uniform(batch, 1) < config.gap_probability
    weight = rng.uniform(batch, 1) * config.gap_weight * mixed
    direction = F.normalize(rng.normal(*query.shape), dim=1)
    return F.normalize((1 - weight) * query + weight * direction, dim=1)


def subsample_neighbours(neighbours: Tensor, config: ConditioningConfig, rng: StepRandom) -> Tensor:
    """Choose the neighbours to show from each pool (B, P, D), nearest first. Return (B, K, D), hidden ones as zeros."""
    batch, pool, dimension = neighbours.shape
    shown = min(config.neighbours, pool)
    if pool > shown:
        at_random = rng.uniform(batch, 1) < 0.5
        rank = torch.arange(pool, device=neighbours.device).expand(batch, pool) / pool
        chosen = torch.where(at_random, rng.uniform(batch, pool), rank).topk(shown, dim=1, largest=False).indices
        chosen = chosen.sort(dim=1).values[..., None].expand(batch, shown, dimension)
        neighbours = neighbours.gather(1, chosen)
    fewer = rng.uniform(batch, 1) < config.fewer_neighbours
    count = torch.where(fewer, 1 + (rng.uniform(batch, 1) * shown).floor(), shown)
    hidden = torch.arange(shown, device=neighbours.device) >= count
    return neighbours.masked_fill(hidden[..., None], 0)


def training_condition(query: Tensor, neighbours: Tensor, config: ConditioningConfig, rng: StepRandom) -> Tensor:
    """Return the condition tokens of a training batch, with perturbed queries and randomly hidden parts.

    Args:
        query: (B, D) unit rows, the images' own embeddings.
        neighbours: (B, P, D) unit rows, nearest first.
        config: Probabilities of the perturbation and of hiding.
        rng: Source of all randomness, on the device of the rows.

    Returns:
        (B, 1 + K, D + 1) float32.
    """
    query = perturb_query(query.float(), config, rng)
    neighbours = subsample_neighbours(neighbours.float(), config, rng)
    uniform = rng.uniform(len(query))
    if config.mean_query:
        by_mean = rng.uniform(len(query), 1) < config.mean_query
        query = torch.where(by_mean, F.normalize(neighbours.sum(1), dim=1), query)
    all_below = config.drop_all
    query_below = all_below + config.drop_query
    neighbours_below = query_below + config.drop_neighbours
    hide_all = uniform < all_below
    hide_query = hide_all | ((uniform >= all_below) & (uniform < query_below))
    hide_neighbours = hide_all | ((uniform >= query_below) & (uniform < neighbours_below))
    query = query.masked_fill(hide_query[:, None], 0)
    neighbours = neighbours.masked_fill(hide_neighbours[:, None, None], 0)
    return condition_tokens(query, neighbours, dimension=query.shape[1], batch=len(query))
