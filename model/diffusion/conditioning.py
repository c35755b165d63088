"""Condition tokens: the embeddings of the query and its k neighbours, as the network sees them (Sheynin et al., §3).

Legend: ``B`` batch, ``K`` neighbours, ``P`` pool of neighbours, ``D`` embedding width.

In training the query is the image's own embedding; at inference it is the embedding of a text. The two differ
systematically in CLIP space (the modality gap). Training therefore often mixes the query with a random direction, so
that a text embedding looks like one more noisy query. The mixture is LAFITE's pseudo-text (2111.13792):
(1 − a)·f + a·n, renormalised. The weights a were measured by this project; they are not the paper's.

A dropped token keeps its position and its marker, and its embedding is zero. "No query", "no neighbours" and "no
condition" are thus inputs that the network has seen in training.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.configs import ConditioningConfig
from model.errors import ModelError
from model.step_random import StepRandom

MARKER_CHANNELS = 1
"""Channels in addition to the embedding: 1 for the query, 0 for a neighbour."""
IMAGE_CHANNELS = 1
"""Additional channels of a condition with image tokens. They are zero, and distinguish it from one without."""


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


def append_image_tokens(tokens: Tensor, images: Tensor) -> Tensor:
    """Append image tokens (B, N, D) to tokens (B, T, D + 1): (B, T + N, D + 2)."""
    images = F.pad(images.to(tokens), (IMAGE_CHANNELS, MARKER_CHANNELS))
    return torch.cat([F.pad(tokens, (IMAGE_CHANNELS, 0)), images], dim=1)


def split_image_tokens(condition: Tensor, *, channels: int, count: int) -> tuple[Tensor, Tensor | None]:
    """Split a condition into its tokens (B, T, E) and its N image tokens (B, N, D), or None if it has none.

    Args:
        condition: (B, T, E), or (B, T + N, E + 1) as of :func:`append_image_tokens`.
        channels: E.
        count: N.
    """
    if condition.shape[2] == channels:
        return condition, None
    return condition[:, :-count, IMAGE_CHANNELS:], condition[:, -count:, IMAGE_CHANNELS:-MARKER_CHANNELS]


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


class SampledCondition(NamedTuple):
    """A random condition of a training batch.

    Attributes:
        tokens: (B, 1 + K, D + 1) float32.
        chosen: (B, K) int64 positions of the shown neighbours in the pool, nearest first.
        visible: (B, K) bool, False for hidden neighbours.
    """

    tokens: Tensor
    chosen: Tensor
    visible: Tensor


def choose_neighbours(
    batch: int, pool: int, config: ConditioningConfig, rng: StepRandom, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Choose the neighbours to show from pools of P: positions (B, K) int64, nearest first, and visibility (B, K)."""
    shown = min(config.neighbours, pool)
    chosen = torch.arange(shown, device=device).expand(batch, shown)
    if pool > shown:
        at_random = rng.uniform(batch, 1) < 0.5
        rank = torch.arange(pool, device=device).expand(batch, pool) / pool
        chosen = torch.where(at_random, rng.uniform(batch, pool), rank).topk(shown, dim=1, largest=False).indices
        chosen = chosen.sort(dim=1).values
    fewer = rng.uniform(batch, 1) < config.fewer_neighbours
    count = torch.where(fewer, 1 + (rng.uniform(batch, 1) * shown).floor(), shown)
    return chosen, torch.arange(shown, device=device) < count


def sample_condition(
    query: Tensor, neighbours: Tensor, config: ConditioningConfig, rng: StepRandom
) -> SampledCondition:
    """Return a condition of a training batch, with perturbed queries and randomly hidden parts.

    Args:
        query: (B, D) unit rows, the images' own embeddings.
        neighbours: (B, P, D) unit rows, nearest first.
        config: Probabilities of the perturbation and of hiding.
        rng: Source of all randomness, on the device of the rows.
    """
    query, neighbours = perturb_query(query.float(), config, rng), neighbours.float()
    batch, pool, dimension = neighbours.shape
    chosen, visible = choose_neighbours(batch, pool, config, rng, neighbours.device)
    shown = neighbours.gather(1, chosen[..., None].expand(-1, -1, dimension))
    uniform = rng.uniform(batch)
    if config.mean_query:
        by_mean = rng.uniform(batch, 1) < config.mean_query
        query = torch.where(by_mean, F.normalize((shown * visible[..., None]).sum(1), dim=1), query)
    all_below = config.drop_all
    query_below = all_below + config.drop_query
    neighbours_below = query_below + config.drop_neighbours
    hide_all = uniform < all_below
    hide_query = hide_all | ((uniform >= all_below) & (uniform < query_below))
    hide_neighbours = hide_all | ((uniform >= query_below) & (uniform < neighbours_below))
    visible = visible & ~hide_neighbours[:, None]
    query = query.masked_fill(hide_query[:, None], 0)
    shown = shown.masked_fill(~visible[..., None], 0)
    return SampledCondition(condition_tokens(query, shown, dimension=dimension, batch=batch), chosen, visible)


def training_condition(query: Tensor, neighbours: Tensor, config: ConditioningConfig, rng: StepRandom) -> Tensor:
    """Return the tokens (B, 1 + K, D + 1) of :func:`sample_condition`."""
    return sample_condition(query, neighbours, config, rng).tokens
